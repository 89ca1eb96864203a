"""Reading one image: from a file's bytes to a crop of it, resized, in the channels asked for.

Rules for every file (documented in docs/data.md): the content decides the format, never the name;
the first frame or page is used; the EXIF orientation is applied; colour profiles are ignored; alpha
is dropped unless `in_chans` asks for it (2 or 4). 8-bit images stay uint8; deeper ones become
float32: 16-bit values are divided by 65535, floating-point values are kept. Pillow reads the high
byte of 16-bit colour, an error of at most 1/257. `.npy` arrays, (H, W) or (H, W, C), may have any
number of channels.
"""

import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image, UnidentifiedImageError

from fcmae.data.augment import Box
from fcmae.data.resize import Pixels, Raster, resize, strips, to_unit
from fcmae.data.sources import PathOrFile

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
"""The formats that Pillow may try. Others run programs (EPS starts Ghostscript)."""

DECODER_SHARE = {"WEBP": 0.3, "JPEG2000": 0.25, "AVIF": 0.5, "progressive JPEG": 0.5}
"""Share of max_pixels for formats whose decoders need several times the memory of the pixels: 10 to
24 bytes per pixel measured, against 2 to 6. By default no image then needs more than 1.5 GB."""

_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


Turn = tuple[bool, bool, bool]
"""Whether to swap rows and columns, then mirror left-right, then top-bottom."""


