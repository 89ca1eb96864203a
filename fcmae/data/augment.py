"""Crops and flips of an image: pure functions of (seed, epoch, index)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fcmae import rng
from fcmae.config.training import AugmentBase

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels, after the EXIF orientation."""

_TRIES = 10


@dataclass(frozen=True)
class Geometry:
    """How a crop was cut from an image, so that masks and boxes can follow it.

    Attributes:
        size: (width, height) of the image in pixels, after the EXIF orientation.
        box: the crop before it was resized.
        flip_h, flip_v: whether the crop was then mirrored left to right, and top to bottom.
        shape: (height, width) that the crop was resized to, if that is less than the sample's: the
            rest of the sample, at the right and the bottom, is padding.
    """

    size: tuple[int, int]
    box: Box
    flip_h: bool = False
    flip_v: bool = False
    shape: tuple[int, int] | None = None


def random_geometry(
    seed: int, epoch: int, index: int, size: tuple[int, int], augment: AugmentBase
) -> Geometry:
    """Draw the crop and flips of a training sample from an image of (width, height) pixels.

    Each flip that `augment` allows has probability 1/2.
    """
    across, down = rng.uniform(seed, rng.FLIP, epoch, index, np.arange(2)).tolist()
    box = crop_box(seed, epoch, index, size, augment)
    return Geometry(size, box, augment.hflip and across < 0.5, augment.vflip and down < 0.5)


def jittered_geometry(
    seed: int,
    epoch: int,
    index: int,
    size: tuple[int, int],
    img_size: tuple[int, int],
    augment: AugmentBase,
    scale: float,
    jitter: Sequence[float],
    pad: bool = False,
) -> Geometry:
    """Draw a crop of (H, W) pixels from an image resized by a random factor, and its flips.

    The factor is `scale` times a number between both of `jitter`, log-uniform. With `pad`, an image
    that does not fill the crop is padded; else the factor is large enough for it to do so. Flips as
    in `random_geometry`.
    """
    (width, height), (h, w) = size, img_size
    draw, left, top = rng.uniform(seed, rng.CROP, epoch, index, np.arange(3)).tolist()
    wanted = scale * jitter[0] * (jitter[1] / jitter[0]) ** draw
    factor = wanted if pad else covering(size, img_size, wanted)
    box_w, box_h = (
        min(whole, max(1, round(side / factor))) for whole, side in ((width, w), (height, h))
    )
    box = int(left * (width - box_w + 1)), int(top * (height - box_h + 1)), box_w, box_h
    shape = max(1, round(min(h, height * factor))), max(1, round(min(w, width * factor)))
    padded = shape if pad and shape != (h, w) else None
    return replace(random_geometry(seed, epoch, index, size, augment), box=box, shape=padded)


def scale_to(short_side: int | None, size: tuple[int, int]) -> float:
    """Return the factor that gives an image of (width, height) this shorter side; 1 for None."""
    return 1.0 if short_side is None else short_side / min(size)


def covering(size: tuple[int, int], img_size: tuple[int, int], scale: float) -> float:
    """Return a factor for an image of (width, height): `scale`, or the smallest one at which the
    image is as large as (H, W) pixels."""
    return max(scale, img_size[1] / size[0], img_size[0] / size[1])


def crop_box(seed: int, epoch: int, index: int, size: tuple[int, int], augment: AugmentBase) -> Box:
    """Draw a box as RandomResizedCrop does, from an image of (width, height) pixels.

    Its share of the area is uniform in `crop_scale`, its width / height log-uniform in
    `crop_ratio`. If none of ten draws fits in the image, the box is the largest centred one whose
    width / height lies within `crop_ratio`.
    """
    (width, height), scale, ratio = size, augment.crop_scale, augment.crop_ratio
    draws = rng.uniform(seed, rng.CROP, epoch, index, np.arange(4 * _TRIES)).reshape(_TRIES, 4)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, aspect_draw, left_draw, top_draw in draws.tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1)), w, h
    return _centered(width, height, min(max(width / height, ratio[0]), ratio[1]))


def center_box(width: int, height: int, img_size: tuple[int, int], crop_pct: float = 1.0) -> Box:
    """Return the largest centred box with the shape of (H, W) pixels, times crop_pct.

    Resized to (H, W), it is the source resized to cover that size (enlarged by 1 / crop_pct) and
    then cropped at its centre.
    """
    _, _, w, h = _centered(width, height, img_size[1] / img_size[0])
    w, h = max(1, round(w * crop_pct)), max(1, round(h * crop_pct))
    return (width - w) // 2, (height - h) // 2, w, h


def _centered(width: int, height: int, aspect: float) -> Box:
    """Return the largest centred box of this width / height that is at least one pixel wide."""
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    return (width - w) // 2, (height - h) // 2, w, h
