"""Files of objects in images: COCO's JSON, Pascal VOC's XML, YOLO's text files, label images."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml

from fcmae.data.decode import BadImage
from fcmae.data.file_list import FileList, find_images
from fcmae.data.labelled import (
    TRAIN,
    VAL,
    LabelledData,
    Split,
    check_known,
    check_names,
    split_by_hash,
)
from fcmae.data.masks import LAYOUTS, find_pairs, mask_numbers, stem
from fcmae.data.objects import ObjectLabels, decode, encode_shape, joined
from sparse.errors import InputError, brief

ALIASES = {VAL: (VAL, "valid", "validation")}
"""Names that folders and files of a split may have, if not its own."""

VOC_IMAGES = "JPEGImages"

OBJECT = "object"
"""The class of all objects in label images."""

MOST_BEYOND = 1.5
"""A box that reaches further than this many times an image's side is in pixels."""

LOOKED_AT = 1 << 24
"""Bytes of a COCO file that are searched for masks."""

COCO, VOC, YOLO, LABELS = "COCO", "Pascal VOC", "YOLO", "label images"

_log = logging.getLogger(__name__)


class Thing(NamedTuple):
    """An object as a file has it: its class, its box, whether it is a crowd, and its mask as the
    JSON of COCO's segmentation, or ''."""

    name: str
    box: Sequence[float]
    crowd: bool = False
    shape: str = ""


class Found(NamedTuple):
    """A split as its files have it.

    Attributes:
        folder: of the images.
        things: the objects of each image, by its relative path.
        names: the classes, in order.
        sizes: (width, height) of images, where they are known.
        ids: numbers of images, where they have one.
        relative: whether boxes are in shares of the sides.
        faults: (image, what is wrong) of what was left out.
    """

    folder: Path
    things: Mapping[bytes, Sequence[Thing]]
    names: tuple[str, ...]
    sizes: Mapping[bytes, tuple[int, int]] = {}
    ids: Mapping[bytes, int] = {}
    relative: bool = False
    faults: Sequence[tuple[str, str]] = ()


class Place(NamedTuple):
    """The labels of a split: the name of their format, and where they and the images are."""

    format: str
    labels: Path
    images: Path


def find_place(root: Path, split: str) -> Place | None:
    """Return where the objects of a split are; None if there are none.

    Args:
        root: the folder of the data.
        split: its name; '' takes the only one, without a folder of its own.

    Raises:
        InputError: several files could be meant.
    """
    for name in ALIASES.get(split, (split,)):
        folder = root / name
        if (file := folder / "_annotations.coco.json").is_file():
            return Place(COCO, file, folder)
        files = sorted(root.glob(f"annotations/instances_{name}*.json")) if name else []
        if len(files) > 1:
            shown = brief(file.name for file in files)
            raise InputError(f"{root} has several files for {split!r}: {shown}; keep one")
        if files:
            given = files[0].stem.removeprefix("instances_")
            places = [root / given, root / "images" / given, root / name, root / "images" / name]
            images = next((place for place in places if place.is_dir()), root / given)
            return Place(COCO, files[0], images)
        if (root / "Annotations").is_dir() and (root / VOC_IMAGES).is_dir():
            file = root / "ImageSets" / "Main" / f"{name}.txt"
            if not name or file.is_file():
                return Place(VOC, file if name else root / "Annotations", root / VOC_IMAGES)
        for images, labels in (
            (root / "images" / name, root / "labels" / name),
            (folder / "images", folder / "labels"),
        ):
            if images.is_dir() and labels.is_dir():
                return Place(YOLO, labels, images)
        if LABEL_IMAGES.exists(root, name):
            images, labels = LABEL_IMAGES.folders(root, name)
            return Place(LABELS, labels, images)
    return None


LABEL_IMAGES = next(layout for layout in LAYOUTS if layout.folder == "instances")


def find_objects(
    data: str, val_fraction: float, max_bad: float, masks: bool, exclude: str | None = None
) -> LabelledData:
    """Find images and objects to train and to validate on.

    Args:
        data: the folder.
        val_fraction: share of the images to validate on, chosen by a hash of their paths; 0 takes
            the split val.
        max_bad: largest share of the images that may be missing.
        masks: whether objects need a mask.
        exclude: a folder that is not searched, such as the run's own.

    Raises:
        InputError: a split is missing or has no object, or its labels can't be used.
    """
    root = Path(data).expanduser()
    alone = find_place(root, TRAIN) is None
    train = read_split(root, "" if alone else TRAIN, None, masks, max_bad, exclude)
    has_val = not alone and find_place(root, VAL) is not None
    if val_fraction:
        if has_val:
            raise InputError(
                f"{data!r} has its own val: leave val_fraction at 0, not {val_fraction}"
            )
        strata = np.zeros(len(train.files), np.int64)
        first, second = map(train.select, split_by_hash(train.files, strata, val_fraction))
    elif not has_val:
        raise InputError(f"{data!r} has no val: add it, or give --val_fraction 0.2")
    else:
        first, second = train, read_split(root, VAL, train.names, masks, max_bad, exclude)
    for part, labels in ((TRAIN, first), (VAL, second)):
        check_objects(labels, f"{part} of {data}")
    return LabelledData(split_of(first, root), split_of(second, root), first.names)