class BadImage(Exception):
    """An image that can't be used; the message is one line."""


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
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        raise BadImage(" ".join(f"{type(error).__name__}: {text}".split())) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@dataclass(frozen=True)
class OpenedImage:
    """An image with a valid header: its `size` after the EXIF orientation, and crops of it.

    A JPEG is decoded for each crop, other formats when they are opened.

    Args:
        stored_size: (width, height) in pixels, before the EXIF orientation.
        turn: what the EXIF orientation asks for.
        in_chans: channels of the crops.
        decode: maps a factor to the pixels at 1 / scale of their size, where scale is 1 or at most
            the factor.
    """

    stored_size: tuple[int, int]
    turn: Turn
    in_chans: int
    decode: Callable[[int], Raster]

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels, after the EXIF orientation."""
        return self.stored_size[::-1] if self.turn[0] else self.stored_size

    def resized(
        self,
        box: Box,
        img_size: tuple[int, int],
        flip_h: bool = False,
        flip_v: bool = False,
        fast: bool = False,
        interpolation: str = "bicubic",
    ) -> Pixels:
        """Return the crop `box`, resized (antialiased) and flipped, as (in_chans, H, W).

        `interpolation` is bicubic or bilinear. With `fast`, a JPEG much larger than needed is
        decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster on large photographs
        and changes pixel values slightly.

        Raises:
            BadImage: the pixels can't be decoded.
        """
        swap, mirror_h, mirror_v = self.turn
        left, top, width, height = box
        if mirror_h:
            left = self.size[0] - left - width
        if mirror_v:
            top = self.size[1] - top - height
        if swap:
            left, top, width, height = top, left, height, width
            img_size = img_size[::-1]
        shrink = min(width // img_size[1], height // img_size[0])
        raster = self.decode(shrink if fast else 1)
        scale = raster.scale
        right = min(math.ceil((left + width) / scale), raster.width)
        bottom = min(math.ceil((top + height) / scale), raster.height)
        corners = (left // scale, top // scale, right, bottom)
        image = resize(raster, corners, img_size, interpolation)
        if raster.bounded and image.dtype != np.uint8:
            image = image.clip(0, 1)
        if swap:
            image = image.transpose(0, 2, 1)
        across, down = flip_h != mirror_h, flip_v != mirror_v
        return self._in_channels(image[:, :: -1 if down else 1, :: -1 if across else 1])

    def _in_channels(self, image_CHW: Pixels) -> Pixels:
        """Repeat a single band `in_chans` times, with an opaque alpha for 2 and 4 channels."""
        if len(image_CHW) == self.in_chans:
            return np.ascontiguousarray(image_CHW)
        image = np.repeat(image_CHW, self.in_chans, axis=0)
        if self.in_chans in (2, 4):
            image[-1] = 255 if image.dtype == np.uint8 else 1
        return image


def read_image(path_or_file: PathOrFile, in_chans: int, max_pixels: int) -> OpenedImage:
    """Open an image and check its header.

    While a file is read, Pillow's limit on pixels and the warnings filter are changed, which other
    threads of this process see.

    Args:
        path_or_file: a path, or a seekable binary file at its start, which is closed at the end.
        in_chans: channels of the crops.
        max_pixels: the largest allowed width times height.

    Raises:
        BadImage: the file is missing, broken, too large, or does not have the right channels.
    """
    with reading(max_pixels), opened(path_or_file) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"\x93NUMPY":
            return _read_array(file, in_chans, max_pixels)
        return _read_with_pillow(file, in_chans, max_pixels)


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


def _read_with_pillow(file: BinaryIO, in_chans: int, max_pixels: int) -> OpenedImage:
    image = Image.open(file, formats=FORMATS)
    form = "progressive JPEG" if "progressive" in image.info else str(image.format)
    _check_pixels(*image.size, max_pixels, form)
    if in_chans > 4:
        raise BadImage(f"{image.format}: at most 4 channels can be read, not {in_chans}: use .npy")
    sixteen_bits = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM")
    if not (image.mode in (*_GREY, *_COLOUR, "F") or sixteen_bits):
        raise BadImage(f"pixels of mode {image.mode} have no defined range")
    if image.format in ("JPEG", "MPO"):
        turn = _turn(image)
        file.seek(0)
        decode = partial(_decode_jpeg, file.read(), image.size, in_chans)
        return OpenedImage(image.size, turn, in_chans, decode)
    image.load()
    return _decoded(_pillow_raster(image, in_chans), in_chans, _turn(image))


def _decode_jpeg(content: bytes, size: tuple[int, int], in_chans: int, shrink: int) -> Raster:
    """See `OpenedImage`: a JPEG can be decoded at 1/2, 1/4 and 1/8 of its (width, height)."""
    scale = next(scale for scale in (8, 4, 2, 1) if scale <= max(shrink, 1))
    with reading(size[0] * size[1]):
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
        if scale > 1:
            image.draft(None, (size[0] // scale, size[1] // scale))
        image.load()
        return _pillow_raster(image, in_chans, scale)


def _pillow_raster(image: Image.Image, in_chans: int, scale: int = 1) -> Raster:
    """Convert a Pillow image part by part, without a second copy of a large one."""
    modes: tuple[str, ...] = ()
    if image.mode in _GREY + _COLOUR:
        grey = in_chans == 1 or (in_chans == 3 and image.mode in _GREY)
        modes = {2: ("RGBA", "LA"), 4: ("RGBA",)}.get(in_chans, ("L" if grey else "RGB",))
    if in_chans in (1, 3):
        image.info.pop("transparency", None)  # or Pillow warns that it is dropped

    def rows(left: int, top: int, right: int, bottom: int) -> Pixels:
        part = image.crop((left, top, right, bottom))
        if part.mode in ("La", "RGBa"):  # colours multiplied by alpha
            part = part.convert(part.mode.upper())
        for mode in modes:
            part = part.convert(mode)
        pixels = np.asarray(part)
        if part.mode == "I":  # Pillow's 16-bit PGM
            pixels = pixels.astype(np.uint16)
        return to_unit(pixels.reshape(bottom - top, right - left, -1))

    return Raster(*image.size, image.mode != "F", rows, scale)


def _read_array(file: BinaryIO, in_chans: int, max_pixels: int) -> OpenedImage:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f".npy format {version} is not 1.0 or 2.0")
    old = version == (1, 0)
    shape, _, dtype = (npy.read_array_header_1_0 if old else npy.read_array_header_2_0)(file)
    if dtype.kind != "f" and (dtype.kind, dtype.itemsize) not in (("u", 1), ("u", 2)):
        raise BadImage(f"array of {dtype}: use uint8, uint16 or float")
    if len(shape) not in (2, 3) or min(shape) < 1 or (*shape, 1)[2] != in_chans:
        hint = ""  # the smallest side is most likely the channel axis
        if len(shape) == 3 and shape[2] == min(shape):
            hint = f": give --in_chans {shape[2]}"
        elif len(shape) == 3 and shape[0] == min(shape):
            hint = ": channels come last"
        raise BadImage(f"array of shape {shape} is not (H, W, {in_chans}){hint}")
    height, width = shape[:2]
    _check_pixels(width, height, max_pixels)
    file.seek(0)
    pixels = np.load(file, allow_pickle=False).reshape(height, width, in_chans)

    def rows(left: int, top: int, right: int, bottom: int) -> Pixels:
        return to_unit(pixels[top:bottom, left:right])

    return _decoded(Raster(width, height, dtype.kind == "u", rows), in_chans)


def _check_pixels(width: int, height: int, max_pixels: int, form: str = "") -> None:
    share = DECODER_SHARE.get(form, 1)
    if width * height > share * max_pixels:
        part = f"{share:.0%} of max_pixels for {form}, " if share < 1 else ""
        raise BadImage(f"{width}x{height} pixels are over {part}max_pixels {max_pixels}")
    if width < 1 or height < 1:
        raise BadImage(f"no pixels: {width}x{height}")


def _decoded(raster: Raster, in_chans: int, turn: Turn = (False, False, False)) -> OpenedImage:
    """Return a decoded image.

    NaN and infinity anywhere are refused, so that either all crops of a file are bad or none.
    """
    size = raster.width, raster.height
    if not (raster.bounded or all(np.isfinite(s).all() for s in strips(raster, (0, 0, *size)))):
        raise BadImage("some values are not finite")
    return OpenedImage(size, turn, in_chans, lambda _: raster)


def _turn(image: Image.Image) -> Turn:
    """Return the turns of the EXIF orientation; none if the EXIF data can't be read.

    Of the values 1 to 8, the last four swap rows and columns.
    """
    orientation = None
    with suppress(BadImage), reading(image.width * image.height):
        orientation = image.getexif().get(0x0112)
    return orientation in (5, 6, 7, 8), orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
