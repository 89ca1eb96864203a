"""Reading one image: from a file's bytes to a crop of it, resized, in the channels asked for.

What holds for every file (docs/data.md says it to users): its content decides the format, never its
name; the first frame or page counts; EXIF orientation is applied; colour profiles are ignored;
alpha is dropped unless `in_chans` asks for it (2 or 4). 8-bit images stay uint8; deeper ones
become float32, 16 bits divided by 65535 and floating point as it is. Pillow reads 16-bit colour by
its high byte, which is within 1/257. `.npy` arrays, (H, W) or (H, W, C), serve any channel count.
"""

import io
import math
import os
import stat
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from fcmae.data.augment import Box
from fcmae.data.bad import BadImage, reading
from fcmae.data.resize import Pixels, Raster, resize, strips, to_unit
from fcmae.data.sources import PathOrFile

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
"""What Pillow may try. Named, since others run programs (EPS starts Ghostscript)."""

DECODER_SHARE = {"WEBP": 0.3, "JPEG2000": 0.25, "AVIF": 0.5, "progressive JPEG": 0.5}
"""Of max_pixels, for formats whose decoders take several times the memory of the pixels: measured
10 to 24 bytes a pixel, where others take 2 to 6. Nothing then takes more than 1.5 GB by default."""

_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
"""EXIF orientation → whether to swap rows and columns, then mirror left-right, then top-bottom."""


class _Array:
    """Pixels that are decoded already: (H, W, bands), uint8, uint16 or float."""

    def __init__(self, pixels_HWC: npt.NDArray[Any]) -> None:
        self.height, self.width = pixels_HWC.shape[:2]
        self.bounded = pixels_HWC.dtype.kind == "u"
        self._pixels = pixels_HWC

    def rows(self, left: int, top: int, right: int, bottom: int) -> Pixels:
        return to_unit(self._pixels[top:bottom, left:right])


class _Pil:
    """A Pillow image, converted part by part so that no second copy of a large one is needed."""

    def __init__(self, image: Image.Image, in_chans: int) -> None:
        self.width, self.height = image.size
        self.bounded = image.mode != "F"
        self._image = image
        self._modes: tuple[str, ...] = ()
        if image.mode in _GREY + _COLOUR:
            grey = in_chans == 1 or (in_chans == 3 and image.mode in _GREY)
            self._modes = {2: ("RGBA", "LA"), 4: ("RGBA",)}.get(in_chans, ("L" if grey else "RGB",))
        if in_chans in (1, 3):
            image.info.pop("transparency", None)  # or Pillow warns that it is dropped

    def rows(self, left: int, top: int, right: int, bottom: int) -> Pixels:
        part = self._image.crop((left, top, right, bottom))
        if part.mode in ("La", "RGBa"):  # colours multiplied by alpha
            part = part.convert(part.mode.upper())
        for mode in self._modes:
            part = part.convert(mode)
        pixels = np.asarray(part)
        if part.mode == "I":  # Pillow's 16-bit PGM
            pixels = pixels.astype(np.uint16)
        return to_unit(pixels.reshape(bottom - top, right - left, -1))