def split_of(labels: ObjectLabels, root: Path) -> Split:
    """Return images with objects, named in messages by their path in the folder `root`."""
    inside = os.path.relpath(labels.files.roots[0], root)
    return Split(labels.files, "" if inside == "." else f"{inside}/", labels)


def read_split(
    root: Path,
    split: str,
    names: Sequence[str] | None,
    masks: bool,
    max_bad: float = 1.0,
    exclude: str | None = None,
) -> ObjectLabels:
    """Read the objects of a split.

    Args:
        root, split: see `find_place`.
        names: the classes; None takes those of the files.
        masks, max_bad, exclude: see `find_objects`.

    Raises:
        InputError: as above, or other classes than `names`.
    """
    place = find_place(root, split)
    if place is None:
        raise InputError(f"{root} has no objects of split {split!r}: give another --split")
    if masks and place.format in (VOC, YOLO):
        raise InputError(f"{place.format} files in {root} have no masks: use --task detect")
    if place.format == LABELS:
        labels = _label_images(root, split, place, exclude)
        check_known(root, labels.names, names or labels.names, "training")
        return labels
    found = READERS[place.format](root, place, exclude)
    if not found.things:
        raise InputError(f"{place.labels} names no images")
    check_known(place.labels, found.names, names or found.names, "training")
    _check_files(found, place, max_bad)
    return _labels_of(found, place, tuple(names or found.names), masks)


def check_objects(labels: ObjectLabels, where: str) -> None:
    """Raise InputError if no object can be learned or found."""
    if labels.folder:
        there = any(_has_object(labels, index) for index in range(len(labels)))
    else:
        there = len(labels.boxes) > 0
    if not there:
        raise InputError(f"{where} has no object: label some, or choose other images")
    if labels.crowd.all() and not labels.folder:
        raise InputError(f"every object in {where} is a crowd: label single ones")


def _has_object(labels: ObjectLabels, index: int) -> bool:
    try:
        return bool(mask_numbers(labels.label_image(index)).any())
    except BadImage:
        return False  # training reports it


def image_ids(images: str) -> dict[bytes, int]:
    """Return the numbers of images in a folder, by relative path, if a COCO file there or beside it
    has them; else nothing."""
    folder = Path(images).expanduser()
    near = [folder / "_annotations.coco.json"]
    near += [folder.parent / "annotations" / f"instances_{folder.name}.json"]
    file = next((file for file in near if file.is_file()), None)
    return {} if file is None else dict(_read_coco(folder, Place(COCO, file, folder), None).ids)


def _label_images(root: Path, split: str, place: Place, exclude: str | None) -> ObjectLabels:
    files = find_pairs(root, LABEL_IMAGES, split, (OBJECT,), exclude).source
    assert isinstance(files, FileList)
    none = np.zeros(0, np.int64)
    return ObjectLabels(
        files, (OBJECT,), np.arange(len(files)), np.zeros((len(files), 2), np.int64),
        np.zeros(len(files) + 1, np.int64), np.zeros((0, 4)), none, none.astype(bool),
        np.zeros(0, np.uint8), np.zeros(1, np.int64), str(place.labels),
    )  # fmt: skip


def _check_files(found: Found, place: Place, max_bad: float) -> None:
    """Report images that are missing: they count as unreadable."""
    folder = os.fsencode(found.folder)
    missing = [key for key in found.things if not os.path.exists(os.path.join(folder, key))]
    if missing:
        names = brief(repr(os.fsdecode(key)) for key in missing)
        what = f"{len(missing)} of {len(found.things)} images of {place.labels} are not there"
        if len(missing) > max_bad * len(found.things) or len(missing) == len(found.things):
            raise InputError(f"{what}: {names}; they are looked for in {found.folder}")
        _log.warning("%s: %s", what, names)


