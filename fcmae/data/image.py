"""An image and crops of it, whatever its format; the readers make them.

A reader gives an `OpenedImage`: the size from the header, and a function that decodes at least the
part asked for. What all formats share is here: which bands become channels, which pixels count,
orientation, windows, and errors of one line.
"""

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import Box
from fcmae.data.resize import Corners, Pixels, Raster, Valid, as_float, resize_valid, to_unit
from fcmae.data.sources import PathOrFile

DECODER_SHARE = {"WEBP": 0.3, "JPEG2000": 0.25, "AVIF": 0.5, "progressive JPEG": 0.5}
"""Share of max_pixels for formats whose decoders need several times the memory of the pixels: 10 to
24 bytes per pixel measured, against 2 to 6. By default no image then needs more than 1.5 GB."""

Look = Callable[[int, int, int, int], Any]
"""Maps corners to the values (rows, columns, bands) there, or to which pixels count there."""

Turn = tuple[bool, bool, bool]
"""Whether to swap rows and columns, then mirror left-right, then top-bottom."""


def turn_of(orientation: int | None) -> Turn:
    """Return what the EXIF orientation asks for. Of the values 1 to 8, the last four swap rows and
    columns."""
    return orientation in (5, 6, 7, 8), orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)


class BadImage(Exception):
    """An image that can't be used; the message is one line."""


class FewValid(BadImage):
    """A part of an image in which too few pixels count."""


