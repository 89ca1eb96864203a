"""Labels in a CSV file: a row for each image, with the columns path, perhaps split, and labels."""

import csv
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcmae.data import remote
from fcmae.data.file_list import LONGEST, FileList
from fcmae.data.labelled import (
    TRAIN,
    VAL,
    LabelledData,
    Labels,
    Split,
    check_known,
    check_names,
    report_unmeasured,
    split_by_hash,
)
from fcmae.data.sources import Indices
from sparse.errors import InputError, brief

PATH, SPLIT, LABEL = "path", "split", "label"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """The rows of a CSV file.

    Attributes:
        file: where they are.
        source: the images, in the order of the rows; their keys are their paths, relative to the
            file's folder if they are inside.
        columns: the cells of each column but path and split, by its name.
        splits: the split of each row; None without that column.
        lines: the line of each row in the file.
    """

    file: Path
    source: FileList
    columns: dict[str, list[str]]
    splits: list[str] | None
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Return the cells of a column.

        Raises:
            InputError: there is none of this name.
        """
        if name not in self.columns:
            there = brief(map(repr, self.columns), 8) or "none for labels"
            raise InputError(f"{self.file} has no column {name!r}: its columns are {there}")
        return self.columns[name]

    def rows(self, split: str) -> Indices:
        """Return the positions of the rows of a split; without splits, of all rows.

        Raises:
            InputError: there are none.
        """
        if self.splits is None:
            return np.arange(len(self.source))
        rows = np.flatnonzero(np.array(self.splits) == split)
        if not len(rows):
            there = brief(map(repr, dict.fromkeys(self.splits)), 8)
            raise InputError(f"{self.file} has no row of split {split!r}: it has {there}")
        return rows

    def where(self, row: int) -> str:
        """Return a row's place for messages."""
        return f"{self.file}, line {self.lines[row]}"

    def check_images(self, rows: Indices, most: float = 1.0) -> None:
        """Report images that are missing on this machine.

        Raises:
            InputError: all are missing, or more than the share `most`.
        """
        paths = ((row, self.source.path(row)) for row in rows.tolist())
        missing = [row for row, p in paths if not (remote.is_url(p) or os.path.exists(p))]
        if not missing:
            return
        names = brief(repr(self.source.name(row)) for row in missing)
        what = f"{len(missing)} of {len(rows)} images of {self.file} are missing: {names}"
        if len(missing) == len(rows) or len(missing) > most * len(rows):
            where = f"paths, with /, are absolute or relative to {self.source.roots[0]}"
            raise InputError(f"{what}; {where}")
        _log.warning("%s", what)


Reader = Callable[[Table, Indices, tuple[str, ...] | None], tuple[Labels, tuple[str, ...]]]
"""Returns the labels (N, …) of some rows of a table and the names of classes or targets. These are
the given ones; for None, those that the rows have. Raises InputError if a cell is not a label."""


def labels_file(config: Any) -> str | None:
    """Return the CSV file that a config names as its labels or its data, if any.

    Raises:
        InputError: the labels are not on this machine.
    """
    if remote.is_url(where := str(config.labels or config.data)):
        raise InputError(
            f"labels are not read from {where!r}: give a CSV file on this machine, with the URLs "
            "of the images in its column 'path'"
        )
    is_table = str(config.data).lower().endswith(".csv")
    return config.labels or (config.data if is_table else None)


