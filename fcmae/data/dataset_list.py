"""Images in Hugging Face datasets: `hf:PATH_OR_NAME[:SPLIT[:COLUMN]]`.

PATH is a folder that `save_to_disk` wrote, or a folder, a pattern or a file of Parquet or Arrow;
what is not there is a name on the Hub. What `save_to_disk` wrote is memory-mapped where it lies;
anything else `datasets` first copies to Arrow files in its cache.

An image is read from its Arrow column: a row of `datasets` takes several times as long. A split is
the same as before if it has the same number of images, of the same names and lengths in bytes.
"""

import hashlib
import io
import logging
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fcmae.data.file_list import LONGEST
from fcmae.data.image import BadImage
from fcmae.data.names import Named
from fcmae.data.sources import NO_LABEL, Indices, PathOrFile
from sparse.errors import InputError, brief

PREFIX = "hf:"
LABELS = ("label", "labels")
"""Columns of labels, where none is of the type ClassLabel."""

_SUFFIXES = (".parquet", ".arrow")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_ARRAYS = {"names": np.uint8, "lengths": np.uint16, "positions": np.int64, "labels": np.int32}


class Place(NamedTuple):
    """Where images are: an absolute path or a name on the Hub, a split and a column of it, and what
    identifies these; see `_Column.digest`."""

    location: str
    split: str
    column: str
    digest: str