class MissingReader(BadImage):
    """An image whose format needs a package that is not installed."""


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        in_chans: channels of the crops.
        max_pixels: the largest part of an image to decode, in pixels: all of it, unless its format
            stores it in tiles.
        bands: of the image, from 1, which become the channels; empty takes all.
        nodata: which pixels have no value: `none`; `auto`, those that the file marks, and NaN;
            `alpha`, transparent ones too; or those with this number.
        clip: the smallest and the largest value of each channel in units of [0, 1], or None.
    """

    in_chans: int
    max_pixels: int = MAX_PIXELS
    bands: tuple[int, ...] = ()
    nodata: str | float = "auto"
    clip: tuple[Sequence[float], Sequence[float]] | None = None

    def select(self, count: int, alpha: bool = False) -> list[int]:
        """Return the positions, from 0, of the bands of an image that has `count` of them.

        Without `bands` all are taken, and an `alpha` at the end is dropped if it is one too many. A
        single band is repeated for three channels later.

        Raises:
            BadImage: it lacks a band, or their number is not `in_chans`.
        """
        if self.bands:
            if max(self.bands) > count:
                raise BadImage(
                    f"bands {[*self.bands]} must be at most {count}, the number there are"
                )
            return [band - 1 for band in self.bands]
        if count in (self.in_chans, self.in_chans + alpha):
            return [*range(self.in_chans)]
        if count - alpha == 1 and self.in_chans == 3:
            return [0]
        choice = ",".join(map(str, range(1, self.in_chans + 1)))
        bands = f", or --bands '[{choice}]'" if count > self.in_chans else ""
        what = f"{count} bands, not {self.in_chans}"
        raise BadImage(f"{what}: pretrain and finetune take --in_chans {count}{bands}")


class Crop(NamedTuple):
    """A part of an image: its pixels (C, H, W), uint8 in [0, 255] or float32, and which of them
    count (H, W), None if all do."""

    pixels: Pixels
    valid: Valid | None

    def values(self) -> npt.NDArray[np.float32]:
        """Return the pixels that count (C, N), in units of [0, 1]."""
        pixels = as_float(self.pixels)
        return pixels.reshape(len(pixels), -1) if self.valid is None else pixels[:, self.valid]


def valid_in(values_HWC: npt.NDArray[Any], nodata: float | None) -> Valid:
    """Return which pixels (H, W) have a value: finite ones other than `nodata`.

    In 8 bits a pixel has none if all bands are `nodata`, often 0, which is also a dark channel; in
    deeper images if any band is.
    """
    valid = np.ones(values_HWC.shape[:2], np.bool_)
    if values_HWC.dtype.kind == "f":
        valid &= np.isfinite(to_unit(values_HWC)).all(-1)
    if nodata is not None:
        missing = values_HWC == nodata
        valid &= ~(missing.all(-1) if values_HWC.dtype == np.uint8 else missing.any(-1))
    return valid


def make_raster(
    size: tuple[int, int],
    dtype: npt.DTypeLike,
    values: Look,
    how: Reading,
    nodata: float | None = None,
    masks: Sequence[Look] = (),
    scale: int = 1,
) -> Raster:
    """Return the pixels of an image.

    Args:
        size: (width, height) in pixels.
        dtype: of the values.
        values: the values as stored, in the bands asked for.
        how: the image is read.
        nodata: the number that the file marks as no value.
        masks: further sources of which pixels count.
        scale: see `Raster`.
    """
    kind, ignored = np.dtype(dtype).kind, how.nodata == "none"
    number = nodata if isinstance(how.nodata, str) else how.nodata

    def valid(*corners: int) -> Valid:
        found = [mask(*corners) for mask in masks]
        if number is not None or kind == "f":
            found.append(valid_in(values(*corners), number))
        return np.logical_and.reduce(found)

    look = valid if not ignored and (masks or number is not None or kind == "f") else None
    return Raster(*size, kind == "u", lambda *box: to_unit(values(*box)), scale, look)


def within(
    corners: Corners,
    size: tuple[int, int],
    part_HWC: npt.NDArray[Any],
    how: Reading,
    nodata: float | None = None,
    masks: list[Valid] | None = None,
) -> Raster:
    """Return an image of (width, height) of which only the part within the corners is read."""
    left, top, _, _ = corners

    def look(array: npt.NDArray[Any]) -> Look:
        return lambda x1, y1, x2, y2: array[y1 - top : y2 - top, x1 - left : x2 - left]

    looks = [look(mask) for mask in masks or ()]
    return make_raster(size, part_HWC.dtype, look(part_HWC), how, nodata, looks)


@dataclass(frozen=True)
class OpenedImage:
    """An image with a valid header: its `size` after the EXIF orientation, and crops of it.

    What is stored in tiles, and a JPEG, is decoded for each crop; other formats when they are
    opened.

    Args:
        stored_size: (width, height) in pixels, before the EXIF orientation.
        how: it is read.
        decode: maps a factor and corners to the pixels at 1 / scale of their size, where scale is 1
            or at most the factor, at least those within the corners.
        kind: its format, bands and bit depth, in words.
        turn: what the EXIF orientation asks for.
        tiled: whether only what a crop touches is decoded.
        part: where this is in the image, if it is a part of it.
    """

    stored_size: tuple[int, int]
    how: Reading
    decode: Callable[[int, Corners], Raster]
    kind: str
    turn: Turn = (False, False, False)
    tiled: bool = False
    part: Box | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels, after the EXIF orientation."""
        return self.whole_size if self.part is None else self.part[2:]

    @property
    def whole_size(self) -> tuple[int, int]:
        """Return `size` of the whole image, if this is a part of it."""
        return self.stored_size[::-1] if self.turn[0] else self.stored_size

    def check_whole(self, max_pixels: int) -> None:
        """Raise BadImage for an image in tiles that is too large to be read as a whole."""
        width, height = self.size
        if self.tiled and width * height > max_pixels:
            raise BadImage(
                f"{width}x{height} pixels are over max_pixels {max_pixels}: read parts of it, with "
                "--window 1024 (pretrain) or --tile 512 (predict)"
            )

    def window(self, box: Box) -> "OpenedImage":
        """Return this part as an image of its own."""
        return replace(self, part=box)

    def resized(
        self,
        box: Box,
        img_size: tuple[int, int],
        flip_h: bool = False,
        flip_v: bool = False,
        fast: bool = False,
        interpolation: str = "bicubic",
        least_valid: float = 0.0,
    ) -> Crop:
        """Return the crop `box`, resized (antialiased) and flipped, as (in_chans, H, W).

        Pixels that do not count are 0. `interpolation` is bicubic or bilinear. With `fast`, a JPEG
        much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size, which is several times
        faster on large photographs and changes pixel values slightly.

        Raises:
            BadImage: the pixels can't be decoded, or are not finite with `nodata: none`.
            FewValid: a smaller share of them than `least_valid` counts.
        """
        swap, mirror_h, mirror_v = self.turn
        left, top, width, height = box
        if self.part is not None:
            left, top = left + self.part[0], top + self.part[1]
        if mirror_h:
            left = self.whole_size[0] - left - width
        if mirror_v:
            top = self.whole_size[1] - top - height
        if swap:
            left, top, width, height = top, left, height, width
            img_size = img_size[::-1]
        shrink = min(width // img_size[1], height // img_size[0])
        raster = self.decode(shrink if fast else 1, (left, top, left + width, top + height))
        scale = raster.scale
        right = min(math.ceil((left + width) / scale), raster.width)
        bottom = min(math.ceil((top + height) / scale), raster.height)
        corners = (left // scale, top // scale, right, bottom)
        counts = None if raster.valid is None else raster.valid(*corners)
        if counts is not None and counts.mean() < least_valid:
            raise FewValid("too few of its pixels have a value")
        image, valid = resize_valid(raster, corners, img_size, interpolation, counts)
        if image.dtype != np.uint8:
            image = image.clip(0, 1) if raster.bounded else image
            if not np.isfinite(image).all():
                raise BadImage("some values are not finite, and nodata is none")
        rows, columns = (
            slice(None, None, -1 if across else 1)
            for across in (flip_v != mirror_v, flip_h != mirror_h)
        )
        image = (image.transpose(0, 2, 1) if swap else image)[:, rows, columns]
        if valid is not None:
            valid = np.ascontiguousarray((valid.T if swap else valid)[rows, columns])
        return Crop(self._clipped(self._in_channels(image), valid), valid)

    def _in_channels(self, image_CHW: Pixels) -> Pixels:
        """Repeat a single band `in_chans` times, with an opaque alpha for 2 and 4 channels."""
        channels = self.how.in_chans
        if len(image_CHW) == channels:
            return np.ascontiguousarray(image_CHW)
        image = np.repeat(image_CHW, channels, axis=0)
        if channels in (2, 4):
            image[-1] = 255 if image.dtype == np.uint8 else 1
        return image

    def _clipped(self, image_CHW: Pixels, valid: Valid | None) -> Pixels:
        if self.how.clip is None:
            return image_CHW
        unit = 255 if image_CHW.dtype == np.uint8 else 1
        low, high = (np.array(v).reshape(-1, 1, 1) * unit for v in self.how.clip)
        image = image_CHW.clip(low, high)
        image = image.round() if unit == 255 else image
        return np.where(True if valid is None else valid, image, 0).astype(image_CHW.dtype)


@contextmanager
def reading(max_pixels: int) -> Iterator[None]:
    """Turn any error of a broken file into BadImage, and limit Pillow to `max_pixels` meanwhile."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"more pixels than max_pixels {max_pixels}") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Exception as error:  # decoders raise nearly anything, MemoryError included
        cause = error.__cause__ or error  # of GDAL's errors
        text = (isinstance(error, OSError) and error.strerror) or str(cause)
        raise BadImage(" ".join(f"{type(error).__name__}: {text}".split())) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def opened(path_or_file: PathOrFile) -> BinaryIO:
    """Return the file of a path, or the file itself.

    Raises:
        BadImage: a path that is no regular file.
        OSError: it can't be opened.
    """
    if not isinstance(path_or_file, str | bytes):
        return path_or_file
    if not stat.S_ISREG(os.stat(path_or_file).st_mode):  # opening a pipe would wait for its writer
        raise BadImage("not a regular file")
    return open(path_or_file, "rb")


def check_dtype(dtype: npt.DTypeLike) -> None:
    """Raise BadImage for values that are not numbers of at most 32 bits or floating point."""
    dtype = np.dtype(dtype)
    if dtype.kind != "f" and not (dtype.kind in "ui" and dtype.itemsize <= 4):
        raise BadImage(f"values of type {dtype}: use integers of at most 32 bits or floating point")


def check_pixels(width: int, height: int, max_pixels: int, form: str = "") -> None:
    """Raise BadImage for more pixels than allowed, or none."""
    share = DECODER_SHARE.get(form, 1)
    if width * height > share * max_pixels:
        part = f"{share:.0%} of max_pixels for {form}, " if share < 1 else ""
        raise BadImage(f"{width}x{height} pixels are over {part}max_pixels {max_pixels}")
    if width < 1 or height < 1:
        raise BadImage(f"no pixels: {width}x{height}")
