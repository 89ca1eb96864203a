"""Labelled images: what they are to training, folders of classes, tar shards and datasets.

In a folder, a class is the first folder below a split; deeper folders do not matter. In shards it
is what `KEY.cls` says. Classes are sorted by name, which is the order of the classifier's outputs;
those of a dataset keep its order.
"""

import logging
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fcmae.data.augment import Geometry
from fcmae.data.dataset_list import Splits, is_dataset, open_splits
from fcmae.data.file_list import find_images
from fcmae.data.remote import is_url
from fcmae.data.shards import find_shards, open_shards
from fcmae.data.sources import NO_LABEL, LabelledSource, Source, key_hashes
from sparse.errors import InputError, brief, did_you_mean

TRAIN, VAL = "train", "val"
DATASET_VAL = ("validation", VAL, "test")
"""Splits of a dataset that are taken for `VAL`, the first that there is."""

_LAYOUT = "train/CLASS/… and val/CLASS/…"

Labels = npt.NDArray[Any]
"""A label for each image, (N, …): a class, int64; which classes it has, bool; numbers, float64."""

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Images of one split: their source, the prefix of their names in messages, and the label of
    each: `Labels`, `MaskLabels`, or None if there are no labels."""

    source: Source
    prefix: str = ""
    labels: Any = None

    def name(self, index: int) -> str:
        """Return an image's name for messages."""
        return self.prefix + self.source.name(index)

    def target(
        self, index: int, geometry: Geometry, img_size: tuple[int, int] | None = None
    ) -> Any:
        """Return the label of a crop; None if there are no labels. Masks follow the crop."""
        if self.labels is None or isinstance(self.labels, np.ndarray):
            return None if self.labels is None else self.labels[index]
        return self.labels.cut(index, geometry, img_size)


class LabelledData(NamedTuple):
    """The images to train and to validate on, and the names of classes or targets in order."""

    train: Split
    val: Split
    names: tuple[str, ...]


class Part(NamedTuple):
    """Labelled images of one split: where they are, what precedes their names in messages, the
    images, and the names of their classes in order."""

    place: str | Path
    prefix: str
    source: Source
    names: tuple[str, ...]


def find_labelled(data: str, val_fraction: float, exclude: str | None = None) -> LabelledData:
    """Find the images to train and to validate on.

    Args:
        data: a folder with train/CLASS and val/CLASS; with `val_fraction`, a folder of classes, or
            one with train/CLASS alone; or a dataset.
        val_fraction: share of the images to validate on, chosen by a hash of their paths; 0 takes
            the folder `val`.
        exclude: a folder that is not searched, such as the run's own.

    Raises:
        InputError: a split or its images are missing, or its classes can't be learned.
    """
    if is_url(data):
        raise InputError(f"data {data!r} is not on this machine, as labelled folders have to be")
    if is_dataset(data):
        learnt, measured = _dataset_parts(data, val_fraction)
    else:
        learnt, measured = _folder_parts(data, val_fraction, exclude)
    place, prefix, source, names = learnt
    if len(names) < 2:
        raise InputError(f"{place} has one class, {names[0]!r}: give at least two")
    labels = labels_of(source, names)
    if measured is None:
        chosen, held = split_by_hash(source, labels, val_fraction)
        train, val = (Split(source.select(p), prefix, labels[p]) for p in (chosen, held))
    else:
        check_known(measured.place, measured.names, names, "train")
        train = Split(source, prefix, labels)
        val = Split(measured.source, measured.prefix, labels_of(measured.source, names))
    report_unmeasured(names, val)
    return LabelledData(train, val, names)


def _folder_parts(data: str, val_fraction: float, exclude: str | None) -> tuple[Part, Part | None]:
    """The images to train on and those to validate on, unless these are a fraction of the former.

    Raises:
        InputError: see `find_labelled`.
    """
    root = Path(data).expanduser()
    train, val = root / TRAIN, root / VAL
    needed = [root] if val_fraction else [root, train, val]
    if missing := [str(folder) for folder in needed if not folder.is_dir()]:
        hint = f"give {_LAYOUT}, or a folder of classes and --val_fraction 0.2"
        raise InputError(f"data {missing[0]!r} is not a folder: {hint}")
    prefix, folder = (f"{TRAIN}/", train) if train.is_dir() else ("", root)
    if val_fraction and val.is_dir():
        raise InputError(f"{data!r} has its own val: leave val_fraction at 0, not {val_fraction}")
    learnt = Part(folder, prefix, *find_classes(folder, exclude))
    return learnt, None if val_fraction else Part(val, f"{VAL}/", *find_classes(val, exclude))


def _dataset_parts(data: str, val_fraction: float) -> tuple[Part, Part | None]:
    """As `_folder_parts`, of a dataset."""
    splits = open_splits(data)
    if not val_fraction and (splits.split or not set(DATASET_VAL) & set(splits.tables)):
        what = "names one split" if splits.split else f"has no split {' or '.join(DATASET_VAL)}"
        raise InputError(f"data {data!r} {what}, and two are needed: give --val_fraction 0.2")
    learnt = dataset_part(splits, splits.pick())
    return learnt, None if val_fraction else dataset_part(splits, splits.pick(*DATASET_VAL))