def _labels_of(found: Found, place: Place, names: tuple[str, ...], masks: bool) -> ObjectLabels:
    """Put swapped corners in order, clamp boxes to the image, leave out those without an area or a
    usable mask, and count all of these."""
    numbers = {name: number for number, name in enumerate(names)}
    faults = list(found.faults)
    starts, kept, boxes = [0], [], []
    for key in sorted(found.things):
        image, size = os.fsdecode(key), found.sizes.get(key)
        for thing in found.things[key]:
            box, fault = _clean(thing.box, (1, 1) if found.relative else size)
            problem = _problem(thing.shape, size) if masks else ""
            if fault:
                faults.append((image, fault))
            if box is None or problem:
                faults += [(image, problem)] if problem else []
                continue
            kept.append(thing)
            boxes.append(box)
        starts.append(len(kept))
    for what, count in Counter(what for _, what in faults).items():
        _log.warning("%d objects in %s: %s", count, place.labels, what)
    keys = sorted(found.things)
    blob, shape_starts = joined(thing.shape.encode() if masks else b"" for thing in kept)
    return ObjectLabels(
        FileList.of(os.path.abspath(found.folder), keys), names,
        np.array([found.ids.get(key, n) for n, key in enumerate(keys)], np.int64),
        np.array([found.sizes.get(key, (0, 0)) for key in keys], np.int64),
        np.array(starts, np.int64), np.array(boxes, np.float64).reshape(-1, 4),
        np.array([numbers[thing.name] for thing in kept], np.int64),
        np.array([thing.crowd for thing in kept], bool), blob, shape_starts,
        relative=found.relative, faults=tuple(faults),
    )  # fmt: skip


def _clean(
    box: Sequence[float], size: tuple[int, int] | None
) -> tuple[tuple[float, ...] | None, str]:
    """A box with corners in order and inside the image, None if it has no area; and its fault."""
    if not np.isfinite(box).all():
        return None, "left out, since a number of the box is missing or not finite"
    left, right = sorted((box[0], box[2]))
    top, bottom = sorted((box[1], box[3]))
    fault = "" if (left, top) == tuple(box[:2]) else "corners are swapped, put in order"
    limits = size or (np.inf, np.inf)
    inside = max(left, 0.0), max(top, 0.0), min(right, limits[0]), min(bottom, limits[1])
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return None, "left out, since the box has no area inside the image"
    beyond = max(abs(a - b) for a, b in zip(inside, (left, top, right, bottom), strict=True))
    if beyond > 1e-3 * max(1, min(limits[0], limits[1], 1e3)):
        fault = "clamped, since the box is partly outside the image"
    return inside, fault


def _problem(shape: str, size: tuple[int, int] | None) -> str:
    """What is wrong with a mask; '' if nothing is."""
    segmentation = json.loads(shape) if shape else None
    if not segmentation:
        return "left out, since it has no mask"
    try:
        if isinstance(segmentation, list):
            if min(map(len, segmentation)) < 6 or any(len(part) % 2 for part in segmentation):
                return "left out, since a polygon has fewer than three points"
            encode_shape(segmentation, (8, 8))
        elif size is not None and tuple(segmentation["size"][::-1]) != size:
            return "left out, since the mask has another size than the image"
        else:
            decode(encode_shape(segmentation, tuple(segmentation["size"][::-1])))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        return "left out, since its mask can't be read"
    return ""


def has_polygons(file: Path) -> bool:
    """Return whether a COCO file has masks, by its beginning."""
    with file.open("rb") as opened:
        return re.search(rb'"segmentation"\s*:\s*(\[\s*\[|\{)', opened.read(LOOKED_AT)) is not None


# Formats


def _read_coco(_root: Path, place: Place, _exclude: str | None) -> Found:
    file = place.labels
    try:
        data = json.loads(file.read_bytes())
        images = {int(image["id"]): image for image in data["images"]}
        classes = {int(item["id"]): str(item["name"]) for item in data["categories"]}
        things: dict[bytes, list[Thing]] = {
            os.fsencode(image["file_name"]): [] for image in images.values()
        }
        if len(things) < len(data["images"]):
            counts = Counter(image["file_name"] for image in data["images"])
            raise InputError(f"{file} has {counts.most_common(1)[0][0]!r} twice: remove one")
        faults = []
        for item in data["annotations"]:
            image, name = images.get(item["image_id"]), classes.get(item["category_id"])
            if image is None or name is None:
                missing = "image" if image is None else "category"
                what = f"left out, since their {missing} is not listed"
                faults.append((f"object {item.get('id')}", what))
                continue
            x, y, w, h = map(float, item["bbox"])
            shape = json.dumps(item["segmentation"]) if item.get("segmentation") else ""
            thing = Thing(name, (x, y, x + w, y + h), bool(item.get("iscrowd")), shape)
            things[os.fsencode(image["file_name"])].append(thing)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is not a COCO file ({type(error).__name__}: {error}): it needs images, "
            "annotations with image_id, category_id and bbox, and categories"
        ) from error
    sizes, ids = {}, {}
    for number, image in images.items():
        key = os.fsencode(image["file_name"])
        ids[key] = number
        if image.get("width") and image.get("height"):
            sizes[key] = int(image["width"]), int(image["height"])
    names = check_names(sorted(classes.values()), file)
    return Found(place.images, things, tuple(names), sizes, ids, faults=faults)


