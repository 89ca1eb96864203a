"""Labelled images to train on: random crops, and further augmentation.

Everything random is a function of (seed, epoch, index), so workers, processes and resumes change
nothing. Crops and flips are those of pretraining, with the semantics of timm's. RandAugment, colour
jitter and random erasing are timm's, which draw from global streams: these are seeded for each
sample and restored after it.

RandAugment and colour jitter apply to 8-bit images of 1 or 3 channels. Other images are only
cropped, flipped and erased.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform

from fcmae import rng
from fcmae.data.loader import CropDataset
from fcmae.data.resize import Pixels
from fcmae.data.sample import Sample
from finetune.config import FinetuneAugmentConfig, FinetuneConfig
from sparse.errors import InputError

_ERASE = 1
"""Counter of the draw that decides whether a sample is erased; 0 seeds the global streams."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global streams of Python, numpy and torch's CPU, and restore them at the end."""
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


@dataclass
class TrainDataset(CropDataset):
    """Random crops of the training images with their labels, by (epoch, index).

    Erased boxes are filled with noise of the mean and std of `images`.
    """

    config: FinetuneConfig

    def __post_init__(self) -> None:
        images, augment = self.images, self.config.augment
        self._mean, self._std = (
            np.array(values, np.float32)[:, None, None] for values in (images.mean, images.std)
        )
        self._erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self._recolour = None
        if len(images.mean) in (1, 3):
            self._recolour = recolouring(augment, images.img_size, images.mean)

    def crop(self, epoch: int, index: int, place: int) -> Sample:
        sample, seed = super().crop(epoch, index, place), self.config.seed
        image = sample.image
        assert image is not None
        recolour = self._recolour if image.dtype == np.uint8 else None
        draw = rng.uniform(seed, rng.AUGMENT, epoch, index, _ERASE)[0]
        erase = draw < self.config.augment.random_erasing
        if recolour or erase:
            with seeded(rng.seed_for(seed, rng.AUGMENT, epoch, index)):
                image = _recoloured(image, recolour) if recolour else image
                image = self._erased(image) if erase else image
        return replace(sample, image=image)

    def _erased(self, image_CHW: Pixels) -> Pixels:
        """Erase a box. timm fills it with noise in normalised units, which become pixels here."""
        unit = np.float32(255 if image_CHW.dtype == np.uint8 else 1)
        normal = (image_CHW / unit - self._mean) / self._std
        erased = self._erase(torch.from_numpy(normal)).numpy() * self._std + self._mean
        if image_CHW.dtype != np.uint8:
            return np.asarray(erased, np.float32)
        return (erased * unit).round().clip(0, 255).astype(np.uint8)


def recolouring(
    augment: FinetuneAugmentConfig, img_size: tuple[int, int], mean: Sequence[float]
) -> Any | None:
    """Return timm's RandAugment or colour jitter as a function of a Pillow image; None if off.

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
            f"augment.randaugment {augment.randaugment!r} is unknown to timm: try rand-m9-mstd0.5"
        ) from error
    return recolour


def _recoloured(image_CHW: npt.NDArray[Any], recolour: Any) -> Pixels:
    """Apply a function of Pillow images to 8-bit pixels; grey ones go through RGB."""
    grey = len(image_CHW) == 1
    image = Image.fromarray(image_CHW[0] if grey else image_CHW.transpose(1, 2, 0))
    pixels = np.array(recolour(image.convert("RGB")).convert("L" if grey else "RGB"))
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))
