"""Files of objects in images: COCO's JSON, Pascal VOC's XML, YOLO's text files, label images."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml

from fcmae.data.file_list import FileList, find_images
from fcmae.data.image import BadImage
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
        relative: whether boxes are in shares of the sides.
        faults: (image, what is wrong) of what was left out.
    """

    folder: Path
    things: Mapping[bytes, Sequence[Thing]]
    names: tuple[str, ...]
    sizes: Mapping[bytes, tuple[int, int]] = {}
    relative: bool = False
    faults: Sequence[tuple[str, str]] = ()


class Place(NamedTuple):
    """The labels of a split: the name of their format, where they and the images are, and the name
    that the split has there."""

    format: str
    labels: Path
    images: Path
    split: str


LABEL_IMAGES = next(layout for layout in LAYOUTS if layout.folder == "instances")


def find_place(root: Path, split: str) -> Place | None:
    """Return where the objects of a split are; None if there are none.

    Args:
        root: the folder of the data.
        split: its name; '' takes a folder that is not divided.

    Raises:
        InputError: several files could be meant.
    """
    lists = root / "ImageSets" / "Main"
    for name in ALIASES.get(split, (split,)):
        folder = root / name
        if (file := folder / "_annotations.coco.json").is_file():
            return Place(COCO, file, folder, name)
        # Not those of other splits, such as trainval.
        files = sorted(root.glob(f"annotations/instances_{name}*.json")) if name else []
        files = [file for file in files if re.fullmatch(rf"instances_{name}[^a-z]*", file.stem)]
        if len(files) > 1:
            shown = brief(file.name for file in files)
            raise InputError(f"{root} has several files for {split!r}: {shown}; keep one")
        if files:
            given = files[0].stem.removeprefix("instances_")
            places = [root / given, root / "images" / given, root / name, root / "images" / name]
            images = next((place for place in places if place.is_dir()), root / given)
            return Place(COCO, files[0], images, name)
        if (root / "Annotations").is_dir() and (root / VOC_IMAGES).is_dir():
            file = lists / f"{name}.txt" if name else root / "Annotations"
            if file.is_file() or (not name and not any(lists.glob("*.txt"))):
                return Place(VOC, file, root / VOC_IMAGES, name)
        for images, labels in (
            (root / "images" / name, root / "labels" / name),
            (folder / "images", folder / "labels"),
        ):
            divided = (
                not name and images.is_dir() and any(part.is_dir() for part in images.iterdir())
            )
            if images.is_dir() and labels.is_dir() and not divided:
                return Place(YOLO, labels, images, name)
        if LABEL_IMAGES.exists(root, name):
            images, labels = LABEL_IMAGES.folders(root, name)
            return Place(LABELS, labels, images, name)
    return None


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
        labels = _label_images(root, place, masks, exclude)
        check_known(root, labels.names, names or labels.names, "training")
        return labels
    found = READERS[place.format](root, place, masks, exclude)
    if not found.things:
        raise InputError(f"{place.labels} names no images")
    check_known(place.labels, found.names, names or found.names, "training")
    _check_files(found, place, max_bad)
    return _labels_of(found, place, tuple(names or found.names), masks)


def check_objects(labels: ObjectLabels, where: str) -> None:
    """Raise InputError if no object can be learned or found."""
    reason = ""
    there = len(labels.boxes) > 0
    for index in range(len(labels) if labels.folder else 0):
        try:
            there = bool(mask_numbers(labels.label_image(index)).any())
        except BadImage as error:
            reason = reason or f"; {os.fsdecode(labels.label_image(index))}: {error}"
        if there:
            break
    if not there:
        raise InputError(f"{where} has no object: label some, or choose other images{reason}")
    if labels.crowd.all() and not labels.folder:
        raise InputError(f"every object in {where} is a crowd: label single ones")


