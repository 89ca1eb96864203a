"""Reading one image: from a file's bytes to a crop of it, resized, in the channels asked for.

Rules for every file (documented in docs/data.md): the content decides the format and so the reader,
never the name or what is installed; the first frame or page is used; the EXIF orientation is
applied; colour profiles are ignored; alpha is dropped unless `in_chans` asks for it (2 or 4). 8-bit
images stay uint8; deeper ones become float32: unsigned integers are divided by their maximum, all
other values are kept. Pillow reads the high byte of 16-bit colour, an error of at most 1/257.
`.npy` arrays are (H, W) or (H, W, C). Pixels without a value do not count: see `valid_in`.
"""

import io
import os
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image, TiffImagePlugin

from fcmae.data.image import (
    BadImage,
    Look,
    OpenedImage,
    Reading,
    Turn,
    check_dtype,
    check_pixels,
    make_raster,
    opened,
    reading,
    turn_of,
)
from fcmae.data.rasters import HEAD, driver_of, read_raster, tiff_tags
from fcmae.data.resize import Corners, Raster, Valid
from fcmae.data.sources import PathOrFile
from fcmae.data.stacks import is_zarr, read_stack, read_zarr

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
"""The formats that Pillow may try. Others run programs (EPS starts Ghostscript)."""

_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_KNOWN = (*_GREY, *_COLOUR, "F", "I;16", "I;16L", "I;16B", "I;16N")
LARGE = 2**25
"""A TIFF file in tiles with more pixels is read tile by tile."""

ORIENTATION, TILED = 274, 322
"""Tags of TIFF: the EXIF orientation, and the width of tiles."""

MASK = ".msk"
"""The file beside an image that says which of its pixels count is named like it, with this end."""


def read_image(path_or_file: PathOrFile, how: Reading) -> OpenedImage:
    """Open an image and check its header.

    While a file is read, Pillow's limit on pixels and the warnings filter are changed, which other
    threads of this process see.

    Args:
        path_or_file: a path, or a seekable binary file at its start, which is closed at the end.
        how: to read it.

    Raises:
        BadImage: the file is missing, broken, too large, or does not have the right channels.
        MissingReader: its format needs a package that is not installed.
    """
    with reading(how.max_pixels):
        path = os.fsdecode(path_or_file) if isinstance(path_or_file, str | bytes) else None
        if path is not None and is_zarr(path):
            return read_zarr(path, how)
        with opened(path_or_file) as file:
            head = file.read(HEAD)
            file.seek(0)
            if head.startswith(b"\x93NUMPY"):
                return _read_array(file, how, path)
            tags = tiff_tags(file, head)
            if (driver := driver_of(head, tags)) is not None:
                return read_raster(file.read() if path is None else path, driver, how)
            if tags and _is_stack(file, tags):
                turn = turn_of(tags.get(ORIENTATION))
                return read_stack(file.read() if path is None else path, how, turn)
            return _read_with_pillow(file, how, path)


def _is_stack(file: BinaryIO, tags: dict[int, Any]) -> bool:
    """Whether a TIFF file comes from a microscope, is large and in tiles, or has values that Pillow
    does not read."""
    description = str(tags.get(TiffImagePlugin.IMAGEDESCRIPTION, ""))
    if "<OME" in description or description[:7] == "ImageJ=":
        return True
    try:
        image = Image.open(file, formats=("TIFF",))
        large = TILED in tags and image.width * image.height > LARGE
        return large or image.mode not in _KNOWN
    except OSError:  # so is UnidentifiedImageError
        return True
    finally:
        file.seek(0)


def _masks_beside(path: str | None, size: tuple[int, int]) -> list[Look]:
    """The mask of an image of (width, height) in the file `IMAGE.msk`, as GDAL names it: 0 where no
    pixel counts.

    Raises:
        BadImage: it is of another size.
    """
    if path is None or not os.path.isfile(path + MASK):
        return []
    with Image.open(path + MASK, formats=FORMATS) as image:
        if image.size != size:
            both = "{}×{}, the image {}×{}".format(*image.size, *size)
            raise BadImage(f"its mask {MASK} has {both} pixels")
        valid_HW = np.asarray(image.convert("L")) > 0

    def look(left: int, top: int, right: int, bottom: int) -> Valid:
        return valid_HW[top:bottom, left:right]

    return [look]


def _read_with_pillow(file: BinaryIO, how: Reading, path: str | None) -> OpenedImage:
    image = Image.open(file, formats=FORMATS)
    form = "progressive JPEG" if "progressive" in image.info else str(image.format)
    check_pixels(*image.size, how.max_pixels, form)
    if how.in_chans > 4:
        count = f"at most 4 channels can be read, not {how.in_chans}"
        raise BadImage(f"{image.format}: {count}: use .npy or a format with bands")
    if image.mode not in _KNOWN and (image.mode, image.format) != ("I", "PPM"):
        raise BadImage(f"pixels of mode {image.mode} have no defined range")
    depth = 1 if image.mode == "1" else 16 if image.mode[0] == "I" else 8
    kind = f"{form}, {len(image.getbands())} bands of " + (
        "float32" if image.mode == "F" else f"{depth} bits"
    )
    masks = _masks_beside(path, image.size)
    if image.format in ("JPEG", "MPO"):
        turn = _turn(image)
        file.seek(0)
        decode = partial(_decode_jpeg, file.read(), image.size, how, masks)
        return OpenedImage(image.size, how, decode, kind, turn)
    image.load()  # which turns a TIFF itself
    raster = _pillow_raster(image, how, masks)
    return OpenedImage(image.size, how, lambda *_: raster, kind, _turn(image))


