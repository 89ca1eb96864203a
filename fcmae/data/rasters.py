"""Maps: georeferenced rasters, read with rasterio (GDAL) in the tiles that a crop touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fcmae.data.image import (
    MissingReader,
    OpenedImage,
    Reading,
    check_dtype,
    check_pixels,
    reading,
    within,
)
from fcmae.data.resize import Corners, Raster

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

CACHE_MB = 32
"""Decoded tiles that GDAL keeps, in each process."""

_GEO_TAGS = {33550, 33922, 34264, 34735, 42112, 42113}
"""Scale, tie points, transform and keys of GeoTIFF; GDAL's metadata and its nodata."""

_JPEG_2000 = b"\0\0\0\x0cjP  "
_GEO_JP2 = bytes.fromhex("b14bf8bd083d4b43a5ae8cd7d5a6ce03"), b"gml.data"
_ERDAS = b"EHFA_HEADER_TAG"


def driver_of(head: bytes, tags: Mapping[int, Any]) -> str | None:
    """Return GDAL's name of the format of a georeferenced raster; None for any other file.

    Args:
        head: the start of the file.
        tags: of a TIFF file.
    """
    if not _GEO_TAGS.isdisjoint(tags):
        return "GTiff"
    if head.startswith(_JPEG_2000) and any(mark in head for mark in _GEO_JP2):
        return "JP2OpenJPEG"
    return "HFA" if head.startswith(_ERDAS) else None


@contextmanager
def open_map(path_or_content: str | bytes, driver: str) -> Iterator[DatasetReader]:
    """Open a raster, at a path or of these bytes, with a bounded cache.

    Only its own driver may try: others open further files or connections that a file names.

    Raises:
        MissingReader: rasterio is not installed.
    """
    try:
        import rasterio
    except ImportError as error:
        raise MissingReader("a map needs rasterio: pip install 'fcmae[geo]'") from error
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
        if isinstance(path_or_content, str):
            with rasterio.open(path_or_content, driver=driver) as data:
                yield data
        else:
            with rasterio.MemoryFile(path_or_content) as file, file.open(driver=driver) as data:
                yield data


def read_raster(path_or_content: str | bytes, driver: str, how: Reading) -> OpenedImage:
    """Open a georeferenced raster: see `read_image`.

    Pixels count where GDAL's mask says so (alpha, a mask inside or beside the file); else where
    they differ from the file's nodata.
    """
    with open_map(path_or_content, driver) as data:
        from rasterio.enums import ColorInterp, MaskFlags

        picks = how.select(data.count, data.colorinterp[-1] == ColorInterp.alpha)
        size, dtype, nodata = (data.width, data.height), data.dtypes[picks[0]], data.nodata
        check_dtype(dtype)
        masked = MaskFlags.per_dataset in data.mask_flag_enums[picks[0]]
        kind = f"{data.driver}, {data.count} bands of {dtype}"
    bands = [pick + 1 for pick in picks]

    def decode(_: int, corners: Corners) -> Raster:
        left, top, right, bottom = corners
        check_pixels(right - left, bottom - top, how.max_pixels)
        with reading(how.max_pixels), open_map(path_or_content, driver) as data:
            window = (top, bottom), (left, right)
            part_HWC = data.read(bands, window=window).transpose(1, 2, 0)
            masks = [data.read_masks(bands[0], window=window) > 0] if masked else []
        return within(corners, size, part_HWC, how, nodata, masks)

    return OpenedImage(size, how, decode, kind)
