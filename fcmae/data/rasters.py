"""Maps: georeferenced rasters, read with rasterio (GDAL) in the tiles that a crop touches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy.typing as npt
from PIL import TiffImagePlugin

from fcmae.data.image import (
    BadImage,
    MissingReader,
    OpenedImage,
    Reading,
    check_dtype,
    check_pixels,
    opened,
    reading,
    within,
)
from fcmae.data.resize import Corners, Raster
from fcmae.data.sources import PathOrFile

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

HEAD = 4096
"""Bytes at the start of a file that tell its format."""

TILE = 256
"""Side in pixels of the tiles that are written."""

CACHE_MB = 32
"""Decoded tiles that GDAL keeps, in each process."""

TIFF = (b"II*\0", b"MM\0*")
BIG_TIFF = (b"II+\0", b"MM\0+")

_GEO_TAGS = {33550, 33922, 34264, 34735, 42112, 42113}
"""Scale, tie points, transform and keys of GeoTIFF; GDAL's metadata and its nodata."""

_JPEG_2000 = b"\0\0\0\x0cjP  "
_GEO_JP2 = bytes.fromhex("b14bf8bd083d4b43a5ae8cd7d5a6ce03"), b"gml.data"
_ERDAS = b"EHFA_HEADER_TAG"


def tiff_tags(file: BinaryIO, head: bytes) -> dict[int, Any]:
    """Return the tags of the first page of a TIFF file; none of any other, or if they can't be
    read."""
    if head[:4] not in (*TIFF, *BIG_TIFF):
        return {}
    tags = dict[int, Any]()
    with suppress(Exception):  # the reader says what is wrong
        size = 16 if head[:4] in BIG_TIFF else 8  # of the header
        directory = TiffImagePlugin.ImageFileDirectory_v2(head[:size])
        file.seek(directory.next)
        directory.load(file)
        tags = dict(directory)
    file.seek(0)
    return tags


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
        BadImage: GDAL can't open the path.
    """
    try:
        import rasterio
    except ImportError as error:
        raise MissingReader("a map needs rasterio: pip install 'fcmae[geo]'") from error
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a map without coordinates is an image like others
        if isinstance(path_or_content, str):
            if any("\udc80" <= char <= "\udcff" for char in path_or_content):
                raise BadImage("its path is not UTF-8, which GDAL needs: rename it")
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

    return OpenedImage(size, how, decode, kind, tiled=True)


class Placement(NamedTuple):
    """Where a map is: its coordinate system, and the affine transform of pixels to coordinates."""

    crs: Any
    transform: Any


def placement_of(path_or_file: PathOrFile) -> Placement | None:
    """Return where an image is on the map; None if it does not say."""
    if isinstance(path_or_file, str | bytes) and not os.path.isfile(path_or_file):
        return None
    with opened(path_or_file) as file:
        head = file.read(HEAD)
        driver = driver_of(head, tiff_tags(file, head))
        if driver is None:
            return None
        file.seek(0)
        place = os.fsdecode(path_or_file) if isinstance(path_or_file, str | bytes) else file.read()
        with open_map(place, driver) as data:
            points, crs = data.gcps
            if points:
                from rasterio.transform import from_gcps

                return Placement(crs, from_gcps(points))
            if data.crs is None and data.transform.is_identity:
                return None
            return Placement(data.crs, data.transform)


def write_map(
    path: Path, values_HW: npt.NDArray[Any], where: Placement, nodata: int | None = None
) -> None:
    """Write values as a tiled GeoTIFF, some rows at a time."""
    import rasterio

    height, width = values_HW.shape
    profile = {
        "driver": "GTiff", "count": 1, "height": height, "width": width, "dtype": values_HW.dtype,
        "crs": where.crs, "transform": where.transform, "nodata": nodata, "compress": "deflate",
        "tiled": True, "blockxsize": TILE, "blockysize": TILE, "bigtiff": "if_safer",
    }  # fmt: skip
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), rasterio.open(path, "w", **profile) as data:
        for top in range(0, height, TILE):
            bottom = min(top + TILE, height)
            data.write(values_HW[top:bottom], 1, window=((top, bottom), (0, width)))
