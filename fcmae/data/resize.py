"""Resizing a part of an image in bounded memory, with antialiased interpolation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Pixels = npt.NDArray[np.uint8 | np.float32]

_STRIP_BYTES = 4 * 2**20


@dataclass
class Raster:
    """Pixels as stored, before orientation; uint8 in [0, 255], or float32.

    Attributes:
        width, height: in pixels.
        bounded: whether float values lie in [0, 1] and are clipped to it.
        rows: maps (left, top, right, bottom) to that part of the image, (rows, columns, bands).
        scale: how many of the file's pixels one pixel spans along each side.
    """

    width: int
    height: int
    bounded: bool
    rows: Callable[[int, int, int, int], Pixels]
    scale: int = 1


def to_unit(pixels: npt.NDArray[Any]) -> Pixels:
    """Return uint8 unchanged, uint16 in [0, 1], and floating point as float32."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "u":
        return pixels.astype(np.float32) / np.float32(65535)
    with np.errstate(over="ignore"):  # too large values become infinite, which is refused
        return pixels.astype(np.float32)


def strips(
    raster: Raster, box: tuple[int, int, int, int], upright: bool = False
) -> Iterator[Pixels]:
    """Yield a box (left, top, right, bottom) by rows (`upright`: columns), megabytes at a time."""
    left, top, right, bottom = box
    start, stop, across = (left, right, bottom - top) if upright else (top, bottom, right - left)
    step = max(1, _STRIP_BYTES // (4 * across))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        part = (first, top, last, bottom) if upright else (left, first, right, last)
        yield raster.rows(*part)


def resize(
    raster: Raster, box: tuple[int, int, int, int], img_size: tuple[int, int], interpolation: str
) -> Pixels:
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
