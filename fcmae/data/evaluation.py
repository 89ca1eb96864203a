"""Images to measure on: one centre crop of each, or the whole image."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.console import tracked
from fcmae.data.augment import Geometry, covering, scale_to
from fcmae.data.image import BadImage, Crop
from fcmae.data.labelled import Split
from fcmae.data.loader import make_loader
from fcmae.data.resize import as_float
from fcmae.data.sample import Batch, Sample, normalise
from fcmae.data.sources import Source, key_hash
from fcmae.data.statistics import Preprocessing, center_crop
from fcmae.model.mask import MIN_VALID, grid_of, pixels_of, random_mask, usable_patches
from fcmae.train.processes import ALONE, World
from sparse.sizes import PATCH

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
        raw: leave the images as they are read: `each_batch` does not normalise them.
    """

    split: Split
    images: Preprocessing
    max_pixels: int = MAX_PIXELS
    raw: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.split.source)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample, without an image if it can't be read."""
        try:
            return self.read(index)
        except BadImage as error:
            return Sample(None, index, bad=[(self.split.name(index), str(error))])

    def batch_size(self, most: int) -> int:
        """Return how many samples can be stacked, at most `most`."""
        return most

    def read(self, index: int) -> Sample:
        """Read an image.

        Raises:
            BadImage: it, or its label, can't be read.
        """
        crop, geometry = center_crop(self.split.source, index, self.images, self.max_pixels)
        target = self.split.target(index, geometry, self.images.img_size)
        return self.sample(crop, index, target, geometry)

    def sample(self, crop: Crop, index: int, target: Any, geometry: Geometry) -> Sample:
        """Return a sample; without normalisation to come, pixels that do not count are the mean."""
        pixels, valid = crop
        if self.raw and valid is not None:
            mean = np.array(self.images.mean, np.float32).reshape(-1, 1, 1)
            pixels, valid = np.where(valid, as_float(pixels), mean), None
        return Sample(pixels, index, valid=valid, target=target, geometry=geometry)


@dataclass
class WholeDataset(EvalDataset):
    """Whole images, by index, with labels of their own size. They differ in size, so a batch has
    one.

    Args:
        split, images, max_pixels, raw: see `EvalDataset`.
        short_side: resize images to this shorter side, in pixels; None leaves them.
        covers: whether images smaller than `images.img_size` are enlarged to cover it.
    """

    short_side: int | None = None
    covers: bool = True

    def batch_size(self, most: int) -> int:
        return 1

    def read(self, index: int) -> Sample:
        split, images = self.split, self.images
        opened = images.read(split.source, index, self.max_pixels)
        width, height = opened.size
        scale = scale_to(self.short_side, opened.size)
        if self.covers:
            scale = covering(opened.size, images.img_size, scale)
        geometry = Geometry(opened.size, (0, 0, width, height))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        crop = opened.resized(geometry.box, size, interpolation=images.interpolation)
        return self.sample(crop, index, split.target(index, geometry), geometry)


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
    dataset: EvalDataset,
    device: torch.device,
    batch_size: int,
    workers: int,
    world: World = ALONE,
    shown: str | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with their images (B, C, H, W) normalised on the device, channels last.

    Those of a raw `WholeDataset` stay as they are. Images that can't be read are skipped, and named
    in the batches' `bad`; a batch may be empty.

    Args:
        dataset: the images to read; this process reads its share.
        device: where the model is.
        batch_size: images at a time.
        workers: processes that read.
        world: the processes that share the work.
        shown: the name of a progress bar on terminals; None shows none.
    """
    batches = batches_of(len(dataset), batch_size, world.rank, world.size)
    loaded = make_loader(dataset, batches, workers, device.type == "cuda")
    for batch in tracked(loaded, len(batches), shown):
        as_read = dataset.raw or not len(batch)
        yield (
            batch,
            batch.images
            if as_read
            else prepared(batch.images, dataset.images, device, batch.valid),
        )


def prepared(
    images: Tensor, how: Preprocessing, device: torch.device, valid: Tensor | None = None
) -> Tensor:
    """Return images (B, C, H, W) normalised on the device, channels last; see `normalise`."""
    normal = normalise(images, how.mean, how.std, device, valid)
    return normal.contiguous(memory_format=torch.channels_last)


def held_out_masks(
    source: Source,
    batch: Batch,
    mask_ratio: float,
    seed: int,
    patch: int = PATCH,
    min_valid: float = MIN_VALID,
) -> tuple[Tensor, Tensor | None]:
    """Masks (B, h, w) of held-out images, and which of their pixels count (B, H, W) as in training,
    None if all do. A mask depends on the image's key, its valid pixels and the seed alone.

    Args:
        source: the images.
        batch: some of them.
        mask_ratio: share of the patches that a mask hides.
        seed: of the run.
        patch: side of a patch in pixels.
        min_valid: share of the pixels of a patch that have to count.
    """
    _, _, height, width = batch.images.shape
    grid, stream = grid_of((height, width), patch), rng.HOLDOUT_MASK
    usable, valid = [np.ones(grid, np.bool_)] * len(batch), batch.valid
    if valid is not None:
        usable = [usable_patches(pixels, patch, min_valid) for pixels in valid.numpy()]
        valid = valid & torch.from_numpy(np.stack([pixels_of(each, patch) for each in usable]))
    masks = [
        random_mask(seed, 0, key_hash(source, index), grid, mask_ratio, stream, patches)
        for index, patches in zip(batch.indices.tolist(), usable, strict=True)
    ]
    return torch.from_numpy(np.stack(masks)), valid
