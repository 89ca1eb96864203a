"""Measurements between epochs of pretraining, which do not affect the training."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fcmae.config.pretraining import PretrainConfig
from fcmae.data.evaluation import EvalDataset, each_batch, held_out
from fcmae.data.labelled import LabelledData, Split
from fcmae.data.sample import Batch
from fcmae.data.sources import Source
from fcmae.inspect.diversity import block_diversity
from fcmae.inspect.probing import NothingToRead, labelled_features, measure
from fcmae.inspect.reconstructing import grid, reconstruct_batch
from fcmae.model.fcmae import FCMAE
from fcmae.train.run_folder import RunFolder
from fcmae.train.task import Interrupted, Resolved

_log = logging.getLogger(__name__)

SHOWN = 8
NEIGHBOURS = (5, 20)


@dataclass
class HoldoutWatcher:
    """Loss and reconstructions of held-out images, and the diversity of every block's channels.

    Args:
        batches: normalised images with their masks and which pixels count, always the same; may be
            empty. The first batch is drawn.
        resolved: how images are prepared.
        epochs: between two measurements; 0 never measures.
        folder: where the main process records; None on the others.
    """

    batches: Sequence[tuple[Tensor, Tensor, Tensor | None]]
    resolved: Resolved
    epochs: int
    folder: RunFolder | None

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Return what to log after `step` steps."""
        if not self.batches:
            return {}
        total = 0.0
        for number, (images, masks, valid) in enumerate(self.batches):
            columns, loss = reconstruct_batch(model, images, masks, self.resolved.images, valid)
            total += loss * len(images)
            if self.folder is not None and number == 0:
                self.folder.trackers.image("reconstructions", grid(columns), step)
        blocks, count = block_diversity(model.encoder, (images for images, *_ in self.batches))
        spread = {f"diversity/{name}": block["diversity"] for name, block in blocks.items()}
        return {"holdout_loss": total / count, **spread}


@dataclass
class ProbeWatcher:
    """Top-1 in percent of nearest neighbours and a linear classifier on frozen features.

    Args:
        data: labelled images.
        resolved: how images are prepared, and the processes, which share the images.
        epochs: between two measurements; 0 never measures.
        max_pixels: images with more pixels count as unreadable.
    """

    data: LabelledData
    resolved: Resolved
    epochs: int
    max_pixels: int
    _reported: bool = False

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Return what to log after `step` steps.

        Raises:
            Interrupted: `stop()` became true.
        """
        run, world, was_training = self.resolved, self.resolved.world, model.training

        def read(split: Split) -> Iterator[tuple[Batch, Tensor]]:
            dataset = EvalDataset(split, run.images, self.max_pixels)
            for batch in each_batch(dataset, world.device, run.part, run.workers, world):
                if stop():
                    raise Interrupted
                yield batch

        model.eval()
        try:
            features = labelled_features(model.encoder, self.data, read, world)
        except NothingToRead as error:
            _log.warning("features were not probed: %s", error)
            return {}
        finally:
            model.train(was_training)
        if (bad := features.bad) and world.is_main and not self._reported:
            self._reported = True
            _log.warning("%d labelled images can't be read, such as %s: %s", len(bad), *bad[0])
        # Fitted on every process: threads and sums are the same, so all get the same scores.
        with torch.autocast(world.device.type, enabled=False):
            scores = measure(features, NEIGHBOURS, world.device)
        return {f"probe_{name}": score["top1"] for name, score in scores.items()}


Watcher = HoldoutWatcher | ProbeWatcher
"""Measures the model every `epochs` epochs (0: never) and after the last one."""


def make_watchers(
    config: PretrainConfig,
    resolved: Resolved,
    held: Source,
    labelled: LabelledData | None,
    folder: RunFolder | None,
) -> list[Watcher]:
    """Return the watchers that a config asks for; held-out images that can't be read are recorded.

    Args:
        config: of the run.
        resolved: how images are prepared, and the processes.
        held: held-out images; may be empty.
        labelled: images to probe on; None probes nothing.
        folder: where the main process records; None on the others.
    """
    images = replace(resolved.images, crop_pct=1.0)
    device, ratio, p = resolved.world.device, config.mask_ratio, config.patch_size
    batches, bad = [], []
    dataset = EvalDataset(Split(held), images, config.max_pixels)
    for batch, pixels in each_batch(dataset, device, SHOWN, workers=0):
        bad += batch.bad
        if len(batch):
            batches.append(held_out(held, batch, pixels, ratio, config.seed, p, config.min_valid))
    batches = [entry for entry in batches if len(entry[0])]
    if folder is not None:
        folder.record_bad(bad)
    found: list[Watcher] = [HoldoutWatcher(batches, resolved, config.picture_epochs, folder)]
    if labelled is not None:
        found.append(ProbeWatcher(labelled, resolved, config.probe.epochs, config.max_pixels))
    return found
