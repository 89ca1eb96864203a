"""Preprocessing: the size of images, and the mean and std that normalise them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcmae import rng
from fcmae.data.augment import Geometry, center_box
from fcmae.data.decode import BadImage, read_image
from fcmae.data.resize import Pixels
from fcmae.data.sample import as_float
from fcmae.data.sources import Source
from sparse.errors import InputError

MeanStd = tuple[Sequence[float], Sequence[float]]

CROP_PCT = 0.875
"""Part of an image that evaluation keeps, as in timm's ConvNeXt V2."""

MEASURED = 1024
"""Largest number of images to measure mean and std on."""

LOOKED_AT = 32
"""Number of images to compare with a given mean and std."""

FAR_OFF = 5.0
"""Warn if the ratio of standard deviations, or the distance of means in std, exceeds this."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model.

    Attributes:
        img_size: (height, width) in pixels.
        mean, std: of each channel, in units of the full range 0 to 1.
        crop_pct: part of the resized image's side that evaluation keeps, from its centre.
        interpolation: bicubic or bilinear.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = CROP_PCT
    interpolation: str = "bicubic"


def imagenet_mean_std(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and std; for other than 3 channels, their averages."""
    if in_chans == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.449,) * in_chans, (0.226,) * in_chans


def default_preprocessing(in_chans: int) -> Preprocessing:
    """Return 224 px and ImageNet's mean and std; for other than 3 channels, their averages."""
    return Preprocessing((224, 224), *imagenet_mean_std(in_chans))


def resolve_mean_std(
    config: Any, img_size: tuple[int, int], source: Source, named: Mapping[str, MeanStd]
) -> MeanStd:
    """Return the mean and std that a training config asks for.

    Args:
        config: `augment.mean` and `augment.std` are numbers, `imagenet`, `data` or in `named`.
        img_size: (height, width) of the crops that `data` is measured on.
        source: the training images, read only for `data`.
        named: further values by name.

    Raises:
        InputError: no image can be read.
    """
    asked = (config.augment.mean, config.augment.std)
    known = {"imagenet": imagenet_mean_std(config.in_chans), **named}
    if "data" in asked:
        known["data"] = measure_mean_std(config, img_size, source)
        _log.info("measured mean %s and std %s", *np.round(known["data"], 4).tolist())
    mean, std = (
        known[value][place] if isinstance(value, str) else [float(v) for v in value]
        for place, value in enumerate(asked)
    )
    return mean, std


def measure_mean_std(
    config: Any, img_size: tuple[int, int], source: Source, sample: int = MEASURED
) -> MeanStd:
    """Return each channel's mean and standard deviation over centre crops, in units of [0, 1].

    Args:
        config: has `in_chans`, `max_pixels` and `seed`, which chooses the images.
        img_size: (height, width) of the crops.
        source: the images.
        sample: largest number of images to read.

    Raises:
        InputError: none of them can be read.
    """
    channels = config.in_chans
    images = Preprocessing(img_size, (0.0,) * channels, (1.0,) * channels, crop_pct=1.0)
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    order = np.argsort(rng.bits(config.seed, rng.SAMPLE, 0, np.arange(len(source))), kind="stable")
    reason = "no images"
    for index in np.sort(order[:sample]).tolist():
        try:
            image, _ = center_crop(source, index, images, config.max_pixels)
        except BadImage as error:
            reason = f"{source.name(index)!r}: {error}"
            continue
        pixels = as_float(image).reshape(channels, -1).astype(np.float64)
        count += pixels.shape[1]
        total += pixels.sum(axis=1)
        squares += np.square(pixels).sum(axis=1)
    if not count:
        raise InputError(f"mean and std can't be measured, no image can be read ({reason})")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def center_crop(
    source: Source, index: int, images: Preprocessing, max_pixels: int
) -> tuple[Pixels, Geometry]:
    """Return an image's centre crop (C, H, W) as evaluation sees it, and how it was cut.

    Raises:
        BadImage: it can't be read.
    """
    opened = read_image(source.open(index), len(images.mean), max_pixels)
    box = center_box(*opened.size, images.img_size, images.crop_pct)
    pixels = opened.resized(box, images.img_size, interpolation=images.interpolation)
    return pixels, Geometry(opened.size, box)


def warn_if_far_off(config: Any, images: Preprocessing, source: Source) -> None:
    """Warn if mean and std are far from those of the images: little is learned from values that are
    nearly equal or far from zero."""
    try:
        found = np.array(measure_mean_std(config, images.img_size, source, LOOKED_AT))
    except InputError:  # none can be read: the run will report it
        return
    given = np.array([images.mean, images.std])
    shifts, spreads = np.abs(found[0] - given[0]) / given[1], found[1] / given[1]
    if spreads.min() < 1 / FAR_OFF or max(*spreads, *shifts) > FAR_OFF:
        _log.warning(
            "images have mean %s, std %s, not %s, %s: use --augment.mean data --augment.std data",
            *np.round([*found, *given], 4).tolist(),
        )