@dataclass(eq=False)
class DatasetList(Named):
    """A source of the images in one column of one split. No Python object exists per image.

    The names are the paths in the column if each image has one of its own, else the positions.

    Args:
        place: where they are.
        classes: names of the labels.
        names: names of the images end to end, uint8.
        lengths: the length of each name (N,), uint16.
        positions: the row of each image (N,), int64.
        labels: the position of each image's label in `classes` (N,), int32; `NO_LABEL` for none.
        starts: where each name starts (N,), int64; None where names follow each other in order.
    """

    place: Place
    classes: tuple[str, ...]
    names: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint16]
    positions: Indices
    labels: npt.NDArray[np.int32]
    starts: InitVar[Indices | None] = None
    _column: "_Column | None" = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the column: pickled, it would be a copy of all images."""
        return self.__dict__ | {"_column": None}

    def name(self, index: int) -> str:
        """Return a path in the column, or a position."""
        return os.fsdecode(self.key(index))

    def prefix(self, data: str) -> str:
        return f"{self.place.split}/"

    def open(self, index: int) -> PathOrFile:
        """Return the content of an image, or where there is none its path.

        Raises:
            BadImage: there is neither.
        """
        if self._column is None:
            self._column = self._opened()
        content, path = self._column.row(int(self.positions[index]))
        if content is not None:
            return io.BytesIO(content)
        if path is None:
            raise BadImage("the dataset has neither bytes nor a path for it")
        return os.fsencode(path)

    def checked(self) -> "DatasetList":
        """Return the list with its column open.

        Raises:
            InputError: the dataset is missing or has changed.
        """
        return replace(self, starts=self._starts, _column=self._opened())

    def _opened(self) -> "_Column":
        place, shown = self.place, f"dataset {self.place.location!r}"
        found = _load(place.location, shown).get(place.split)
        if found is not None and place.column in found.column_names:
            column = _Column(found.data.column(place.column))
            if column.digest() == place.digest:
                return column
        raise InputError(f"{shown} has changed since the run began: restore it or start over")

    def select(self, indices: npt.ArrayLike) -> "DatasetList":
        """Return the images at `indices`, in that order."""
        picks = np.asarray(indices, dtype=np.int64)
        parts: Any = {part: getattr(self, part)[picks] for part in [*_ARRAYS][1:]}
        return replace(self, **parts, starts=self._starts[picks])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the list as an .npz file."""
        parts = {part: getattr(self, part) for part in _ARRAYS} | {"names": self.joined()}
        classes = np.array(self.classes, dtype=np.str_)
        with open(path, "wb") as file:
            np.savez(file, dataset=np.array(self.place), classes=classes, **parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DatasetList":
        """Read what `save` wrote. The dataset is opened when its first image is.

        Raises:
            InputError: the file can't be read, or is not what `save` wrote.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                place, classes = Place(*stored["dataset"].tolist()), stored["classes"].tolist()
                parts: list[Any] = [stored[part] for part in _ARRAYS]
            names, lengths, positions, labels = parts
            if (
                [part.dtype for part in parts] != [*_ARRAYS.values()]
                or not len(lengths) == len(positions) == len(labels)
                or lengths.sum(dtype=np.int64) != len(names)
                or ((labels < NO_LABEL) | (labels >= len(classes))).any()
            ):
                raise ValueError("its parts do not fit together")
        except Exception as error:  # a damaged archive raises nearly anything
            raise InputError(
                f"list {str(path)!r} is missing or damaged ({error}): restore it or start over"
            ) from error
        return cls(place, tuple(classes), *parts)


class _Column:
    """The images of a split: Arrow arrays, nearly always in memory-mapped files.

    Args:
        column: a chunked array of {bytes, path}, or of bytes.
    """

    def __init__(self, column: Any) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._lengths_of: Callable[[Any], Any] = pc.binary_length
        self._contents = column
        self._paths = None
        if pa.types.is_struct(column.type):
            self._contents, self._paths = (pc.struct_field(column, n) for n in ("bytes", "path"))
        self._content_chunks = self._contents.chunks
        self._path_chunks = [] if self._paths is None else self._paths.chunks
        self._ends = [*accumulate(map(len, self._content_chunks))]

    def __len__(self) -> int:
        return len(self._contents)

    def row(self, position: int) -> tuple[bytes | None, str | None]:
        """Return the content of an image, or if there is none its path, or neither."""
        number = bisect_right(self._ends, position)
        chunk = self._content_chunks[number]
        place = position - self._ends[number] + len(chunk)
        content = chunk[place].as_py()
        if content is not None or not self._path_chunks:
            return content, None
        return None, self._path_chunks[number][place].as_py()

    @cached_property
    def named(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
        """Return the names end to end, and the length of each: see `DatasetList`."""
        if self._paths is not None and not self._paths.null_count:
            lengths = self._lengths_of(self._paths).to_numpy()
            distinct = len(self._paths.unique()) == len(self)
            if distinct and 0 < lengths.min() <= lengths.max() <= LONGEST:
                blob = b"".join("".join(chunk.to_pylist()).encode() for chunk in self._path_chunks)
                return np.frombuffer(blob, np.uint8), lengths.astype(np.uint16)
        names = list(map(str, range(len(self))))
        lengths = np.array(list(map(len, names)), np.uint16)
        return np.frombuffer("".join(names).encode(), np.uint8), lengths

    def digest(self) -> str:
        """Return the SHA-256 of the names and of the lengths in bytes, which reads no image."""
        names, lengths = self.named
        sizes = self._lengths_of(self._contents).fill_null(-1).to_numpy()
        parts = lengths.astype("<u2"), names, sizes.astype("<i8")
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


class Splits(NamedTuple):
    """A dataset that is open, and what was asked of it.

    Attributes:
        shown: the dataset in messages.
        location: an absolute path, or a name on the Hub.
        tables: a `datasets.Dataset` for each split.
        split, column: the ones that were named; empty for none.
    """

    shown: str
    location: str
    tables: Mapping[str, Any]
    split: str
    column: str

    def pick(self, *wanted: str) -> str:
        """Return the split that was named, else the first of `wanted` that there is; where nothing
        is wanted, `train` or the only one.

        Raises:
            InputError: there is none.
        """
        names = [*self.tables]
        asked = (self.split,) if self.split else wanted or ("train",)
        if found := [name for name in asked if name in names]:
            return found[0]
        if len(names) == 1 and not (self.split or wanted):
            return names[0]
        raise InputError(
            f"{self.shown} has no split {asked[0]!r}: name one of {brief(map(repr, names), 20)}, "
            f"as in {PREFIX}{self.location}:{names[0]}"
        )

    def images(self, split: str, labelled: bool = False) -> DatasetList:
        """Return the images of a split, with labels if these are asked for.

        Raises:
            InputError: no image, no single column of images, or no single one of labels.
        """
        table = self.tables[split]
        name = self._image_column(table)
        column = _Column(table.data.column(name))
        if not len(column):
            raise InputError(f"{self.shown} has no rows in {split!r}: give another split")
        place = Place(self.location, split, name, column.digest())
        unlabelled = (), np.full(len(column), NO_LABEL, np.int32)
        classes, labels = self._labels(table) if labelled else unlabelled
        positions = np.arange(len(column))
        return DatasetList(
            place, classes, *column.named, positions, labels, starts=None, _column=column
        )

    def _image_column(self, table: Any) -> str:
        from datasets import Image, Value

        binary = (Value("binary"), Value("large_binary"))
        of_images = [name for name, kind in table.features.items() if isinstance(kind, Image)]
        of_bytes = [name for name, kind in table.features.items() if kind in binary]
        choices = of_images + of_bytes if self.column else of_images or of_bytes
        if self.column in choices:
            return self.column
        if not self.column and len(choices) == 1:
            return choices[0]
        kinds = [
            f"{name} ({kind.dtype if isinstance(kind, Value) else type(kind).__name__})"
            for name, kind in table.features.items()
        ]
        what = f"column {self.column!r} of images" if self.column else "single column of images"
        named = f"hf:…:{self.split or 'SPLIT'}:COLUMN"
        raise InputError(f"{self.shown} has no {what}: give {named}; it has {brief(kinds, 20)}")

    def _labels(self, table: Any) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
        from datasets import ClassLabel

        columns = [name for name, kind in table.features.items() if isinstance(kind, ClassLabel)]
        named = columns or [name for name in LABELS if name in table.features]
        dtype = getattr(table.features[named[0]], "dtype", "") if len(named) == 1 else ""
        if not re.fullmatch(r"u?int\d+|(large_)?string", str(dtype)):
            raise InputError(
                f"{self.shown} has no single column of classes, of type ClassLabel or named "
                f"{' or '.join(LABELS)}: it has {brief(table.column_names, 20)}"
            )
        values = table.data.column(named[0]).to_pylist()
        if columns:
            classes = table.features[named[0]].names
            places = {value: value for value in range(len(classes))}
        else:
            classes = sorted({value for value in values if value not in (None, NO_LABEL, "")})
            places = {value: place for place, value in enumerate(classes)}
        labels = np.array([places.get(value, NO_LABEL) for value in values], np.int32)
        return tuple(map(str, classes)), labels


def is_dataset(data: object) -> bool:
    """Return whether a setting names a dataset."""
    return str(data).startswith(PREFIX)


def open_splits(given: str, setting: str = "data") -> Splits:
    """Open the dataset that `hf:PATH_OR_NAME[:SPLIT[:COLUMN]]` names.

    The longest part before a colon that exists here is its path, so a path may contain colons.

    Raises:
        InputError: it is missing or can't be read, or the package for it is.
    """
    shown, text = f"{setting} {given!r}", given.removeprefix(PREFIX)
    heads = [text.rsplit(":", count)[0] for count in range(min(text.count(":"), 2) + 1)]
    here = [head for head in heads if _is_here(head)]
    location = here[0] if here else text.split(":", 1)[0]
    split, column, *more = [*text[len(location) + 1 :].split(":"), "", ""]
    if here:
        location = os.path.abspath(os.path.expanduser(location))
    elif location.endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(location) or any(more):
        raise InputError(
            f"{shown} is neither a path here nor a name on the Hub: give hf:FOLDER, hf:USER/NAME "
            "or, with a split and a column, hf:USER/NAME:train:image"
        )
    return Splits(shown, location, _load(location, shown), split, column)


def _is_here(path: str) -> bool:
    path = os.path.expanduser(path)
    return bool(path) and (os.path.exists(path) or bool(glob(path, recursive=True)))


def _load(location: str, shown: str) -> dict[str, Any]:
    """Return the splits of a dataset by name.

    Raises:
        InputError: see `open_splits`.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{shown} needs {error.name}, which is not installed: pip install 'fcmae[datasets]'"
        ) from error
    folder = Path(location)
    files = [location] if folder.exists() else sorted(glob(location, recursive=True))
    try:
        with _quiet():
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                found: Any = datasets.load_from_disk(location)
            elif not os.path.isabs(location):
                found = datasets.load_dataset(location)
            elif not files:
                raise FileNotFoundError("it does not exist")
            elif folder.is_dir():
                if not any(path.suffix in _SUFFIXES for path in folder.rglob("*")):
                    raise FileNotFoundError("it holds no Parquet or Arrow files")
                found = datasets.load_dataset(location)
            else:
                kinds = {Path(file).suffix for file in files}
                kind = kinds.pop()
                if kinds or kind not in _SUFFIXES:
                    raise FileNotFoundError("not all its files are .parquet, or all .arrow")
                found = datasets.load_dataset(kind[1:], data_files=files)
    except Exception as error:  # of the network, of Arrow, of a cache that can't be written
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{shown} can't be read as a dataset ({why}): give a folder written by save_to_disk, "
            "Parquet or Arrow files, or a name on the Hub"
        ) from error
    if isinstance(found, datasets.Dataset):
        return {str(found.split or "train"): found}
    return dict(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars unless they are seen on a terminal, and what is logged about retries."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hidden = not (sys.stderr.isatty() or are_progress_bars_disabled())
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        if hidden:
            enable_progress_bars()
