"""Preprocessing: the size of images, and the mean and std that normalise them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fcmae import rng
from fcmae.data.augment import Geometry, center_box
from fcmae.data.decode import read_image
from fcmae.data.image import BadImage, Crop, OpenedImage, Reading
from fcmae.data.sources import Source
from sparse.errors import InputError

MeanStd = tuple[Sequence[float], Sequence[float]]

CROP_PCT = 0.875
"""Part of an image that evaluation keeps, as in timm's ConvNeXt V2."""

MEASURED = 1024
"""Largest number of images to measure mean and std on."""

VALUES_EACH = 4096
"""Pixels of each image that percentiles are measured on, about."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model.

    Attributes:
        img_size: (height, width) in pixels.
        mean, std: of each channel, in units of the full range 0 to 1.
        crop_pct: part of the resized image's side that evaluation keeps, from its centre.
        interpolation: bicubic or bilinear.
        bands, nodata, clip: see `Reading`.
    """

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = CROP_PCT
    interpolation: str = "bicubic"
    bands: tuple[int, ...] = ()
    nodata: str | float = "auto"
    clip: MeanStd | None = None

    def recorded(self) -> dict[str, Any]:
        """Return what is special about reading images, to be stored; see `stored_reading`."""
        special = {"bands": [*self.bands], "nodata": self.nodata, "clip": self.clip}
        return {key: value for key, value in special.items() if value not in ([], "auto", None)}

    def read(self, source: Source, index: int, max_pixels: int, parts: bool = False) -> OpenedImage:
        """Open an image of a source; with `parts`, only parts of it will be read.

        Raises:
            BadImage: see `read_image`; or it is too large to be read as a whole.
        """
        how = Reading(len(self.mean), max_pixels, self.bands, self.nodata, self.clip)
        opened = read_image(source.open(index), how)
        opened = source.cut(index, opened) if isinstance(source, Cutting) else opened
        if not parts:
            opened.check_whole(max_pixels)
        return opened


@runtime_checkable
class Cutting(Protocol):
    """A source of parts of images."""

    def cut(self, index: int, opened: OpenedImage, /) -> OpenedImage:
        """Return the part of its opened image."""


def imagenet_mean_std(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and std; for other than 3 channels, their averages."""
    if in_chans == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.449,) * in_chans, (0.226,) * in_chans


def default_preprocessing(in_chans: int) -> Preprocessing:
    """Return 224 px and ImageNet's mean and std; for other than 3 channels, their averages."""
    return Preprocessing((224, 224), *imagenet_mean_std(in_chans))


def stored_reading(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Preprocessing` that `recorded`, or a config, has; others default."""
    clip = known.get("clip")
    return {
        "bands": tuple(known.get("bands") or ()),
        "nodata": known.get("nodata", "auto"),
        "clip": None if clip is None else (clip[0], clip[1]),
    }


def asked_reading(config: Any) -> Reading:
    """Return how a training config's images are read, without `augment.clip`, which is measured."""
    return Reading(config.in_chans, config.max_pixels, tuple(config.bands or ()), config.nodata)


def resolve_preprocessing(
    config: Any, img_size: tuple[int, int], source: Source, named: Mapping[str, MeanStd]
) -> Preprocessing:
    """Return how the images of a training config are prepared.

    Args:
        config: `augment.mean` and `augment.std` are numbers, `imagenet`, `data` or in `named`;
            `augment.clip` is a pair of percentiles or None.
        img_size: (height, width) of the crops that `data` and `clip` are measured on.
        source: the training images, read only for these.
        named: further values by name.

    Raises:
        InputError: no image can be read.
    """
    asked = (config.augment.mean, config.augment.std)
    known = {"imagenet": imagenet_mean_std(config.in_chans), **named}
    how = asked_reading(config)
    images = Preprocessing(
        img_size, (0.0,) * how.in_chans, (1.0,) * how.in_chans, bands=how.bands, nodata=how.nodata
    )
    if config.augment.clip is not None:
        low, high = measure_clip(config, images, source)
        images = replace(images, clip=(low, high))
        _log.info("values are clipped to %s and %s", *np.round([low, high], 4).tolist())
    if "data" in asked:
        known["data"] = measure_mean_std(config, images, source)
        _log.info("measured mean %s and std %s", *np.round(known["data"], 4).tolist())
    mean, std = (
        known[value][place] if isinstance(value, str) else [float(v) for v in value]
        for place, value in enumerate(asked)
    )
    return replace(images, mean=tuple(mean), std=tuple(std))


def measure_mean_std(
    config: Any, images: Preprocessing, source: Source, sample: int = MEASURED
) -> MeanStd:
    """Return each channel's mean and standard deviation over the pixels that count in centre crops,
    in units of [0, 1].

    Args:
        config: has `max_pixels` and `seed`, which chooses the images.
        images: size of the crops, and how they are read.
        source: the images.
        sample: largest number of images to read.

    Raises:
        InputError: none of them can be read.
    """
    count, total, squares = 0, np.zeros(len(images.mean)), np.zeros(len(images.mean))
    for values in _sampled(config, images, source, sample):
        pixels = values.astype(np.float64)
        count += pixels.shape[1]
        total += pixels.sum(axis=1)
        squares += np.square(pixels).sum(axis=1)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def measure_clip(config: Any, images: Preprocessing, source: Source) -> MeanStd:
    """Return the percentiles `config.augment.clip` of each channel's pixels that count, as
    `measure_mean_std` reads them."""
    parts = [
        values[:, :: max(1, values.shape[1] // VALUES_EACH)]
        for values in _sampled(config, images, source, MEASURED)
    ]
    low, high = np.percentile(np.concatenate(parts, axis=1), config.augment.clip, axis=1)
    return low.tolist(), high.tolist()


def sample_of(seed: int, n: int, most: int) -> list[int]:
    """Return at most so many of n images, ascending; the seed chooses."""
    order = np.argsort(rng.bits(seed, rng.SAMPLE, 0, np.arange(n)), kind="stable")
    chosen: list[int] = np.sort(order[:most]).tolist()
    return chosen


def _sampled(
    config: Any, images: Preprocessing, source: Source, sample: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the values (C, N) of pixels that count in centre crops of images chosen by the seed.

    Raises:
        InputError: there are none.
    """
    whole = replace(images, crop_pct=1.0)
    reason, found = "no images", False
    for index in sample_of(config.seed, len(source), sample):
        try:
            crop, _ = center_crop(source, index, whole, config.max_pixels)
        except BadImage as error:
            reason = f"{source.name(index)!r}: {error}"
            continue
        if (values := crop.values()).size:
            found = True
            yield values
        else:
            reason = f"{source.name(index)!r}: no pixel has a value, nodata is {images.nodata}"
    if not found:
        raise InputError(f"mean and std can't be measured, no image can be read ({reason})")


def center_crop(
    source: Source, index: int, images: Preprocessing, max_pixels: int
) -> tuple[Crop, Geometry]:
    """Return an image's centre crop (C, H, W) as evaluation sees it, and how it was cut.

    Raises:
        BadImage: it can't be read.
    """
    opened = images.read(source, index, max_pixels)
    box = center_box(*opened.size, images.img_size, images.crop_pct)
    crop = opened.resized(box, images.img_size, interpolation=images.interpolation)
    return crop, Geometry(opened.size, box)
