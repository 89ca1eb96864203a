"""Microscopy and other large images: TIFF stacks, OME-TIFF, zarr and OME-Zarr.

All are arrays with named axes, of which one plane is an image: the first of each axis, but the
middle of a z-stack; channels and colour samples are its bands. Of a pyramid it is the largest
level. Only the tiles that a crop touches are read.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from fcmae.data.image import (
    BadImage,
    MissingReader,
    OpenedImage,
    Reading,
    Turn,
    check_dtype,
    check_pixels,
    reading,
    within,
)
from fcmae.data.resize import Corners, Raster

BANDS = "CS"
"""Axes that become bands: channels and colour samples."""

PLANE = "YX" + BANDS
_MARKS = ("zarr.json", ".zarray", ".zgroup")

_NAMES = "TCZYX"
Stack = tuple[Any, str, bool]
"""An array, of NumPy's interface, a letter for each of its axes, and whether the last sample is
alpha."""


def is_zarr(path: str) -> bool:
    """Whether a path is a folder of zarr."""
    marks = (os.path.join(path, name) for name in _MARKS)
    return os.path.isdir(path) and any(map(os.path.isfile, marks))


def read_stack(path_or_content: str | bytes, how: Reading, turn: Turn) -> OpenedImage:
    """Open a TIFF file, which is to be turned: see `read_image`."""
    return _opened(partial(_open_tiff, path_or_content), "TIFF stack", how, turn)


def read_zarr(path: str, how: Reading) -> OpenedImage:
    """Open a folder of zarr or OME-Zarr: see `read_image`."""
    return _opened(partial(_open_zarr, path), "zarr", how)


@contextmanager
def _open_tiff(path_or_content: str | bytes) -> Iterator[Stack]:
    tifffile, zarr = _packages()
    file = path_or_content if isinstance(path_or_content, str) else io.BytesIO(path_or_content)
    with _Complaints() as complaints, tifffile.TiffFile(file) as tiff:
        first = tiff.series[0]
        complaints.raise_first()
        _check_complete(first, tiff.filehandle.size)
        with first.aszarr(level=0) as store:
            page = first.keyframe
            if page.photometric not in (1, 2, 6):
                name = getattr(page.photometric, "name", page.photometric)
                raise BadImage(f"TIFF stack of {name} values: convert it to grey or RGB")
            alpha = first.axes.endswith("S") and bool(page.extrasamples)
            yield zarr.open(store, mode="r"), first.axes, alpha


class _Complaints(logging.Handler):
    """What tifffile logs about a damaged file, of which it goes on to read the rest."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.logger, self.first = logging.getLogger("tifffile"), ""

    def __enter__(self) -> _Complaints:
        self.logger.addHandler(self)
        self.logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()

    def raise_first(self) -> None:
        if self.first:
            raise BadImage(f"damaged TIFF stack: {self.first}")


def _check_complete(series: Any, size: int) -> None:
    """Make sure that the tiles of the planes that are read lie in a file of so many bytes, since
    tifffile takes others for empty.

    Raises:
        BadImage: they do not.
    """
    if series.dataoffset is not None:
        ends = [series.dataoffset + series.nbytes]
    else:
        stack = [axis for axis in series.axes if axis not in "YXS"]
        shape = [series.shape[series.axes.index(axis)] for axis in stack]
        places = [
            range(n) if axis in BANDS else [n // 2 if axis == "Z" else 0]
            for axis, n in zip(stack, shape, strict=True)
        ]
        numbers = [int(np.ravel_multi_index(at, shape)) if at else 0 for at in product(*places)]
        pages = [series.pages[number] for number in numbers if number < len(series.pages)]
        if len(pages) < len(numbers) or not all(len(page.dataoffsets) for page in pages):
            raise BadImage("TIFF stack is cut off")
        ends = [
            max(np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)) for page in pages
        ]
    if max(ends) > size:
        raise BadImage(f"TIFF stack is cut off: {size} bytes of {max(ends)}")


@contextmanager
def _open_zarr(path: str) -> Iterator[Stack]:
    _, zarr = _packages()
    found = zarr.open(path, mode="r")
    if hasattr(found, "shape"):
        yield found, _axes(found), False
        return
    described = dict(found.attrs)
    if "bioformats2raw.layout" in described.get("ome", described):  # several images: the first
        found = found["0"]
        described = dict(found.attrs)
    described = described.get("ome", described)
    if "multiscales" not in described:
        raise BadImage("zarr without OME metadata: give one of its arrays")
    image = described["multiscales"][0]
    largest = image["datasets"][0]["path"]
    if largest not in found:
        raise BadImage(f"OME-Zarr without its largest level, {largest!r}")
    named = image.get("axes", _NAMES[-found[largest].ndim :])
    axes = "".join(axis if isinstance(axis, str) else axis["name"] for axis in named)
    yield found[largest], axes.upper(), False


def _axes(array: Any) -> str:
    """The axes of an array that does not name them: (H, W), (H, W, C) or (C, H, W) with fewer
    channels than pixels, or the last of (T, C, Z, H, W)."""
    if array.ndim == 3:
        return "CYX" if array.shape[0] < array.shape[2] else "YXC"
    if array.ndim > len(_NAMES):
        raise BadImage(f"zarr with {array.ndim} axes without names: at most {len(_NAMES)}")
    return _NAMES[-array.ndim :]


def _packages() -> tuple[Any, Any]:
    try:
        import tifffile
        import zarr
    except ImportError as error:
        raise MissingReader(
            f"a TIFF stack or zarr needs {error.name}: pip install 'fcmae[bio]'"
        ) from error
    return tifffile, zarr


def _opened(
    open_again: Callable[[], AbstractContextManager[Stack]],
    form: str,
    how: Reading,
    turn: Turn = (False, False, False),
) -> OpenedImage:
    with open_again() as (array, axes, alpha):
        shape = dict(zip(axes, array.shape, strict=True))
        if not {"Y", "X"} <= shape.keys() or len(shape) < len(axes):
            raise BadImage(f"{form} with the axes {axes}: Y and X are needed")
        check_dtype(array.dtype)
        count = int(np.prod([shape[axis] for axis in BANDS if axis in shape]))
        size, kind = (shape["X"], shape["Y"]), f"{form}, {count} bands of {array.dtype}"
    picks = how.select(count, alpha)

    def decode(_: int, corners: Corners) -> Raster:
        left, top, right, bottom = corners
        check_pixels(right - left, bottom - top, how.max_pixels)
        places: dict[str, Any] = {axis: slice(None) for axis in BANDS}
        places |= {"Y": slice(top, bottom), "X": slice(left, right), "Z": shape.get("Z", 0) // 2}
        with reading(how.max_pixels), open_again() as (array, axes, _):
            part = np.asarray(array[tuple(places.get(axis, 0) for axis in axes)])
        kept = [axis for axis in axes if axis in PLANE]
        order = [kept.index(axis) for axis in PLANE if axis in kept]
        part_HWC = part.transpose(order).reshape(bottom - top, right - left, count)
        return within(corners, size, part_HWC[..., picks], how)

    return OpenedImage(size, how, decode, kind, turn, tiled=True)