def dataset_part(splits: Splits, split: str) -> Part:
    """Return the images of one split of a dataset that have a label.

    Raises:
        InputError: there are none.
    """
    place = f"{splits.shown}, split {split!r},"
    images = splits.images(split, labelled=True)
    source, names = _with_labels(images, place, "has no image with a label: give another split")
    return Part(place, f"{split}/", source, names)


def report_unmeasured(names: Sequence[str], val: Split) -> None:
    """Warn of classes that no image of `val` has."""
    measured = {names[label] for label in np.unique(val.labels)}
    if unseen := sorted(set(names) - measured):
        _log.warning("not in val, so never measured: %s", brief(map(repr, unseen)))


def find_classes(folder: Path, exclude: str | None = None) -> tuple[Source, tuple[str, ...]]:
    """Return the images below the class folders of `folder`, or those of its tar shards that have a
    label; and the classes' names, sorted.

    Raises:
        InputError: no class folder, one without images, no label, or names that look the same.
    """
    if shards := find_shards(str(folder)):
        reason = "has shards without labels: members like KEY.cls count"
        return _with_labels(open_shards(shards), folder, reason)
    names = _class_names(folder, exclude)
    if not names:
        raise InputError(f"{folder} has no folders: expected one per class, as in {_LAYOUT}")
    files = find_images(str(folder), exclude)
    inside = [index for index in range(len(files)) if b"/" in files.key(index)]
    if stray := len(files) - len(inside):
        _log.warning("%d images in %s are not in a class folder and are skipped", stray, folder)
        files = files.select(inside)
    counts = np.bincount(labels_of(files, names), minlength=len(names))
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        shown = brief(map(repr, empty))
        raise InputError(f"{folder} has classes without images: {shown}; remove them")
    return files, names


def _with_labels(
    source: LabelledSource, place: str | Path, reason: str
) -> tuple[Source, tuple[str, ...]]:
    """The images that have a label, and the classes that have images.

    Raises:
        InputError: no image has one, for which `reason` is the message, or see `check_names`.
    """
    labelled = np.flatnonzero(source.labels != NO_LABEL)
    if not len(labelled):
        raise InputError(f"{place} {reason}")
    if stray := len(source) - len(labelled):
        _log.warning("%d images in %s have no label and are skipped", stray, place)
    used = np.unique(source.labels[labelled]).tolist()
    names = check_names([source.classes[label] for label in used], place)
    return source.select(labelled), names


def labels_of(source: Source, names: Sequence[str]) -> Labels:
    """Return each image's class (N,) as its position in `names`: the label, or the first
    folder of its key.

    Raises:
        InputError: an image is of no class in `names`.
    """
    positions = {os.fsencode(name): position for position, name in enumerate(names)}
    found = (source.key(index).split(b"/", 1)[0] for index in range(len(source)))
    if isinstance(source, LabelledSource):
        classes = [*map(os.fsencode, source.classes)]
        found = (classes[label] for label in source.labels.tolist())
    try:
        return np.fromiter((positions[name] for name in found), np.int64, len(source))
    except KeyError as error:
        raise InputError(f"{os.fsdecode(error.args[0])!r} is not among the classes") from None


def majority_share(labels: Labels) -> float:
    """Return the share of the most frequent class in percent: the top-1 of always predicting it."""
    return float(100 * np.bincount(labels).max() / len(labels))


def at_chance(top1: float, labels: Labels) -> bool:
    """Return whether a top-1 is no better than that of always predicting the most frequent class.

    Within one standard error, that of a share of N images, they count as equal.

    Args:
        top1: in percent.
        labels: classes (N,) of the images that it was measured on.
    """
    share = majority_share(labels) / 100
    return top1 / 100 <= share + math.sqrt(share * (1 - share) / len(labels))


def split_by_hash(source: Source, labels: Labels, fraction: float) -> tuple[Labels, Labels]:
    """Return the positions to train on and those to validate on, both ascending.

    Of each class, the share `fraction` whose keys have the smallest hashes is held out: at least
    one image of two or more, and never all.

    Raises:
        InputError: every class has one image.
    """
    hashes = key_hashes(source)
    held = np.zeros(len(source), np.bool_)
    for members in np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1]):
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    if not held.any():
        raise InputError(f"val_fraction {fraction} holds nothing out: every class has one image")
    return np.flatnonzero(~held), np.flatnonzero(held)


def check_known(folder: str | Path, found: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raise InputError for classes in `folder` that `where` does not have."""
    if unknown := sorted(set(found) - set(known)):
        shown, hint = brief(map(repr, unknown)), did_you_mean(unknown[0], known)
        raise InputError(f"{folder} has classes that {where} does not have: {shown}; {hint}")


def _class_names(folder: Path, exclude: str | None) -> tuple[str, ...]:
    run = Path(exclude).resolve() if exclude else None
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir() and entry.resolve() != run)
    return check_names(names, folder)


def check_names(names: Sequence[str], where: str | Path) -> tuple[str, ...]:
    """Return the names of classes, of which each is printable and no two look the same.

    Raises:
        InputError: a name must be changed; says which, in `where`.
    """
    seen: dict[str, str] = {}
    for name in names:
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
            raise InputError(f"{where} has the class {name!r}: rename it to printable UTF-8")
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise InputError(f"{where} has similar classes {other!r} and {name!r}: rename one")
    return tuple(names)