def _decode_jpeg(
    content: bytes, size: tuple[int, int], how: Reading, masks: list[Look], shrink: int, _: Corners
) -> Raster:
    """See `OpenedImage`: a JPEG can be decoded at 1/2, 1/4 and 1/8 of its (width, height)."""
    most = 1 if masks else max(shrink, 1)  # a mask has the size of the whole image
    scale = next(scale for scale in (8, 4, 2, 1) if scale <= most)
    with reading(size[0] * size[1]):
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
        if scale > 1:
            image.draft(None, (size[0] // scale, size[1] // scale))
        image.load()
        return _pillow_raster(image, how, masks, scale)


def _pillow_raster(image: Image.Image, how: Reading, masks: list[Look], scale: int = 1) -> Raster:
    """Convert a Pillow image part by part, without a second copy of a large one."""
    (modes, picks), masks = _modes(image, how), [*masks]
    seen = how.nodata == "alpha" and image.has_transparency_data
    if not seen and modes and "A" not in modes[-1]:
        image.info.pop("transparency", None)  # or Pillow warns that it is dropped

    def part_of(left: int, top: int, right: int, bottom: int) -> Image.Image:
        part = image.crop((left, top, right, bottom))
        # Colours multiplied by alpha are divided by it.
        return part.convert(part.mode.upper()) if part.mode in ("La", "RGBa") else part

    def values(left: int, top: int, right: int, bottom: int) -> npt.NDArray[Any]:
        part = part_of(left, top, right, bottom)
        for mode in modes:
            part = part.convert(mode)
        pixels = np.asarray(part)
        if part.mode == "I":  # Pillow's 16-bit PGM
            pixels = pixels.astype(np.uint16)
        return pixels.reshape(bottom - top, right - left, -1)[..., picks]

    def opaque(left: int, top: int, right: int, bottom: int) -> Valid:
        alpha = part_of(left, top, right, bottom).convert("RGBA").getchannel("A")
        return np.asarray(alpha) > 0

    dtype = np.float32 if image.mode == "F" else np.uint8 if modes else np.uint16
    if seen:
        masks.append(opaque)
    return make_raster(image.size, dtype, values, how, masks=masks, scale=scale)


def _modes(image: Image.Image, how: Reading) -> tuple[tuple[str, ...], list[int] | slice]:
    """The modes that an 8-bit image is converted to, in turn, and which bands of the last count."""
    if image.mode not in _GREY + _COLOUR:
        return (), how.select(1) if how.bands else slice(None)
    if how.bands:
        mode = "L" if image.mode in _GREY else "RGB"
        mode += "A" if image.has_transparency_data else ""
        return (mode,), how.select(len(mode))
    grey = how.in_chans == 1 or (how.in_chans == 3 and image.mode in _GREY)
    modes = {2: ("RGBA", "LA"), 4: ("RGBA",)}.get(how.in_chans, ("L" if grey else "RGB",))
    return modes, slice(None)


def _read_array(file: BinaryIO, how: Reading, path: str | None) -> OpenedImage:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f".npy format {version} is not 1.0 or 2.0")
    old = version == (1, 0)
    shape, _, dtype = (npy.read_array_header_1_0 if old else npy.read_array_header_2_0)(file)
    check_dtype(dtype)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage(f"array of shape {shape} is not (H, W) or (H, W, C)")
    if len(shape) == 3 and shape[0] == min(shape) < shape[2]:
        raise BadImage(f"array of shape {shape} is not (H, W, {how.in_chans}): channels come last")
    height, width, count = (*shape, 1)[:3]
    check_pixels(width, height, how.max_pixels)
    picks = how.select(count)
    file.seek(0)
    pixels = np.load(file, allow_pickle=False).reshape(height, width, count)

    def values(left: int, top: int, right: int, bottom: int) -> npt.NDArray[Any]:
        part = pixels[top:bottom, left:right]
        return part if picks == [*range(count)] else part[..., picks]

    size = width, height
    raster = make_raster(size, dtype, values, how, masks=_masks_beside(path, size))
    return OpenedImage(size, how, lambda *_: raster, f"NumPy, {count} bands of {dtype}")


def _turn(image: Image.Image) -> Turn:
    """Return the turns of the EXIF orientation; none if the EXIF data can't be read."""
    orientation = None
    with suppress(BadImage), reading(image.width * image.height):
        orientation = image.getexif().get(ORIENTATION)
    return turn_of(orientation)
