"""The labels of a run or of a command: which file or folder, which kind, which images."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fcmae.atomic import atomic_write
from fcmae.config.files import read_yaml
from fcmae.data.dataset_list import is_dataset
from fcmae.data.file_list import FileList, find_images
from fcmae.data.find import load_source
from fcmae.data.labelled import TRAIN, VAL, LabelledData, Labels, Split
from fcmae.data.masks import IMAGES, MaskLabels
from fcmae.data.names import Named
from fcmae.data.object_files import VOC_IMAGES
from fcmae.data.objects import ObjectLabels
from fcmae.data.sources import Source
from fcmae.data.table import Table, find_in_table, labels_file, read_table
from fcmae.train.checkpoint import STATE, SavedCheckpoint, list_checkpoints
from fcmae.train.resume import stored_source
from fcmae.train.run_paths import RunPaths
from fcmae.weights.read import read_json
from finetune.config import FinetuneConfig
from finetune.tasks import TASKS
from finetune.tasks.base import LabelKind
from finetune.tuned import Tuned
from sparse.errors import InputError

_log = logging.getLogger(__name__)


def open_labels(config: Any) -> Table | Path:
    """Return the labels that a config names: the rows of a CSV file, or a folder.

    Raises:
        InputError: the file is no table of labels.
    """
    file = labels_file(config)
    return Path(config.data).expanduser() if file is None else read_table(file)


def check_task(task: str) -> None:
    """Raise InputError for a task that is unknown."""
    if task not in ("auto", *TASKS):
        raise InputError(f"task {task!r} is unknown: use auto or {', '.join(TASKS)}")


def resolve_task(task: str, labels: Table | Path) -> type[LabelKind]:
    """Return the kind of label that a config asks for; `auto` is recognised by the layout.

    Raises:
        InputError: the layout is that of several kinds, or of none.
    """
    if task != "auto":
        return TASKS[task]
    fits = [kind for kind in TASKS.values() if kind.recognises(labels)]
    shown = labels.file if isinstance(labels, Table) else labels
    if len(fits) != 1:
        choices = "; ".join(
            f"--task {kind.task} ({kind.layout})" for kind in fits or TASKS.values()
        )
        many = "several kinds" if fits else "no kind"
        raise InputError(f"{str(shown)!r} has the layout of {many} of label: choose {choices}")
    what = "is a dataset" if is_dataset(labels) else f"has the layout of {fits[0].layout}"
    _log.info("task %s, as %s %s", fits[0].task, shown, what)
    return fits[0]


def find_labels(
    kind: type[LabelKind], config: FinetuneConfig, labels: Table | Path
) -> LabelledData:
    """Find the images to train and to validate on.

    Raises:
        InputError: there are none, or their labels can't be learned.
    """
    if isinstance(labels, Path):
        if is_dataset(labels) and not kind.recognises(labels):
            raise kind.not_labels(labels)
        return kind.find_folder(config)
    return find_in_table(labels, config.val_fraction, kind.read, config.max_bad)


def save_labels(data: LabelledData, paths: RunPaths) -> None:
    """Store the labels of a run beside its lists of images, and list objects with faults; masks
    stay where they are."""
    faults = [
        {"split": part, "image": image, "reason": what}
        for part, split in ((TRAIN, data.train), (VAL, data.val))
        if isinstance(split.labels, ObjectLabels)
        for image, what in split.labels.faults
    ]
    paths.bad_labels.unlink(missing_ok=True)
    if faults:
        with atomic_write(paths.bad_labels) as path:
            path.write_text("".join(f"{json.dumps(fault)}\n" for fault in faults))
    for part, split in ((TRAIN, data.train), (VAL, data.val)):
        if isinstance(split.labels, MaskLabels):
            paths.labels(part).unlink(missing_ok=True)  # of an earlier run that saved nothing else
            continue
        with atomic_write(paths.labels(part)) as path, path.open("wb") as file:
            if isinstance(split.labels, ObjectLabels):
                np.savez_compressed(file, **split.labels.arrays())  # type: ignore[arg-type]
            else:
                np.save(file, split.labels)


def stored_labels(
    kind: type[LabelKind], config: FinetuneConfig, start: SavedCheckpoint
) -> LabelledData:
    """Return the images and labels that a resumed run began with.

    Raises:
        InputError: the lists are missing, damaged or of another run, or a folder of images is gone.
    """
    names = tuple(start.state["settings"]["label_names"])
    train, val = (stored_source(start, part) for part in (TRAIN, VAL))
    if labels_file(config) is None and not _is_there(config.data):
        raise InputError(f"data {config.data!r} is not a folder any more: put a link there")
    paths = RunPaths(start.path.parent.parent)
    first, second = (
        Split(files, prefix_of(files, config), _labels(paths, part, kind, files, names))
        for part, files in ((TRAIN, train), (VAL, val))
    )
    # A folder of photographs with objects may be that of all splits.
    if labels_file(config) is None and not isinstance(first.labels, ObjectLabels):
        report_added([train, val], exclude=config.out)
    return LabelledData(first, second, names)


def report_added(stored: Sequence[Source], exclude: str) -> None:
    """Log how many images in the folders of a run are not part of it."""
    lists = [files for files in stored if isinstance(files, FileList)]
    roots = sorted({root for files in lists for root in files.roots})
    there = sum(len(find_images(root, exclude)) for root in roots if os.path.isdir(root))
    added = there - sum(map(len, lists))
    if added > 0:
        _log.info("%d images are ignored: added since the run began, or skipped then", added)


def prefix_of(files: Source, config: Any) -> str:
    """Return what precedes the names of images in messages: their folder in `config.data`."""
    assert isinstance(files, Named)
    return "" if labels_file(config) else files.prefix(config.data)


def _is_there(data: str) -> bool:
    """Whether it is a dataset, which says itself what is wrong with it, or a folder that exists."""
    return is_dataset(data) or Path(data).expanduser().is_dir()


class Measured(NamedTuple):
    """Images to measure on, with labels as targets; the name of their split; and whether they are
    those that a run held out."""

    split: Split
    name: str
    held_out: bool


def find_split(config: Any, tuned: Tuned) -> Measured:
    """Find the images to measure on.

    A run that divided its data by `val_fraction`, or what it exported, is measured on the images
    that it held out then, whatever was added or removed since. A run remembers its CSV file: it
    need not be named again for the same data.

    Raises:
        InputError: no images, labels that the model does not know, or the run's list of the images
            is missing.
    """
    kind, run = tuned.kind, RunPaths(tuned.folder.parent)
    asked, file, folder = _asked(run), labels_file(config), Path(config.data).expanduser()
    if file is None and asked.labels and _same(folder, asked.data):
        file = asked.labels
        _log.info("labels are those of %s, as in training", file)
    place, name = Path(file or folder).expanduser(), "."
    if file is None and not _is_there(config.data):
        raise InputError(f"data {config.data!r} is not a folder: use one with {config.split}/CLASS")
    divided = asked.val_fraction and config.split == VAL and (file or not (folder / VAL).is_dir())
    held_out = bool(divided) and _same(place, labels_file(asked) or asked.data)
    if divided and not held_out:
        _log.warning("all of %s is measured: the run held out images of other data", place)
    if held_out:
        files = load_source(run.images(VAL))
        _log.info("measuring on the %d images that the run held out", len(files))
        labels = _labels(run, VAL, type(kind), files, kind.names)
        split = Split(files, "" if file else prefix_of(files, config), labels)
    elif file is None:
        split = kind.find_split(folder, config.split, kind.names)
    else:
        table = read_table(place)
        rows = table.rows(config.split)
        if table.splits is None:
            _log.info("%s has no column 'split': all of its rows are measured", place)
        else:
            name = config.split
        table.check_images(rows)
        labels, _ = kind.read(table, rows, kind.names)
        split = Split(table.source.select(rows), "", labels)
    targets = kind.encode(split.labels)
    folders = [part for part in split.prefix.split("/") if part not in ("", IMAGES)]
    if folders == [VOC_IMAGES]:  # of all splits
        folders = [config.split]
    return Measured(split._replace(labels=targets), "/".join(folders) or name, held_out)


def _asked(run: RunPaths) -> SimpleNamespace:
    """The data of a run, its CSV file and its division; empty if there is no run."""
    newest = next(iter(list_checkpoints(run.checkpoints)), run.root)
    asked = read_json(newest / STATE).get("asked")  # with absolute paths
    if asked is None:
        asked = read_yaml(run.config) if run.config.is_file() else {}
    data = asked.get("data", "")
    return SimpleNamespace(
        data=data[0] if isinstance(data, list) else data,
        labels=asked.get("labels"),
        val_fraction=asked.get("val_fraction", 0),
    )


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _labels(
    run: RunPaths, part: str, kind: type[LabelKind], files: Source, names: tuple[str, ...]
) -> Labels:
    """The labels of images whose list a run has stored.

    Raises:
        InputError: they are damaged.
    """
    path = run.labels(part)
    if not path.is_file():
        return kind.labels_of(files, names)
    try:
        labels = np.load(path, allow_pickle=False)
        if not isinstance(labels, np.ndarray):
            assert isinstance(files, FileList)
            labels = ObjectLabels.stored(files, names, labels)
    except Exception as error:  # a damaged archive raises nearly anything
        raise InputError(f"labels {str(path)!r} are damaged ({error}): restore them") from error
    if len(labels) != len(files):
        raise InputError(f"labels {str(path)!r} are not of this run: restore them or start over")
    return labels
