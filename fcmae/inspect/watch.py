"""What pretraining looks at between epochs; none of it changes what is learnt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fcmae.config.pretraining import PretrainConfig
from fcmae.data.evaluation import each_batch, held_out_masks
from fcmae.data.file_list import FileList
from fcmae.data.labelled import LabelledData, Split
from fcmae.inspect.diversity import block_diversity
from fcmae.inspect.probes import NothingToRead, labelled_features, measure
from fcmae.inspect.reconstructions import grid, reconstruct_batch
from fcmae.model.fcmae import FCMAE
from fcmae.train.run_folder import RunFolder
from fcmae.train.script import Resolved
from fcmae.weights.load import Backbone

_log = logging.getLogger(__name__)

SHOWN = 8
NEIGHBOURS = (5, 20)


class Watcher(Protocol):
    """Looks at the model every `epochs` epochs (0: never) and after the last one."""

    epochs: int

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Return what to log. May raise `Interrupted` when `stop()` turns true."""
        ...


class HoldoutWatcher:
    """Loss and reconstructions of held-out images, and the diversity of every block's channels.

    Args:
        batches: normalised images with their masks, always the same.
        resolved: how images are prepared.
        epochs: between two looks.
        folder: where the main process records; None on the others.
    """

    def __init__(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        resolved: Resolved,
        epochs: int,
        folder: RunFolder | None,
    ) -> None:
        self.epochs = epochs if batches else 0
        self._batches, self._images, self._folder = batches, resolved.images, folder

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        total, count, shown = 0.0, 0, None
        for images, masks in self._batches:
            columns, loss = reconstruct_batch(model, images, masks, self._images)
            total, count = total + loss * len(images), count + len(images)
            shown = columns if shown is None else shown
        if self._folder is not None and shown is not None:
            drawn = grid([column[:SHOWN] for column in shown])
            self._folder.trackers.image("reconstructions", drawn, step)
        blocks = block_diversity(model.encoder, (images for images, _ in self._batches))
        spread = {f"diversity/{name}": block["diversity"] for name, block in blocks.items()}
        return {"holdout_loss": total / count, **spread}


class ProbeWatcher:
    """Top-1 in percent of nearest neighbours and a linear classifier on frozen features.

    Args:
        data: labelled images.
        resolved: how images are prepared, and the processes, which share the images.
        epochs: between two looks.
        max_pixels: images with more pixels count as unreadable.
    """

    def __init__(
        self, data: LabelledData, resolved: Resolved, epochs: int, max_pixels: int
    ) -> None:
        self.epochs, self._max_pixels = epochs, max_pixels
        self._data, self._resolved = data, resolved
        self._reported = not resolved.world.is_main

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        resolved, was_training = self._resolved, model.training
        model.eval()
        try:
            features, bad = labelled_features(
                Backbone(model.encoder, resolved.images, "this run"), self._data, resolved.part,
                resolved.workers, resolved.world, stop, max_pixels=self._max_pixels,
            )  # fmt: skip
        except NothingToRead as error:
            _log.warning("the features were not probed: %s", error)
            return {}
        finally:
            model.train(was_training)
        if bad and not self._reported:
            self._reported = True
            _log.warning(
                "%d labelled images can't be read and are not probed, as %s: %s", len(bad), *bad[0]
            )
        # Fitted on every process: the threads and the sums are the same, so all log the same.
        device = resolved.world.device
        with torch.autocast(device.type, enabled=False):
            scores = measure(features, NEIGHBOURS, device)
        return {f"probe_{name}": score["top1"] for name, score in scores.items()}


def make_watchers(
    config: PretrainConfig,
    resolved: Resolved,
    held: FileList,
    labelled: LabelledData | None,
    folder: RunFolder | None,
) -> list[Watcher]:
    """All that a config asks for; held-out images that can't be read are recorded.

    Args:
        config: of the run.
        resolved: how images are prepared, and the processes.
        held: held-out images, maybe none.
        labelled: what to probe on; None probes nothing.
        folder: where the main process records; None on the others.
    """
    images = replace(resolved.images, crop_pct=1.0)
    device, size, ratio = resolved.world.device, images.img_size, config.mask_ratio
    batches, bad = [], []
    for batch, pixels in each_batch(
        Split(held), images, device, SHOWN, workers=0, max_pixels=config.max_pixels
    ):
        bad += batch.bad
        if len(batch):
            masks = held_out_masks(held, batch.indices, size, ratio, config.seed)
            batches.append((pixels, masks))
    if folder is not None:
        folder.record_bad(bad)
    found: list[Watcher] = [HoldoutWatcher(batches, resolved, config.picture_epochs, folder)]
    if labelled is not None:
        found.append(ProbeWatcher(labelled, resolved, config.probe.epochs, config.max_pixels))
    return found
