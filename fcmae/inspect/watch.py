"""What pretraining looks at between epochs; none of it changes what is learnt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcmae.config.pretraining import PretrainConfig
from fcmae.config.values import MAX_PIXELS
from fcmae.data.files import FileList
from fcmae.data.labelled import LabelledData
from fcmae.data.loader import HoldoutSet, normalise
from fcmae.inspect import reconstructions as pictures
from fcmae.inspect.diversity import block_diversity
from fcmae.inspect.features import Backbone
from fcmae.inspect.probes import NothingToRead, labelled_features, measure
from fcmae.model.fcmae import FCMAE
from fcmae.train.processes import World
from fcmae.train.run_folder import RunFolder
from fcmae.train.task import Settings, Watcher
from fcmae.weights.read import Preprocessing

_log = logging.getLogger(__name__)

PICTURES_SHOWN = 8
NEIGHBOURS = (5, 20)


class HoldoutWatcher:
    """Loss and reconstructions of held-out images, and the diversity of every block's channels.

    Args:
        batches: normalised images with their masks, always the same.
        folder: where the main process records; None on the others.
    """

    def __init__(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        settings: Settings,
        epochs: int,
        folder: RunFolder | None,
    ) -> None:
        self.epochs = epochs if batches else 0
        self._batches, self._settings, self._folder = batches, settings, folder

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        total, count, shown = 0.0, 0, None
        for images, masks in self._batches:
            columns, loss = pictures.reconstruct_batch(
                model, images, masks, self._settings.mean, self._settings.std
            )
            total, count = total + loss * len(images), count + len(images)
            shown = columns if shown is None else shown
        if self._folder is not None and shown is not None:
            grid = pictures.grid([column[:PICTURES_SHOWN] for column in shown])
            self._folder.picture("reconstructions", step, grid)
        blocks = block_diversity(model.encoder, (images for images, _ in self._batches))
        spread = {f"diversity/{name}": block["diversity"] for name, block in blocks.items()}
        return {"holdout_loss": total / count, **spread}


class ProbeWatcher:
    """Top-1 in percent of nearest neighbours and a linear classifier on frozen features.

    Args:
        data: labelled pictures.
        settings: how images are prepared.
        batch_size: images at a time on this process, which shares the pictures with the others.
        max_pixels: larger pictures are not read.
    """

    def __init__(
        self,
        data: LabelledData,
        settings: Settings,
        epochs: int,
        batch_size: int,
        world: World,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.epochs, self._max_pixels = epochs, max_pixels
        self._data, self._batch_size, self._world = data, batch_size, world
        self._images = Preprocessing(settings.img_size, tuple(settings.mean), tuple(settings.std))
        self._workers = settings.workers
        self._told = not world.is_main

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        was_training = model.training
        model.eval()
        try:
            features, bad = labelled_features(
                Backbone(model.encoder, self._images, "this run"), self._data, self._batch_size,
                self._workers, self._world, stop, max_pixels=self._max_pixels,
            )  # fmt: skip
        except NothingToRead as error:
            _log.warning("the features were not probed: %s", error)
            return {}
        finally:
            model.train(was_training)
        if bad and not self._told:
            self._told = True
            _log.warning(
                "%d labelled pictures can't be read and are left out of the probe, as %s: %s",
                len(bad), *bad[0],
            )  # fmt: skip
        # Fitted on every process: the threads and the sums are the same, so all log the same.
        with torch.autocast(self._world.device.type, enabled=False):
            scores = measure(features, NEIGHBOURS, self._world.device)
        return {f"probe_{name}": score["top1"] for name, score in scores.items()}


def make_watchers(
    config: PretrainConfig, settings: Settings, held: FileList, labelled: LabelledData | None,
    world: World, folder: RunFolder | None,
) -> list[Watcher]:  # fmt: skip
    """All that a config asks for; held-out images that can't be read are recorded.

    Args:
        held: held-out files, maybe none.
        labelled: what to probe on; None probes nothing.
    """
    dataset = HoldoutSet(
        held, settings.img_size, config.in_chans, config.mask_ratio, config.seed, config.max_pixels
    )
    batches = [
        (normalise(batch.images, settings.mean, settings.std, world.device), batch.masks)
        for batch in dataset.batches(PICTURES_SHOWN)
    ]
    if folder is not None:
        folder.record_bad(dataset.bad)
    found: list[Watcher] = [HoldoutWatcher(batches, settings, config.picture_epochs, folder)]
    if labelled is not None:
        share = config.batch_size // (world.size * config.accumulate)
        found.append(
            ProbeWatcher(labelled, settings, config.probe.epochs, share, world, config.max_pixels)
        )
    return found
