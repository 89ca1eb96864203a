"""Labelled pictures to train on: random crops, and what else changes them.

Everything random is a function of (seed, epoch, index), so that workers, processes and resumes
change nothing. Crops and flips are those of pretraining, with the semantics of timm's; RandAugment,
colour jitter and random erasing are timm's own, which draw from global streams: those are seeded
for each sample and put back after.

RandAugment and colour jitter work on 8-bit pictures of 1 or 3 channels. Deeper pictures, and those
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
from fcmae.data.augment import crop_box, flips
from fcmae.data.decode import Pixels, read_picture
from fcmae.data.evaluation import LabelledSample
from fcmae.data.files import FileList
from fcmae.data.labelled import Labels
from fcmae.data.loader import read_or_replace
from fcmae.data.order import Key
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


class TrainDataset(Dataset[LabelledSample]):
    """Random crops of the training files with their classes, by (epoch, index).

    Args:
        files, labels: what there is; `prefix` goes before the names of bad files.
        img_size: (height, width) of the crops.
        mean, std: per channel, in units of the full range 0 to 1; what is erased is filled with
            noise of this distribution.
    """

    def __init__(
        self,
        files: FileList,
        labels: Labels,
        img_size: tuple[int, int],
        in_chans: int,
        augment: FinetuneAugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        max_pixels: int,
        prefix: str = "",
    ) -> None:
        self.files, self.labels = files, labels
        self.img_size, self.in_chans = img_size, in_chans
        self.augment = augment
        self.seed = seed
        self.max_pixels = max_pixels
        self.prefix = prefix
        self._mean = np.array(mean, np.float32)[:, None, None]
        self._std = np.array(std, np.float32)[:, None, None]
        self._erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self._recolour = recolouring(augment, img_size, mean) if in_chans in (1, 3) else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> LabelledSample:
        """Return the sample; a file that can't be read is replaced, the same one in every run.

        Raises:
            RunError: neither the file nor any of its replacements could be read.
        """
        epoch, index = key
        image, read, bad = read_or_replace(
            self.files, index, self.seed, lambda candidate: self._make(epoch, index, candidate)
        )
        named = [(self.prefix + name, reason) for name, reason in bad]
        return LabelledSample(image, int(self.labels[read]), read, named)

    def _make(self, epoch: int, index: int, candidate: int) -> Pixels:
        augment = self.augment
        picture = read_picture(self.files.path(candidate), self.in_chans, self.max_pixels)
        scale, ratio = augment.crop_scale, augment.crop_ratio
        box = crop_box(
            self.seed, epoch, index, *picture.size, (scale[0], scale[1]), (ratio[0], ratio[1])
        )
        across, down = flips(self.seed, epoch, index, augment.hflip, augment.vflip)
        image = picture.resized(
            box, self.img_size, across, down, augment.fast_decode, augment.interpolation
        )
        recolour = self._recolour if image.dtype == np.uint8 else None
        draw = rng.uniform(self.seed, rng.AUGMENT, epoch, index, _ERASE)[0]
        erase = draw < augment.random_erasing
        if recolour or erase:
            with seeded(rng.seed_for(self.seed, rng.AUGMENT, epoch, index)):
                image = _recoloured(image, recolour) if recolour else image
                image = self._erased(image) if erase else image
        return image

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