class _Jpeg:
    """A JPEG file in memory, decoded when it is known how much of it is wanted."""

    def __init__(self, image: Image.Image, content: bytes, in_chans: int) -> None:
        self.width, self.height = image.size
        self._content = content
        self._in_chans = in_chans

    def decode(self, shrink: int) -> tuple[_Pil, int]:
        """Return the pixels at 1 / scale of their size, and that scale: at most `shrink`."""
        scale = next(scale for scale in (8, 4, 2, 1) if scale <= max(shrink, 1))
        with reading(self.width * self.height):
            image = Image.open(io.BytesIO(self._content), formats=("JPEG",))
            if scale > 1:
                image.draft(None, (self.width // scale, self.height // scale))
            image.load()
            return _Pil(image, self._in_chans), scale


class OpenedImage:
    """An image whose header is good: its `size` as it is looked at, and crops of it.

    JPEG is decoded by each crop, everything else when it is opened.
    """

    def __init__(self, raster: Raster | _Jpeg, turn: tuple[bool, bool, bool], in_chans: int):
        self._raster = raster
        self._swap, self._mirror_h, self._mirror_v = turn
        self._in_chans = in_chans

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels, after the EXIF orientation."""
        width, height = self._raster.width, self._raster.height
        return (height, width) if self._swap else (width, height)

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

        `interpolation` is bicubic or bilinear.

        With `fast`, a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size; that
        is several times faster on large photographs and moves pixel values.

        Raises:
            BadImage: the pixels can't be decoded.
        """
        left, top, width, height = box
        if self._mirror_h:
            left = self.size[0] - left - width
        if self._mirror_v:
            top = self.size[1] - top - height
        if self._swap:
            left, top, width, height = top, left, height, width
            img_size = img_size[::-1]
        corners = (left, top, left + width, top + height)
        image = self._crop(corners, img_size, fast, interpolation)
        if self._swap:
            image = image.transpose(0, 2, 1)
        across, down = flip_h != self._mirror_h, flip_v != self._mirror_v
        return self._in_channels(image[:, :: -1 if down else 1, :: -1 if across else 1])

    def _crop(
        self,
        box: tuple[int, int, int, int],
        img_size: tuple[int, int],
        fast: bool,
        interpolation: str,
    ) -> Pixels:
        """Return a box (left, top, right, bottom) of the stored pixels, resized to (H, W)."""
        left, top, right, bottom = box
        raster = self._raster
        if isinstance(raster, _Jpeg):
            shrink = min((right - left) // img_size[1], (bottom - top) // img_size[0])
            raster, scale = raster.decode(shrink if fast else 1)
            left, top = left // scale, top // scale
            right = min(math.ceil(right / scale), raster.width)
            bottom = min(math.ceil(bottom / scale), raster.height)
        image = resize(raster, (left, top, right, bottom), img_size, interpolation)
        return image.clip(0, 1) if raster.bounded and image.dtype != np.uint8 else image

    def _in_channels(self, image_CHW: Pixels) -> Pixels:
        """Repeat a single band as often as asked for, with an opaque alpha for 2 and 4 channels."""
        if len(image_CHW) == self._in_chans:
            return np.ascontiguousarray(image_CHW)
        image = np.repeat(image_CHW, self._in_chans, axis=0)
        if self._in_chans in (2, 4):
            image[-1] = 255 if image.dtype == np.uint8 else 1
        return image


def read_image(path_or_file: PathOrFile, in_chans: int, max_pixels: int) -> OpenedImage:
    """Open an image and check its header.

    Pillow's limit on pixels and the warnings filter are set while a file is read and put back
    after: other threads of this process would see them.

    Args:
        path_or_file: a path, or a binary file that can seek, at its start; it is closed in the end.
        in_chans: the channels that crops will have.
        max_pixels: the most that width times height may be.

    Raises:
        BadImage: the file is missing, broken, too large, or does not have the right channels.
    """
    with reading(max_pixels), _opened(path_or_file) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"\x93NUMPY":
            return OpenedImage(_read_array(file, in_chans, max_pixels), _TURNS[1], in_chans)
        return _read_with_pillow(file, in_chans, max_pixels)


def _opened(path_or_file: PathOrFile) -> BinaryIO:
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
        raise BadImage(
            f"of a {image.format} at most 4 channels can be read, not {in_chans}: use .npy"
        )
    sixteen_bits = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM")
    if not (image.mode in (*_GREY, *_COLOUR, "F") or sixteen_bits):
        raise BadImage(f"pixels of mode {image.mode} have no range that is agreed on")
    if image.format in ("JPEG", "MPO"):
        turn = _turn(image)
        file.seek(0)
        return OpenedImage(_Jpeg(image, file.read(), in_chans), turn, in_chans)
    image.load()
    raster = _Pil(image, in_chans)
    if image.mode == "F":
        _check_finite(raster)
    return OpenedImage(raster, _turn(image), in_chans)


def _read_array(file: BinaryIO, in_chans: int, max_pixels: int) -> _Array:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read_header:
        raise BadImage(f".npy format {version} is not 1.0 or 2.0")
    shape, _, dtype = read_header[version](file)
    if dtype.kind != "f" and (dtype.kind, dtype.itemsize) not in (("u", 1), ("u", 2)):
        raise BadImage(f"array of {dtype}: uint8, uint16 and float are read")
    if len(shape) not in (2, 3) or min(shape) < 1 or (*shape, 1)[2] != in_chans:
        raise BadImage(f"array of shape {shape} is not (H, W, {in_chans}){_channels_of(shape)}")
    _check_pixels(shape[1], shape[0], max_pixels)
    file.seek(0)
    raster = _Array(np.load(file, allow_pickle=False).reshape(*shape[:2], in_chans))
    if dtype.kind == "f":
        _check_finite(raster)
    return raster


def _channels_of(shape: tuple[int, ...]) -> str:
    """What to do about an array of other channels: the fewest are taken for them."""
    if len(shape) != 3:
        return ""
    if shape[2] == min(shape):
        return f": give --in_chans {shape[2]}"
    return ": channels come last" if shape[0] == min(shape) else ""


def _check_pixels(width: int, height: int, max_pixels: int, form: str = "") -> None:
    share = DECODER_SHARE.get(form, 1)
    if width * height > share * max_pixels:
        part = f"{share:.0%} of max_pixels for {form}, " if share < 1 else ""
        raise BadImage(f"{width}x{height} pixels are over {part}max_pixels {max_pixels}")
    if width < 1 or height < 1:
        raise BadImage(f"no pixels: {width}x{height}")


def _check_finite(raster: Raster) -> None:
    """Refuse NaN and infinity anywhere, so that a file is bad in all of its crops or in none."""
    box = (0, 0, raster.width, raster.height)
    if not all(np.isfinite(part).all() for part in strips(raster, box)):
        raise BadImage("holds values that are not finite")


def _turn(image: Image.Image) -> tuple[bool, bool, bool]:
    """Return how to turn the image; one whose EXIF can't be read stays as it is."""
    try:
        with reading(image.width * image.height):
            return _TURNS.get(image.getexif().get(0x0112, 1), _TURNS[1])
    except BadImage:
        return _TURNS[1]
