"""Images to measure on: one centre crop of each, or the whole image."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from fcmae.data.resize import Valid
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
    """

    split: Split
    images: Preprocessing
    max_pixels: int = MAX_PIXELS

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
        return Sample(crop.pixels, index, valid=crop.valid, target=target, geometry=geometry)


@dataclass(frozen=True)
class View:
    """A whole image, perhaps resized, that is read a window at a time where its format allows it.

    Attributes:
        size: (height, width) in pixels.
        geometry: of the whole image.
        read: maps top, left, height and width to that window.
        how: images are prepared.
    """

    size: tuple[int, int]
    geometry: Geometry
    read: Callable[[int, int, int, int], Crop]
    how: Preprocessing

    def prepared(
        self, top: int, left: int, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Valid | None]:
        """Return a window (1, C, H, W), normalised on the device, and which of its pixels count."""
        pixels, valid = self.read(top, left, height, width)
        counts = None if valid is None else torch.from_numpy(valid)[None]
        image = torch.from_numpy(np.ascontiguousarray(pixels))[None]
        return prepared(image, self.how, device, counts), valid


@dataclass
class WholeDataset(EvalDataset):
    """Whole images, by index, with labels of their own size. They differ in size, so a batch has
    one.

    Args:
        split, images, max_pixels: see `EvalDataset`.
        short_side: resize images to this shorter side, in pixels; None leaves them.
        covers: whether images smaller than `images.img_size` are enlarged to cover it.
    """

    short_side: int | None = None
    covers: bool = True

    def batch_size(self, most: int) -> int:
        return 1

    def read(self, index: int) -> Sample:
        view = self.view(index, parts=False)
        pixels, valid = view.read(0, 0, *view.size)
        target = self.split.target(index, view.geometry)
        return Sample(pixels, index, valid=valid, target=target, geometry=view.geometry)

    def view(self, index: int, parts: bool = True) -> View:
        """Return an image to be read in windows, or without `parts` at once.

        Raises:
            BadImage: it can't be read.
        """
        images = self.images
        opened = images.read(self.split.source, index, self.max_pixels, parts)
        width, height = opened.size
        scale = scale_to(self.short_side, opened.size)
        if self.covers:
            scale = covering(opened.size, images.img_size, scale)
        geometry = Geometry(opened.size, (0, 0, width, height))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        if opened.tiled and size == (height, width):

            def read(top: int, left: int, h: int, w: int) -> Crop:
                return opened.resized((left, top, w, h), (h, w))
        else:
            whole, valid = opened.resized(geometry.box, size, interpolation=images.interpolation)

            def read(top: int, left: int, h: int, w: int) -> Crop:
                inside = slice(top, top + h), slice(left, left + w)
                counts = None if valid is None else valid[inside]
                return Crop(whole[:, inside[0], inside[1]], counts)

        return View(size, geometry, read, images)


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

    Images that can't be read are skipped, and named in the batches' `bad`; a batch may be empty.

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
        images = batch.images
        yield batch, prepared(images, dataset.images, device, batch.valid) if len(batch) else images


def prepared(
    images: Tensor, how: Preprocessing, device: torch.device, valid: Tensor | None = None
) -> Tensor:
    """Return images (B, C, H, W) normalised on the device, channels last; see `normalise`."""
    normal = normalise(images, how.mean, how.std, device, valid)
    return normal.contiguous(memory_format=torch.channels_last)


def held_out(
    source: Source,
    batch: Batch,
    images_BCHW: Tensor,
    mask_ratio: float,
    seed: int,
    patch: int = PATCH,
    min_valid: float = MIN_VALID,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Held-out images with a patch that can be used, their masks (B, h, w), and which of their
    pixels count (B, H, W) as in training, None if all do. A mask depends on the image's key, its
    valid pixels and the seed alone.

    Args:
        source: the images.
        batch: some of them.
        images_BCHW: of the batch, normalised.
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
    seen = torch.tensor([bool(patches.any()) for patches in usable])
    drawn = torch.from_numpy(np.stack(masks))[seen]
    return images_BCHW[seen], drawn, None if valid is None else valid[seen]