def image_ids(images: str) -> dict[bytes, int]:
    """Return the numbers of images in a folder, by relative path, if a COCO file there or beside it
    has them; else nothing.

    Raises:
        InputError: the file can't be read.
    """
    folder = Path(images).expanduser()
    near = [folder / "_annotations.coco.json"]
    near += [folder.parent / "annotations" / f"instances_{folder.name}.json"]
    file = next((file for file in near if file.is_file()), None)
    if file is None:
        return {}
    try:
        return {
            os.fsencode(i["file_name"]): int(i["id"])
            for i in json.loads(file.read_bytes())["images"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{file} is not a COCO file ({type(error).__name__}: {error})"
        raise InputError(f"{what}: move it elsewhere, or restore it") from error


def _label_images(root: Path, place: Place, masks: bool, exclude: str | None) -> ObjectLabels:
    files = find_pairs(root, LABEL_IMAGES, place.split, (OBJECT,), exclude).source
    assert isinstance(files, FileList)
    none = np.zeros(0, np.int64)
    return ObjectLabels(
        files, (OBJECT,), np.zeros((len(files), 2), np.int64), np.zeros(len(files) + 1, np.int64),
        np.zeros((0, 4)), none, none.astype(bool), np.zeros(0, np.uint8), np.zeros(1, np.int64),
        folder=os.path.abspath(place.labels), has_masks=masks,
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
        np.array([found.sizes.get(key, (0, 0)) for key in keys], np.int64),
        np.array(starts, np.int64), np.array(boxes, np.float64).reshape(-1, 4),
        np.array([numbers[thing.name] for thing in kept], np.int64),
        np.array([thing.crowd for thing in kept], bool), blob, shape_starts,
        relative=found.relative, has_masks=masks, faults=tuple(faults),
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
    except Exception:  # noqa: BLE001 - the library raises several kinds
        return "left out, since its mask can't be read"
    return ""


def has_polygons(file: Path) -> bool:
    """Return whether a COCO file has a mask."""
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        return re.search(rb'"segmentation"\s*:\s*(\[\s*\[|\{)', content) is not None


# Formats


def _read_coco(_root: Path, place: Place, masks: bool, _exclude: str | None) -> Found:
    file = place.labels
    try:
        data = json.loads(file.read_bytes())
        images = {int(image["id"]): image for image in data["images"]}
        classes = {int(item["id"]): str(item["name"]) for item in data["categories"]}
        keys = {number: os.fsencode(image["file_name"]) for number, image in images.items()}
        sizes = {
            keys[number]: (int(image["width"]), int(image["height"]))
            for number, image in images.items()
            if image.get("width") and image.get("height")
        }
        things: dict[bytes, list[Thing]] = {key: [] for key in keys.values()}
        faults = []
        for item in data["annotations"]:
            key, name = keys.get(int(item["image_id"])), classes.get(int(item["category_id"]))
            box = item.get("bbox") or ()
            if key is None or name is None or len(box) != 4 or None in box:
                missing = "image" if key is None else "category" if name is None else "box"
                of = f"object {item.get('id')}" if key is None else os.fsdecode(key)
                faults.append((of, f"left out, since their {missing} is missing"))
                continue
            x, y, w, h = map(float, box)
            shape = json.dumps(item.get("segmentation") or "") if masks else ""
            things[key].append(
                Thing(name, (x, y, x + w, y + h), int(item.get("iscrowd", 0)) > 0, shape)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is not a COCO file ({type(error).__name__}: {error}): it needs images, "
            "annotations with image_id, category_id and bbox, and categories"
        ) from error
    for what, values, count in (
        ("id", [image["id"] for image in data["images"]], len(images)),
        ("file_name", [image["file_name"] for image in data["images"]], len(things)),
    ):
        if count < len(values):
            twice = Counter(values).most_common(1)[0][0]
            raise InputError(f"{file} has the {what} {twice!r} twice: remove an image")
    names = check_names(sorted({*classes.values()}), file)
    return Found(place.images, things, names, sizes, faults=faults)


def _read_voc(root: Path, place: Place, _masks: bool, exclude: str | None) -> Found:
    files = find_images(str(place.images), exclude)
    keys = {stem(files.key(index)): files.key(index) for index in range(len(files))}
    if place.labels.is_dir():
        wanted = sorted(path.stem for path in place.labels.glob("*.xml"))
    else:  # a line may end with 1 or -1, as in lists of one class
        wanted = [re.sub(r"\s+-?\d$", "", line.strip()) for line in _lines_of(place.labels)]
    things, sizes, faults = {}, {}, []
    for name in wanted:
        file = root / "Annotations" / f"{name}.xml"
        key = keys.get(os.fsencode(name), os.fsencode(f"{name}.jpg"))
        try:
            tree = ElementTree.parse(file).getroot()
            sides = [int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height")]
            found = [_voc_thing(item) for item in tree.iter("object")]
        except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
            raise InputError(f"{file} is not a Pascal VOC file ({error}): restore it") from error
        if all(sides):
            sizes[key] = sides[0], sides[1]
        things[key] = [thing for thing in found if thing.name]
        nameless = len(found) - len(things[key])
        faults += nameless * [(os.fsdecode(key), "left out, since they have no name")]
    names = {thing.name for inside in things.values() for thing in inside}
    return Found(place.images, things, check_names(sorted(names), root), sizes, faults=faults)


def _voc_thing(item: ElementTree.Element) -> Thing:
    """An object of a Pascal VOC file, whose pixels count from 1, the last one included."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    corners = [float(item.findtext(f"bndbox/{side}") or "nan") for side in sides]
    box = list(corners)
    for axis in (0, 1):
        low = min(corners[axis::2])
        first = axis if corners[axis] == low else axis + 2  # where corners are swapped
        box[first] = low - 1 if low >= 1 else low  # some files count from 0
    difficult = (item.findtext("difficult") or "0").strip() == "1"
    return Thing((item.findtext("name") or "").strip(), box, difficult)


def _read_yolo(root: Path, place: Place, _masks: bool, exclude: str | None) -> Found:
    files = find_images(str(place.images), exclude)
    keys = {os.fsdecode(stem(files.key(n))): files.key(n) for n in range(len(files))}
    texts = {
        str(path.relative_to(place.labels).with_suffix("")): path
        for path in sorted(place.labels.rglob("*.txt"))
        if path.name != "classes.txt"
    }
    if lone := sorted(texts.keys() - keys.keys()):
        shown = brief(map(repr, lone))
        raise InputError(
            f"{len(lone)} files in {place.labels} have no image in {place.images}: {shown}; add or "
            "remove them"
        )
    names, boxes = _yolo_names(root), []
    for name, file in texts.items():
        for row, line in enumerate(_lines_of(file), 1):
            try:
                first, *values = line.split()
                number, box = int(first), _yolo_box([*map(float, values)])
            except ValueError as error:
                raise InputError(
                    f"{file}, line {row} has {line[:40]!r}: expected a class and the box's centre "
                    f"and sides ({error})"
                ) from error
            if number < 0 or (names and number not in names):
                there = brief(map(str, sorted(names)), 8) or "numbers from 0"
                raise InputError(f"{file}, line {row} has class {number}: the classes are {there}")
            boxes.append((keys[name], number, box))
    beyond = sum(max(box) > MOST_BEYOND for *_, box in boxes)
    if beyond > len(boxes) / 2:
        raise InputError(
            f"{place.labels} has pixels, not shares of the image's sides, in {beyond} of "
            f"{len(boxes)} boxes: divide them by the width and the height"
        )
    if unlabelled := len(keys) - len(texts):
        _log.info("%d images without a file in %s have no objects", unlabelled, place.labels)
    names = names or {number: str(number) for number in sorted({n for _, n, _ in boxes})}
    things: dict[bytes, list[Thing]] = {key: [] for key in keys.values()}
    for key, number, box in boxes:
        things[key].append(Thing(names[number], box))
    return Found(place.images, things, check_names(sorted({*names.values()}), root), relative=True)


def _yolo_box(values: Sequence[float]) -> Sequence[float]:
    """Corners of a box given by its centre and sides, or around a polygon."""
    if len(values) == 4:
        x, y, w, h = values
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers after the class")
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _yolo_names(root: Path) -> dict[int, str]:
    """Names by number, from data.yaml, another .yaml file, or classes.txt; else none."""
    file = next(
        (path for path in (root / "data.yaml", *sorted(root.glob("*.yaml"))) if path.is_file()),
        root / "classes.txt",
    )
    if file.suffix == ".yaml":
        try:
            names = yaml.safe_load(file.read_text(encoding="utf-8"))["names"]
            given = names if isinstance(names, dict) else dict(enumerate([*names]))
            if isinstance(names, str):
                raise TypeError("it is one text")
            return {int(number): str(name) for number, name in given.items()}
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            what = f"{file} has no list of names ({error}): add 'names: [...]'"
            raise InputError(what) from error
    if file.is_file():
        return dict(enumerate(line.strip() for line in _lines_of(file)))
    return {}


def _lines_of(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read ({error}): restore it") from error


READERS: dict[str, Callable[[Path, Place, bool, str | None], Found]] = {
    COCO: _read_coco,
    VOC: _read_voc,
    YOLO: _read_yolo,
}
