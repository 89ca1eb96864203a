"""`fcmae samples`: a labelled image set, cut offline from the photographs in scikit-image's wheel.

A class is a photograph. Each is divided into a grid of cells with gaps between them; some cells are
for validation, the others for training, and a crop never leaves its cell. So no pixel of a
validation image is seen in training, yet both splits show all parts of the photograph.
"""

import json
import os
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps

from fcmae.atomic import check_out_folder
from fcmae.commands.samples import SamplesConfig
from fcmae.console import console, tracked
from sparse.errors import InputError

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cell": "cell.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
"""Class → file. The wheel's other images are drawings, text, blurred or tiny, or (motorcycle_right)
show the same as another."""

GRID = 4
"""Cells per side; a quarter of them, one in each row and column, is for validation."""

GAP = 0.02
"""Space between two cells, as a share of the shorter side of the photograph."""

SIDES = (0.5, 1.0)
"""Smallest and largest side of a crop, as a share of its cell's shorter side."""

GREY = 0.3
"""Share of the crops that lose their colour, since half of the photographs have none."""

STRENGTH = 0.4
"""Brightness, contrast and saturation change by a factor of at most 1 ± STRENGTH."""

MARKER = "samples.json"
"""File in the folder with the settings that made it."""

PARTIAL = ".partial"
"""Subfolder in which a set is written until it is complete."""

QUALITY = 90


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom lie outside of it."""

    left: int
    top: int
    right: int
    bottom: int


def cells(width: int, height: int, random: Random) -> dict[str, list[Box]]:
    """Divide an image of width × height pixels into the cells of "train" and of "val"."""
    margin = max(1, round(GAP * min(width, height) / 2))
    keys = [random.random() for _ in range(GRID)]  # the one stream that Python never changes
    val_columns = sorted(range(GRID), key=keys.__getitem__)
    x, y = ([i * side // GRID for i in range(GRID + 1)] for side in (width, height))
    split: dict[str, list[Box]] = {"train": [], "val": []}
    for row, column in product(range(GRID), repeat=2):
        left, top = x[column] + margin, y[row] + margin
        box = Box(left, top, x[column + 1] - margin, y[row + 1] - margin)
        split["val" if val_columns[row] == column else "train"].append(box)
    return split


def crop_boxes(name: str, width: int, height: int, config: SamplesConfig) -> dict[str, list[Box]]:
    """Return the squares that are cut from the photograph `name` for "train" and for "val"."""
    random = Random(f"{config.seed}/{name}/boxes")
    counts = {"train": config.per_class_train, "val": config.per_class_val}
    return {
        split: [square(boxes[index % len(boxes)], random) for index in range(counts[split])]
        for split, boxes in cells(width, height, random).items()
    }


def square(cell: Box, random: Random) -> Box:
    """Return a random square inside a cell."""
    width, height = cell.right - cell.left, cell.bottom - cell.top
    low, high = SIDES
    side = max(1, int((low + (high - low) * random.random()) * min(width, height)))
    left = cell.left + int(random.random() * (width - side + 1))
    top = cell.top + int(random.random() * (height - side + 1))
    return Box(left, top, left + side, top + side)


def vary(image: Image.Image, random: Random) -> Image.Image:
    """Return the image as under another light and with another camera."""
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    if random.random() < 0.5:
        image = ImageOps.flip(image)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + STRENGTH * (2 * random.random() - 1))
    if random.random() < GREY:
        image = image.convert("L").convert("RGB")
    return image


def photograph(name: str) -> Image.Image:
    """Read the photograph of a class.

    The file is located without importing scikit-image, whose functions download missing files.

    Raises:
        InputError: scikit-image, or this photograph of it, is not installed.
    """
    package = find_spec("skimage")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0] if folders else "skimage") / "data" / PHOTOGRAPHS[name]
    if not path.is_file():
        raise InputError(f"{path} is missing; it is in scikit-image: pip install 'fcmae[samples]'")
    with Image.open(path) as image:
        return image.convert("RGB")


def samples(config: SamplesConfig) -> Path:
    """Write `out`/train/CLASS/*.jpg and `out`/val/CLASS/*.jpg; return the folder.

    The bytes depend on the config alone (and on Pillow's JPEG encoder). An existing set is kept,
    and an interrupted one is written again.

    Raises:
        InputError: scikit-image is missing, or the folder holds something else.
    """
    root = check_out_folder(config.out)
    settings = {key: value for key, value in asdict(config).items() if key != "out"}
    marker = json.dumps({**settings, "complete": True}, indent=1).encode() + b"\n"
    photographs = {name: photograph(name) for name in PHOTOGRAPHS}
    total = len(photographs) * (config.per_class_train + config.per_class_val)
    if root.is_dir() and set(os.listdir(root)) - {PARTIAL}:
        file = root / MARKER
        if not file.is_file() or file.read_bytes() != marker:
            raise InputError(f"{root} is not the sample set of these settings: give a new folder")
        console.print(f"{total} sample images are in {root} already")
        return root
    partial = root / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    for name, photo in tracked(photographs.items(), len(photographs), "Writing samples"):
        write_class(partial, name, photo, config)
    for split in ("train", "val"):
        (partial / split).replace(root / split)
    (root / MARKER).write_bytes(marker)
    partial.rmdir()
    console.print(f"{total} sample images of {len(photographs)} classes are in {root}")
    return root


def write_class(root: Path, name: str, photo: Image.Image, config: SamplesConfig) -> None:
    """Cut all images of one class."""
    for split, boxes in crop_boxes(name, photo.width, photo.height, config).items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, box in enumerate(boxes):
            # Cropped before resizing: the filter must not reach over the edge of the box.
            crop = photo.crop(box).resize((config.size, config.size), Image.Resampling.BICUBIC)
            image = vary(crop, Random(f"{config.seed}/{name}/{split}/{index}"))
            image.save(folder / f"{index:04}.jpg", quality=QUALITY)
