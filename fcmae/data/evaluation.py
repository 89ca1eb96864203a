"""Images to measure on: one centre crop of each."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.console import tracked
from fcmae.data.decode import BadImage
from fcmae.data.labelled import Split
from fcmae.data.loader import make_loader
from fcmae.data.sample import Batch, Sample, normalise
from fcmae.data.sources import Source, key_hash
from fcmae.data.statistics import Preprocessing, center_crop
from fcmae.model.mask import grid_of, random_mask
from fcmae.train.processes import ALONE, World

SHOWN = 20
"""Largest number of images that are reported one by one."""

_log = logging.getLogger(__name__)


@dataclass
class EvalDataset(Dataset[Sample]):
    """Centre crops, by index.

    Args:
        split: the images, with labels or without.
        images: size and interpolation of the crops, and the part of an image that they cover.
        max_pixels: images with more pixels count as unreadable.
    """

    split: Split
    images: Preprocessing
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.split.source)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample, without an image if it can't be read."""
        try:
            image, geometry = center_crop(self.split.source, index, self.images, self.max_pixels)
        except BadImage as error:
            return Sample(None, index, bad=[(self.split.name(index), str(error))])
        return Sample(image, index, target=self.split.target(index), geometry=geometry)


def report_skipped(bad: Sequence[tuple[str, str]], most: int = SHOWN) -> None:
    """Log the (name, reason) of images that can't be read, the first `most` of them."""
    warn_of_first([f"skipped, since it can't be read: {': '.join(entry)}" for entry in bad], most)


def warn_of_first(lines: Sequence[str], most: int = SHOWN) -> None:
    """Log the first lines as warnings, and the number of the others."""
    for line in lines[:most]:
        _log.warning("%s", line)
    if len(lines) > most:
        _log.warning("and %d more", len(lines) - most)


def batches_of(n: int, batch_size: int, rank: int = 0, size: int = 1) -> list[list[int]]:
    """Return the batches of one process; each sample is on one process once.

    All processes get the same number of batches; the last ones may be smaller or empty.
    """
    own, most = range(rank, n, size), math.ceil(n / size)
    return [list(own[start : start + batch_size]) for start in range(0, most, batch_size)]


def each_batch(
    split: Split,
    images: Preprocessing,
    device: torch.device,
    batch_size: int,
    workers: int,
    world: World = ALONE,
    max_pixels: int = MAX_PIXELS,
    shown: str | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with their images (B, C, H, W) normalised on the device, channels last.

    Images that can't be read are skipped, and named in the batches' `bad`; a batch may be empty.

    Args:
        split: the images to read; this process reads its share.
        images: how images are prepared.
        device: where the model is.
        batch_size: images at a time.
        workers: processes that read.
        world: the processes that share the work.
        max_pixels: images with more pixels count as unreadable.
        shown: the name of a progress bar on terminals; None shows none.
    """
    dataset = EvalDataset(split, images, max_pixels)
    batches = batches_of(len(dataset), batch_size, world.rank, world.size)
    loaded = make_loader(dataset, batches, workers, device.type == "cuda")
    for batch in tracked(loaded, len(batches), shown):
        pixels = batch.images
        if len(batch):
            pixels = normalise(pixels, images.mean, images.std, device)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        yield batch, pixels


def held_out_masks(
    source: Source, indices: Tensor, img_size: tuple[int, int], mask_ratio: float, seed: int
) -> Tensor:
    """Masks (B, h, w) of held-out images: each depends on the image's key and the seed alone.

    Args:
        source: the images.
        indices: which of them, (B,).
        img_size: (height, width) of the crops.
        mask_ratio: share of the patches that a mask hides.
        seed: of the run.
    """
    keys = [key_hash(source, index) for index in indices.tolist()]
    grid, stream = grid_of(img_size), rng.HOLDOUT_MASK
    masks = [random_mask(seed, 0, key, grid, mask_ratio, stream) for key in keys]
    return torch.from_numpy(np.stack(masks))