def _read_voc(root: Path, place: Place, exclude: str | None) -> Found:
    files = find_images(str(place.images), exclude)
    keys = {stem(files.key(index)): files.key(index) for index in range(len(files))}
    if place.labels.is_dir():
        wanted = sorted(path.stem for path in place.labels.glob("*.xml"))
    else:
        wanted = [line.split()[0] for line in _lines_of(place.labels)]
    things, sizes = {}, {}
    for name in wanted:
        file = root / "Annotations" / f"{name}.xml"
        key = keys.get(os.fsencode(name), os.fsencode(f"{name}.jpg"))
        try:
            tree = ElementTree.parse(file).getroot()
            size = tree.find("size")
            if size is not None and int(size.findtext("width", "0")):
                sizes[key] = int(size.findtext("width", "")), int(size.findtext("height", ""))
            things[key] = [_voc_thing(item) for item in tree.iter("object")]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise InputError(f"{file} is not a Pascal VOC file ({error}): restore it") from error
    found = {thing.name for inside in things.values() for thing in inside}
    return Found(place.images, things, tuple(check_names(sorted(found), root)), sizes)


def _voc_thing(item: ElementTree.Element) -> Thing:
    """An object of a Pascal VOC file, whose pixels count from 1, the last one included."""
    corners = [float(item.findtext(f"bndbox/{side}", "nan")) for side in
               ("xmin", "ymin", "xmax", "ymax")]  # fmt: skip
    (left, right), (top, bottom) = (sorted(corners[side::2]) for side in (0, 1))
    box = max(left - 1, 0), max(top - 1, 0), right, bottom
    if (left, top) != (corners[0], corners[1]):
        box = box[2], box[3], box[0], box[1]  # still swapped, to be counted
    return Thing(item.findtext("name", ""), box, item.findtext("difficult", "0") == "1")


def _read_yolo(root: Path, place: Place, exclude: str | None) -> Found:
    files = find_images(str(place.images), exclude)
    boxes: dict[bytes, list[tuple[int, Sequence[float]]]] = {}
    unlabelled = 0
    for index in range(len(files)):
        key = files.key(index)
        boxes[key] = []
        file = place.labels / f"{os.fsdecode(stem(key))}.txt"
        if not file.is_file():
            unlabelled += 1
            continue
        for row, line in enumerate(_lines_of(file), 1):
            try:
                number, *values = line.split()
                boxes[key].append((int(number), _yolo_box([*map(float, values)])))
            except ValueError as error:
                raise InputError(
                    f"{file}, line {row} has {line[:40]!r}: expected a class and the box's centre "
                    f"and sides ({error})"
                ) from error
    numbered = [entry for inside in boxes.values() for entry in inside]
    beyond = sum(max(box) > MOST_BEYOND for _, box in numbered)
    if beyond > len(numbered) / 2:
        raise InputError(
            f"{place.labels} has pixels, not shares of the image's sides, in {beyond} of "
            f"{len(numbered)} boxes: divide them by the width and the height"
        )
    if unlabelled:
        _log.info("%d images without a file in %s have no objects", unlabelled, place.labels)
    names = _yolo_names(root, max((number for number, _ in numbered), default=0) + 1)
    things = {
        key: [Thing(names[number], box) for number, box in inside] for key, inside in boxes.items()
    }
    return Found(place.images, things, tuple(sorted(names)), relative=True)


def _yolo_box(values: Sequence[float]) -> Sequence[float]:
    """Corners of a box given by its centre and sides, or around a polygon."""
    if len(values) == 4:
        x, y, w, h = values
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers after the class")
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _yolo_names(root: Path, least: int) -> tuple[str, ...]:
    """Names by number: from data.yaml or classes.txt, else the numbers, at least `least`."""
    file = next((path for path in sorted(root.glob("*.yaml"))), root / "classes.txt")
    names: Any = [str(number) for number in range(least)]
    if file.suffix == ".yaml":
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            names = content["names"]
            names = [names[key] for key in sorted(names)] if isinstance(names, dict) else names
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise InputError(
                f"{file} has no list of names ({error}): add 'names: [...]'"
            ) from error
    elif file.is_file():
        names = [line.strip() for line in _lines_of(file)]
    if len(names) < least:
        raise InputError(f"{file} has {len(names)} names, and the labels class {least - 1}: add it")
    return tuple(check_names([*map(str, names)], file))


def _lines_of(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read ({error}): restore it") from error


READERS: dict[str, Callable[[Path, Place, str | None], Found]] = {
    COCO: _read_coco,
    VOC: _read_voc,
    YOLO: _read_yolo,
}
