"""Resizing a part of an image in bounded memory, with antialiased interpolation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Pixels = npt.NDArray[np.uint8 | np.float32]
Valid = npt.NDArray[np.bool_]
"""(H, W), True where a pixel counts."""
Corners = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, before the EXIF orientation."""

_STRIP_BYTES = 4 * 2**20


@dataclass
class Raster:
    """Pixels as stored, before orientation; uint8 in [0, 255], or float32.

    Attributes:
        width, height: in pixels.
        bounded: whether float values lie in [0, 1] and are clipped to it.
        rows: maps corners to that part of the image, (rows, columns, bands).
        scale: how many of the file's pixels one pixel spans along each side.
        valid: maps corners to which pixels count there; None if all of the image do.
    """

    width: int
    height: int
    bounded: bool
    rows: Callable[[int, int, int, int], Pixels]
    scale: int = 1
    valid: Callable[[int, int, int, int], Valid] | None = None


def to_unit(pixels: npt.NDArray[Any]) -> Pixels:
    """Return uint8 unchanged, other unsigned integers in [0, 1], and all else as float32."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "u":
        return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    with np.errstate(over="ignore"):  # too large values become infinite, which is refused
        return pixels.astype(np.float32)


def as_float(image: Pixels) -> npt.NDArray[np.float32]:
    """Return pixels in units of [0, 1]: uint8 divided by 255, float32 unchanged."""
    values = image.astype(np.float32, copy=False)
    return values / np.float32(255) if image.dtype == np.uint8 else values


def strips(raster: Raster, box: Corners, upright: bool = False) -> Iterator[Pixels]:
    """Yield a box by rows (`upright`: columns), megabytes at a time."""
    left, top, right, bottom = box
    start, stop, across = (left, right, bottom - top) if upright else (top, bottom, right - left)
    step = max(1, _STRIP_BYTES // (4 * across))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        part = (first, top, last, bottom) if upright else (left, first, right, last)
        yield raster.rows(*part)


def resize_valid(
    raster: Raster,
    box: Corners,
    img_size: tuple[int, int],
    interpolation: str,
    valid: Valid | None,
) -> tuple[Pixels, Valid | None]:
    """Return a box as `resize` does, and which of its pixels count (H, W), None if all do, given
    which of the stored ones in the box do.

    Invalid pixels have no weight in the filter (normalised convolution, Knutsson and Westin, 1993),
    so what is stored there changes nothing. A pixel counts if half of the filter's weight does;
    the others are 0.
    """
    if valid is None or valid.all():
        return resize(raster, box, img_size, interpolation), None
    left, top, right, bottom = box
    if (bottom - top, right - left) == img_size:
        part = raster.rows(*box)
        return np.where(valid, part.transpose(2, 0, 1), part.dtype.type(0)), valid

    def within(x1: int, y1: int, x2: int, y2: int) -> Valid:
        return valid[y1 - top : y2 - top, x1 - left : x2 - left, None]

    total, first, count = np.zeros(1), top, max(int(valid.sum()), 1)
    for strip in strips(raster, box):
        counted = within(left, first, right, first + len(strip))
        total = total + np.where(counted, strip, 0).sum((0, 1), dtype=np.float64)
        first += len(strip)
    dtype, mean = strip.dtype, (total / count).astype(np.float32)

    def centred(*corners: int) -> Pixels:
        return np.where(within(*corners), raster.rows(*corners) - mean, np.float32(0))

    def counts(*corners: int) -> Pixels:
        return within(*corners).astype(np.float32)

    weight = resize(replace(raster, rows=counts), box, img_size, interpolation)
    kept = weight >= 0.5
    summed = resize(replace(raster, rows=centred), box, img_size, interpolation)
    image = summed / np.where(kept, weight, 1) + mean[:, None, None]
    image = image.round().clip(0, 255) if dtype == np.uint8 else image
    return np.where(kept, image, 0).astype(dtype), kept[0]


def resize(raster: Raster, box: Corners, img_size: tuple[int, int], interpolation: str) -> Pixels:
    """Return a box of the raster as (bands, H, W), resized by an antialiased filter.

    `interpolation` is bicubic or bilinear.

    Up to rounding, pixels equal those of Pillow 13, so the filter runs along the rows first, or
    along the columns if the height shrinks by much more than the width. (The order matters, since
    8-bit values are clipped in between.) The first pass processes a strip at a time: there is never
    a second copy of a large image in memory.
    """
    height, width = img_size
    lost_height, lost_width = box[3] - box[1] - height, box[2] - box[0] - width
    upright = lost_height > max(0, 2 * lost_width)
    if not upright and 4 * (box[2] - box[0]) * (box[3] - box[1]) <= _STRIP_BYTES:
        part = raster.rows(*box)  # both passes in one call, which saves a third
        return _interpolate(part, height, width, interpolation).transpose(2, 0, 1)
    resized = []
    for part in strips(raster, box, upright):
        rows, columns = (height, part.shape[1]) if upright else (len(part), width)
        resized.append(_interpolate(part, rows, columns, interpolation))
    whole = np.concatenate(resized, axis=1 if upright else 0)
    return _interpolate(whole, height, width, interpolation).transpose(2, 0, 1)


def _interpolate(pixels_HWC: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    if width == pixels_HWC.shape[1] == 1:  # torch (2.14) resizes a single column wrongly
        return _interpolate(np.repeat(pixels_HWC, 2, axis=1), height, 2, interpolation)[:, :1]
    image = torch.from_numpy(np.require(pixels_HWC, requirements="W")).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(height, width), mode=interpolation, antialias=True)
    resized: Pixels = image[0].permute(1, 2, 0).numpy()
    return resized
