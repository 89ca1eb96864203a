"""Labelled images to train on: random crops, and what else changes them.

Everything random is a function of (seed, epoch, index), so that workers, processes and resumes
change nothing. Crops and flips are those of pretraining, with the semantics of timm's; RandAugment,
colour jitter and random erasing are timm's own, which draw from global streams: those are seeded
for each sample and put back after.

RandAugment and colour jitter work on 8-bit images of 1 or 3 channels. Deeper images, and those
of other channel counts, are cropped, flipped and erased alone.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch.utils.data import Dataset

from fcmae import rng
from fcmae.data.augment import Geometry, crop_box, flips
from fcmae.data.decode import read_image
from fcmae.data.labelled import Split
from fcmae.data.loader import read_or_replace
from fcmae.data.order import Key
from fcmae.data.resize import Pixels
from fcmae.data.sample import Sample
from fcmae.data.statistics import Preprocessing
from finetune.config import FinetuneAugmentConfig
from sparse.errors import InputError

_ERASE = 1
"""Counter of the draw that decides whether a sample is erased; 0 seeds the global streams."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global streams of Python, numpy and torch's CPU, and put them back at the end."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - what timm draws from
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])


class TrainDataset(Dataset[Sample]):
    """Random crops of the training images with their labels, by (epoch, index).

    Args:
        split: the training images.
        images: size of the crops, and mean and std; what is erased is filled with noise of this
            distribution.
        augment: crops, flips and what else changes the images.
        seed: what everything random depends on, with epoch and index.
        max_pixels: images with more pixels count as unreadable.
    """

    def __init__(
        self,
        split: Split,
        images: Preprocessing,
        augment: FinetuneAugmentConfig,
        seed: int,
        max_pixels: int,
    ) -> None:
        self.split, self.images, self.augment = split, images, augment
        self.seed, self.max_pixels = seed, max_pixels
        self._mean, self._std = (
            np.array(values, np.float32)[:, None, None] for values in (images.mean, images.std)
        )
        self._erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self._recolour = None
        if len(images.mean) in (1, 3):
            self._recolour = recolouring(augment, images.img_size, images.mean)

    def __len__(self) -> int:
        return len(self.split.source)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample; an image that can't be read is replaced, the same way in every run."""
        epoch, index = key
        sample = read_or_replace(
            self.split.source, index, self.seed, lambda place: self._make(epoch, index, place)
        )
        sample.bad = [(self.split.prefix + name, reason) for name, reason in sample.bad]
        return sample

    def _make(self, epoch: int, index: int, candidate: int) -> Sample:
        augment, split = self.augment, self.split
        opened = read_image(split.source.open(candidate), len(self.images.mean), self.max_pixels)
        scale, ratio = augment.crop_scale, augment.crop_ratio
        box = crop_box(
            self.seed, epoch, index, *opened.size, (scale[0], scale[1]), (ratio[0], ratio[1])
        )
        across, down = flips(self.seed, epoch, index, augment.hflip, augment.vflip)
        image = opened.resized(
            box, self.images.img_size, across, down, augment.fast_decode, augment.interpolation
        )
        recolour = self._recolour if image.dtype == np.uint8 else None
        draw = rng.uniform(self.seed, rng.AUGMENT, epoch, index, _ERASE)[0]
        erase = draw < augment.random_erasing
        if recolour or erase:
            with seeded(rng.seed_for(self.seed, rng.AUGMENT, epoch, index)):
                image = _recoloured(image, recolour) if recolour else image
                image = self._erased(image) if erase else image
        target = None if split.labels is None else int(split.labels[candidate])
        geometry = Geometry(opened.size, box, across, down)
        return Sample(image, candidate, target=target, geometry=geometry)

    def _erased(self, image_CHW: Pixels) -> Pixels:
        """Erase a box. timm fills it with noise in normalised units; ours are those of pixels."""
        unit = np.float32(255 if image_CHW.dtype == np.uint8 else 1)
        normal = (image_CHW / unit - self._mean) / self._std
        erased = self._erase(torch.from_numpy(normal)).numpy() * self._std + self._mean
        if image_CHW.dtype != np.uint8:
            return np.asarray(erased, np.float32)
        return (erased * unit).round().clip(0, 255).astype(np.uint8)


def recolouring(
    augment: FinetuneAugmentConfig, img_size: tuple[int, int], mean: Sequence[float]
) -> Any | None:
    """Return timm's RandAugment or colour jitter as a function of a Pillow image, None without.

    Raises:
        InputError: timm does not understand the RandAugment string.
    """
    if not augment.randaugment and not augment.color_jitter:
        return None
    try:
        _, recolour, _ = create_transform(
            (3, *img_size),
            is_training=True,
            auto_augment=augment.randaugment or None,
            color_jitter=augment.color_jitter,
            interpolation=augment.interpolation,
            mean=tuple(mean) if len(mean) == 3 else (sum(mean) / len(mean),) * 3,
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"augment.randaugment {augment.randaugment!r} is not understood by timm: write it as "
            "in rand-m9-mstd0.5-inc1"
        ) from error
    return recolour


def _recoloured(image_CHW: npt.NDArray[Any], recolour: Any) -> Pixels:
    """Apply a function of Pillow images to 8-bit pixels; grey ones go through RGB."""
    grey = len(image_CHW) == 1
    picture = Image.fromarray(image_CHW[0] if grey else image_CHW.transpose(1, 2, 0))
    done = recolour(picture.convert("RGB")).convert("L" if grey else "RGB")
    pixels = np.array(done)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))