def read_table(file: str | Path) -> Table:
    """Read a CSV file of labels.

    Raises:
        InputError: it can't be read, has no column `path`, a row of another length, a row without
            a path or with the path of another one, or no row.
    """
    path = Path(file).expanduser()
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            reader = csv.reader(handle)
            heads = [name.strip() for name in next(reader, [])]
            numbered = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"labels {str(file)!r} can't be read ({reason}): give a CSV file"
        ) from error
    if PATH not in heads:
        found = brief(map(repr, heads), 8) or "nothing"
        raise InputError(f"{path} has no column 'path': its first line has {found}")
    if len(set(heads)) < len(heads) or "" in heads:
        raise InputError(
            f"{path} has a duplicate or unnamed column: {brief(map(repr, heads), 8)}; in pandas, "
            "write it with to_csv(index=False)"
        )
    if not numbered:
        raise InputError(f"{path} has no rows: expected one for each image")
    if odd := [(line, row) for line, row in numbered if len(row) != len(heads)]:
        line, row = odd[0]
        raise InputError(f"{path}, line {line} has {len(row)} cells for {len(heads)} columns")
    columns = {
        head: [cell.strip() for cell in cells]
        for head, cells in zip(heads, zip(*(row for _, row in numbered), strict=True), strict=True)
    }
    lines = [line for line, _ in numbered]
    root, splits = os.path.abspath(path.parent), columns.pop(SPLIT, None)
    names: dict[str, int] = {}
    for line, cell in zip(lines, columns.pop(PATH), strict=True):
        name = os.path.normpath(os.path.join(root, cell)).removeprefix(f"{root}/")
        name = cell if remote.is_url(cell) else name
        if not cell or "\0" in cell or len(os.fsencode(name)) > LONGEST:
            raise InputError(f"{path}, line {line} has {cell[:50]!r} as path: give an image's path")
        if (first := names.setdefault(name, line)) != line:
            raise InputError(f"{path} has {cell!r} twice, in lines {first} and {line}: remove one")
    return Table(path, FileList.of(root, map(os.fsencode, names)), columns, splits, lines)


def find_in_table(
    table: Table, val_fraction: float, read: Reader, max_bad: float = 1.0
) -> LabelledData:
    """Find the images to train and to validate on.

    Args:
        table: the file.
        val_fraction: share of the images to validate on, chosen by a hash of their paths, of each
            class if there is one per image; 0 takes those of split `val`.
        read: reads labels.
        max_bad: largest share of the images that may be missing.

    Raises:
        InputError: a split is empty, a label is wrong, or images are missing.
    """
    splits = table.splits
    if val_fraction and splits is not None and VAL in splits:
        raise InputError(
            f"{table.file} has its own split val: leave val_fraction at 0, not {val_fraction}"
        )
    if splits is None and not val_fraction:
        hint = "add it, with train and val, or give --val_fraction 0.2"
        raise InputError(f"{table.file} has no column 'split': {hint}")
    rows = table.rows(TRAIN)
    labels, names = read(table, rows, None)
    if val_fraction:
        strata = labels if labels.ndim == 1 else np.zeros(len(rows), np.int64)
        learnt, held = split_by_hash(table.source.select(rows), strata, val_fraction)
        parts = [(rows[learnt], labels[learnt]), (rows[held], labels[held])]
    else:
        val = table.rows(VAL)
        parts = [(rows, labels), (val, read(table, val, names)[0])]
    table.check_images(np.concatenate([rows for rows, _ in parts]), max_bad)
    train, measured = (Split(table.source.select(rows), "", found) for rows, found in parts)
    if labels.ndim == 1:
        report_unmeasured(names, measured)
    return LabelledData(train, measured, names)


def read_classes(
    table: Table, rows: Indices, names: tuple[str, ...] | None
) -> tuple[Labels, tuple[str, ...]]:
    """Return the class (N,) of each row, from the column `label`, and the classes, sorted; see
    `Reader`."""
    cells = table.column(LABEL)
    if empty := [row for row in rows.tolist() if not cells[row]]:
        raise InputError(f"{table.where(empty[0])} has no label: give one, or remove the row")
    found = sorted({cells[row] for row in rows.tolist()})
    if names is None:
        names = tuple(check_names(found, table.file))
        if len(names) < 2:
            raise InputError(f"{table.file} has one class, {names[0]!r}: give at least two")
    else:
        check_known(table.file, found, names, "train")
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[cells[row]] for row in rows.tolist()], np.int64), names
