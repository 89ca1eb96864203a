"""How images become numbers: their size, and the mean and std that they are normalised with."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import center_box
from fcmae.data.bad import BadImage
from fcmae.data.decode import read_image
from fcmae.data.resize import Pixels
from fcmae.data.sample import as_float
from fcmae.data.sources import Source
from sparse.errors import InputError

MeanStd = tuple[list[float], list[float]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_PCT = 0.875
"""Part of an image that evaluation keeps, as timm's own ConvNeXt V2."""

MEASURED = 1024
"""Most images that a mean and std are measured on."""

LOOKED_AT = 32
"""Images by which to tell whether a mean and std are theirs."""

FAR_OFF = 5.0
"""Warn when the ratio of standard deviations, or the distance of means in such, exceeds this."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """How images become numbers.

    Attributes:
        img_size: (height, width) in pixels.
        mean: of each channel, in units of the full range 0 to 1.
        std: as mean.
        crop_pct: part of the resized image's side that evaluation keeps, from its centre.
        interpolation: bicubic or bilinear.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = CROP_PCT
    interpolation: str = "bicubic"


def imagenet_mean_std(in_chans: int) -> MeanStd:
    """Return ImageNet's numbers; for other than 3 channels, their average for each channel."""
    if in_chans == 3:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    return [sum(IMAGENET_MEAN) / 3] * in_chans, [sum(IMAGENET_STD) / 3] * in_chans


def default_preprocessing(in_chans: int) -> Preprocessing:
    """Return 224 px and ImageNet's mean and std; for other than 3 channels, their averages."""
    mean, std = (tuple(round(v, 4) for v in values) for values in imagenet_mean_std(in_chans))
    return Preprocessing((224, 224), mean, std)


def resolve_mean_std(
    config: Any, img_size: tuple[int, int], source: Source, named: Mapping[str, MeanStd]
) -> MeanStd:
    """Return the mean and std that a training config asks for.

    Args:
        config: `augment.mean` and `augment.std` are numbers, `imagenet`, `data` or in `named`.
        img_size: (height, width) of the crops that `data` is measured on.
        source: the training images, read only where `data` is named.
        named: what else has a name.

    Raises:
        InputError: no image can be read.
    """

    def measure() -> MeanStd:
        found = measure_mean_std(
            source, img_size, config.in_chans, seed=config.seed, max_pixels=config.max_pixels
        )
        _log.info("measured mean %s and std %s", *([round(v, 4) for v in m] for m in found))
        return found

    known: dict[str, Callable[[], MeanStd]] = {
        "imagenet": lambda: imagenet_mean_std(config.in_chans),
        "data": measure,
    }
    asked = (config.augment.mean, config.augment.std)
    found = {
        name: named[name] if name in named else known[name]()
        for name in {value for value in asked if isinstance(value, str)}
    }
    mean, std = (
        found[value][place] if isinstance(value, str) else [float(v) for v in value]
        for place, value in enumerate(asked)
    )
    return mean, std


def measure_mean_std(
    source: Source,
    img_size: tuple[int, int],
    in_chans: int = 3,
    sample: int = MEASURED,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> MeanStd:
    """Return each channel's mean and deviation over centre crops, in units of [0, 1].

    At most `sample` images are read, chosen by hash.

    Raises:
        InputError: none of them can be read.
    """
    count, total, squares = 0, np.zeros(in_chans), np.zeros(in_chans)
    order = np.argsort(rng.bits(seed, rng.SAMPLE, 0, np.arange(len(source))), kind="stable")
    reason = "no images"
    for index in np.sort(order[:sample]).tolist():
        try:
            image = center_crop(source, index, img_size, in_chans, max_pixels)
        except BadImage as error:
            reason = f"{source.name(index)!r}: {error.reason}"
            continue
        pixels = as_float(image).reshape(in_chans, -1).astype(np.float64)
        count += pixels.shape[1]
        total += pixels.sum(axis=1)
        squares += np.square(pixels).sum(axis=1)
    if not count:
        raise InputError(f"mean and std can't be measured, no image can be read ({reason})")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def center_crop(
    source: Source, index: int, img_size: tuple[int, int], in_chans: int, max_pixels: int
) -> Pixels:
    """The largest centre crop of an image, (in_chans, H, W).

    Raises:
        BadImage: it can't be read.
    """
    image = read_image(source.open(index), in_chans, max_pixels)
    return image.resized(center_box(*image.size, img_size), img_size)


def warn_if_far_off(
    config: Any,
    img_size: tuple[int, int],
    source: Source,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Warn where mean and std are of other images than these: little is learnt from what is then
    all nearly the same number, or far from zero."""
    try:
        found = measure_mean_std(
            source, img_size, config.in_chans, LOOKED_AT, config.seed, config.max_pixels
        )
    except InputError:  # none of them can be read: the run will report it
        return
    shifts = [(m - given) / s for m, given, s in zip(found[0], mean, std, strict=True)]
    spreads = [measured / given for measured, given in zip(found[1], std, strict=True)]
    if min(spreads) < 1 / FAR_OFF or max(spreads) > FAR_OFF or max(map(abs, shifts)) > FAR_OFF:
        _log.warning(
            "the images have mean %s and std %s, but are normalised with %s and %s: give "
            "--augment.mean data --augment.std data",
            *([round(float(value), 4) for value in values] for values in (*found, mean, std)),
        )
