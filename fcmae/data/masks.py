"""Masks: the class of each pixel of an image, in an image file of its own.

A mask has its image's size after the EXIF orientation. Here masks are (H, W) uint8: class indices,
and `IGNORE` for pixels without a class.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import Geometry
from fcmae.data.file_list import FileList, find_images
from fcmae.data.image import BadImage, reading
from fcmae.data.labelled import (
    TRAIN,
    VAL,
    LabelledData,
    Split,
    check_names,
    split_by_hash,
)
from sparse.errors import InputError, brief

Mask = npt.NDArray[np.uint8]

IGNORE = 255
IMAGES = "images"
NAMES_FILE = "classes.txt"
ADE_NAMES_FILE = "objectInfo150.txt"
ADE_CLASSES = 150

SCALED = {"L;2": 85, "L;4": 17}
"""The factor by which Pillow multiplies grey pixels of 2 and 4 bits."""

LOOKED_AT = 32
"""Number of masks that are read before a run starts."""


@dataclass(frozen=True)
class MaskLayout:
    """Where the masks of a folder of images are, and what their numbers mean.

    Attributes:
        folder: of the masks, where images are in `images`.
        inside: whether a split is a folder inside these (ADE20K's own layout), not around them.
        unpack: (numbers of a file, number of classes) → mask.
        splits: names of the folders to train and to validate on.
    """

    folder: str
    inside: bool
    unpack: Callable[[npt.NDArray[Any], int], Mask]
    splits: tuple[str, str] = (TRAIN, VAL)

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the folders of a split's images and masks; '' stands for the root itself."""
        if self.inside:
            return root / IMAGES / split, root / self.folder / split
        return root / split / IMAGES, root / split / self.folder

    def exists(self, root: Path, split: str) -> bool:
        """Return whether both folders exist."""
        return all(folder.is_dir() for folder in self.folders(root, split))


def _indices(numbers: npt.NDArray[Any], classes: int) -> Mask:
    wrong = (numbers >= classes) & (numbers != IGNORE)
    if wrong.any():
        found = int(numbers[wrong][0])
        raise BadImage(
            f"the mask has class {found}, and the {classes} classes end at {classes - 1}"
        )
    return numbers.astype(np.uint8)


def _any_object(numbers: npt.NDArray[Any], _classes: int) -> Mask:
    return (numbers > 0).astype(np.uint8)


def _from_one(numbers: npt.NDArray[Any], classes: int) -> Mask:
    """Class indices from 1; 0 is ignored."""
    if numbers.max(initial=0) > classes:
        raise BadImage(f"the mask has class {numbers.max()}, and there are {classes} classes")
    return (numbers.astype(np.int64) - 1).astype(np.uint8)


LAYOUTS = (
    MaskLayout("masks", False, _indices),
    MaskLayout("instances", False, _any_object),
    MaskLayout("annotations", True, _from_one, ("training", "validation")),
)


@dataclass(frozen=True)
class MaskLabels:
    """The masks of images, read when they are asked for.

    Args:
        files: the images; a mask has its image's key with the ending .png.
        folder: of the masks.
        layout: of the folder.
        classes: their number.
    """

    files: FileList
    folder: Path
    layout: MaskLayout
    classes: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Mask:
        """Return the whole mask of an image.

        Raises:
            BadImage: it can't be read, or has other numbers than the classes.
        """
        return self.layout.unpack(mask_numbers(self.path(index)), self.classes)

    def path(self, index: int) -> bytes:
        """Return the mask's path."""
        return os.path.join(os.fsencode(self.folder), stem(self.files.key(index)) + b".png")

    def cut(self, index: int, geometry: Geometry, img_size: tuple[int, int] | None) -> Mask:
        """Return the mask of a crop, cut and resized as its image was.

        Raises:
            BadImage: as above, or the mask has another size than its image.
        """
        mask = self[index]
        if mask.shape[::-1] != geometry.size:
            sides = [f"{w}×{h}" for w, h in (mask.shape[::-1], geometry.size)]
            raise BadImage(f"the mask has {sides[0]} pixels, its image {sides[1]}")
        if img_size is None:
            return mask
        left, top, width, height = geometry.box
        crop = torch.from_numpy(mask[top : top + height, left : left + width])[None, None]
        resized = F.interpolate(crop, size=img_size, mode="nearest-exact")[0, 0].numpy()
        down, across = (-1 if flip else 1 for flip in (geometry.flip_v, geometry.flip_h))
        return np.ascontiguousarray(resized[::down, ::across])

    def counts(self, most: int) -> npt.NDArray[np.int64]:
        """Return the number of pixels of each class in at most `most` masks, evenly chosen."""
        total = np.zeros(self.classes, np.int64)
        for index in sorted({int(i) for i in np.linspace(0, len(self) - 1, most)}):
            try:
                total += np.bincount(self[index].ravel(), minlength=IGNORE + 1)[: self.classes]
            except BadImage:
                continue  # training reports it
        return total


def stem(key: bytes) -> bytes:
    """Return a file's name without its ending."""
    return os.path.splitext(key)[0]


def find_layout(root: Path) -> MaskLayout | None:
    """Return the layout of a folder of images and masks; None if it is not one."""
    for layout in LAYOUTS:
        alone = not layout.inside and layout.exists(root, "")
        if alone or any(layout.exists(root, split) for split in layout.splits):
            return layout
    return None


def find_masks(data: str, val_fraction: float, exclude: str | None = None) -> LabelledData:
    """Find the images and masks to train and to validate on.

    Args:
        data: a folder in one of the `LAYOUTS`, or with `val_fraction` one split of it.
        val_fraction: share of the images to validate on, chosen by a hash of their paths; 0 takes
            the split for validation.
        exclude: a folder that is not searched, such as the run's own.

    Raises:
        InputError: a split is missing, images and masks do not match, no mask can be used, or all
            masks of a split have the same class.
    """
    root = Path(data).expanduser()
    layout = find_layout(root)
    if layout is None:
        expected = "train/images and train/masks (or train/instances), and the same in val"
        raise InputError(f"data {data!r} has no masks: expected {expected}")
    train, val = layout.splits
    train = train if layout.exists(root, train) else ""
    names = class_names(root, layout, train)
    learnt = find_pairs(root, layout, train, names, exclude)
    if val_fraction:
        if layout.exists(root, val):
            shown = f"leave val_fraction at 0, not {val_fraction}"
            raise InputError(f"{data!r} has its own {val}: {shown}")
        parts = split_by_hash(learnt.source, np.zeros(len(learnt.source), np.int64), val_fraction)
        first, second = (select(learnt, part) for part in parts)
        found = LabelledData(first, second, names)
    elif not train or not layout.exists(root, val):
        images, masks = layout.folders(root, val)
        raise InputError(f"{images} and {masks} are missing: add them, or give --val_fraction 0.2")
    else:
        found = LabelledData(learnt, find_pairs(root, layout, val, names, exclude), names)
    for split in (found.train, found.val):
        check_masks(split.labels, names)
    return found


def select(split: Split, part: npt.NDArray[np.int64]) -> Split:
    """Return some of the images of a split with their masks."""
    labels: MaskLabels = split.labels
    labels = replace(labels, files=labels.files.select(part))
    return Split(labels.files, split.prefix, labels)


def class_names(root: Path, layout: MaskLayout, split: str) -> tuple[str, ...]:
    """Return the classes' names, by their number.

    They are the lines of classes.txt. Without it, objects have the class `object` beside
    `background`, ADE20K has 150 classes, and others are numbered up to the highest in `split`.

    Raises:
        InputError: there are fewer than two classes, more than 255, or the file can't be read.
    """
    file, ade = root / NAMES_FILE, root / ADE_NAMES_FILE
    if layout.unpack is _any_object:
        return "background", "object"
    if file.is_file():
        names: Sequence[str] = _lines(file)
    elif layout.inside and ade.is_file():
        rows = [line.split("\t") for line in _lines(ade)[1:]]
        names = [row[-1].split(",")[0].strip() for row in rows]
    elif layout.inside:
        names = [f"class {number}" for number in range(1, ADE_CLASSES + 1)]
    else:
        folder = layout.folders(root, split)[1]
        masks = [os.path.join(os.fsencode(folder), key) for key in _mask_keys(folder)]
        names = [str(number) for number in range(_highest(masks) + 1)]
    if not 2 <= len(names) <= IGNORE:
        hint = f"; {IGNORE} means to ignore a pixel" if len(names) < 2 else ""
        raise InputError(
            f"{root} has classes up to {len(names) - 1} in its masks: number 2 to {IGNORE} classes "
            f"from 0{hint}"
        )
    return check_names(names, root)


def _lines(file: Path) -> list[str]:
    """Return the names in a file, one per line.

    Raises:
        InputError: it is not UTF-8, or has an empty line between names.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read ({error}): save it as UTF-8") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names:
        raise InputError(f"{file}, line {names.index('') + 1} is empty: name each class")
    return names


def _highest(masks: Sequence[bytes]) -> int:
    """The highest class of masks that can be read."""
    highest = 0
    for path in masks:
        try:
            numbers = mask_numbers(path)
        except BadImage:
            continue
        highest = max(highest, int(numbers[numbers != IGNORE].max(initial=0)))
    return highest


def find_pairs(
    root: Path, layout: MaskLayout, split: str, names: Sequence[str], exclude: str | None = None
) -> Split:
    """Find the images of a split with their masks.

    Raises:
        InputError: an image without a mask or the reverse, or two images for one mask.
    """
    images, folder = layout.folders(root, split)
    files = find_images(str(images), exclude)
    keys = [stem(files.key(index)) for index in range(len(files))]
    if len({*keys}) < len(keys):
        twice = brief(repr(os.fsdecode(key)) for key, n in Counter(keys).items() if n > 1)
        raise InputError(f"{images} has several images of one name: {twice}; rename them")
    masks = {*map(stem, _mask_keys(folder))}
    for what, other, lone in (
        (f"images in {images}", f"masks in {folder}", {*keys} - masks),
        (f"masks in {folder}", f"images in {images}", masks - {*keys}),
    ):
        if lone:
            shown = brief(repr(os.fsdecode(key)) for key in sorted(lone))
            raise InputError(f"{len(lone)} {what} have no {other}: {shown}; add or remove them")
    labels = MaskLabels(files, folder, layout, len(names))
    return Split(files, f"{images.relative_to(root)}/", labels)


def _mask_keys(folder: Path) -> list[bytes]:
    """Return the relative names of the masks in a folder; hidden files don't count."""
    files = find_images(str(folder), setting="masks")
    keys = [files.key(index) for index in range(len(files))]
    if odd := [key for key in keys if not key.endswith(b".png")]:
        raise InputError(f"mask {os.fsdecode(odd[0])!r} in {folder} is not a .png: convert it")
    return keys


def check_masks(labels: MaskLabels, names: Sequence[str]) -> None:
    """Look at masks until one has been used and two classes were seen; training reports single
    masks that can't be used.

    Raises:
        InputError: none of the first masks can be used, or all have the same class.
    """
    seen: set[int] = set()
    reasons = []
    for index in range(len(labels)):
        try:
            seen |= {*np.unique(labels[index]).tolist()} - {IGNORE}
        except BadImage as error:
            reasons.append(f"{os.fsdecode(labels.path(index))}: {error}")
        if len(seen) > 1:
            return
        if index + 1 == len(reasons) == min(len(labels), LOOKED_AT):
            raise InputError(f"none of the first {len(reasons)} masks can be used; {reasons[0]}")
    only = ", ".join(repr(names[number]) for number in seen) or "ignored pixels"
    raise InputError(
        f"the masks in {labels.folder} show only {only}: add masks of other classes ({IGNORE} is a "
        "pixel to ignore)"
    )


def mask_numbers(path: bytes) -> npt.NDArray[Any]:
    """Return the numbers (H, W) in a mask's file.

    Raises:
        BadImage: it can't be read, or has colours instead of numbers.
    """
    with reading(MAX_PIXELS), Image.open(path, formats=("PNG",)) as image:
        bits = image.tile[0][3] if image.tile else None
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise BadImage(f"the mask is {image.mode}, not class indices: {_colour_map(image)}")
        numbers = np.array(image)
    if bits in SCALED:
        numbers //= SCALED[bits]
    return numbers.astype(np.uint8) if numbers.dtype == np.bool_ else numbers


def voc_colours(count: int) -> npt.NDArray[np.uint8]:
    """Return Pascal VOC's colour map (count, 3): the bits of a class, spread over the channels."""
    classes, colours = np.arange(count), np.zeros((count, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (classes >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


CITYSCAPES = (
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 "
    "00008e 000046 003c64 005064 0000e6 770b20 000000"
)
"""Cityscapes' colours of its 19 classes, and of pixels without one."""


def _colour_map(image: Image.Image) -> str:
    """Say which colour map an image's colours are likely from."""
    colours = np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)
    known = {
        "shades of grey: save one channel": {(shade,) * 3 for shade in range(256)},
        "Pascal VOC's colours: convert each to its class": {
            *map(tuple, voc_colours(21).tolist()), (224, 224, 192),
        },
        "Cityscapes' colours: use its files named labelTrainIds": {
            tuple(bytes.fromhex(colour)) for colour in CITYSCAPES.split()
        },
    }  # fmt: skip
    found = {*map(tuple, colours.tolist())}
    return next(
        (name for name, map_ in known.items() if found <= map_),
        f"{len(found)} colours of an unknown map: save each pixel's class as one number",
    )
