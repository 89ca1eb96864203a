"""Image folders that experiments read: small copies, and folders of links to subsets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fcmae.data.file_list import FileList, find_images
from fcmae.data.labelled import find_classes, labels_of, split_by_hash


def shrink(data: Path, out: Path, side: int) -> Path:
    """Copy a folder of images, reducing the shorter sides of larger ones to `side` pixels.

    Decoding is most of the cost of reading: small copies make a hundred epochs cheaper.
    """
    if out.is_dir():
        return out
    files = find_images(str(data))
    with built(out) as partial:
        for index in range(len(files)):
            path = Path(os.fsdecode(files.path(index)))
            target = partial / os.fsdecode(files.key(index))
            if target.suffix.lower() != ".jpg":
                target = target.with_name(f"{target.name}.jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as picture:
                image = ImageOps.exif_transpose(picture).convert("RGB")
            scale = side / min(image.size)
            if scale < 1:
                size = (round(image.width * scale), round(image.height * scale))
                image = image.resize(size, Image.Resampling.BICUBIC)
            image.save(target, quality=95)
    return out


def with_test(data: Path, out: Path) -> Path:
    """The folder itself if it has a test split, else a folder of links with half of val as test."""
    if (data / "test").is_dir():
        return data
    if out.is_dir():
        return out
    with built(out) as partial:
        (partial / "train").symlink_to((data / "train").resolve())
        for split, chosen in zip(("val", "test"), _halves(data / "val", 0.5), strict=True):
            _link(chosen, partial / split)
    return out


def label_share(data: Path, percent: int, out: Path) -> Path:
    """A folder of links with `percent` of the training images of each class, chosen by a hash of
    their paths; val and test are unchanged, and `rest` has the other training images."""
    if percent == 100:
        return data
    if out.is_dir():
        return out
    with built(out) as partial:
        for split in ("val", "test"):
            (partial / split).symlink_to((data / split).resolve())
        for name, chosen in zip(
            ("rest", "train"), _halves(data / "train", percent / 100), strict=True
        ):
            _link(chosen, partial / name)
    return out


def mask_share(data: Path, percent: int, out: Path) -> Path:
    """A folder of links with `percent` of the training images and of their masks in `instances`,
    chosen by a hash of their paths; val and test are unchanged."""
    if percent == 100:
        return data
    if out.is_dir():
        return out
    files = find_images(str(data / "train" / "images"))
    alike = np.zeros(len(files), np.int64)
    _, part = split_by_hash(files, alike, percent / 100)
    with built(out) as partial:
        for split in ("val", "test"):
            (partial / split).symlink_to((data / split).resolve())
        for index in part.tolist():
            name = Path(os.fsdecode(files.key(index)))
            for folder, file in (("images", name), ("instances", name.with_suffix(".png"))):
                whole = (data / "train" / folder / file).resolve()
                _link({str(file): str(whole)}, partial / "train" / folder)
    return out


def tenth(data: Path, out: Path) -> Path:
    """A folder of links with a tenth of a folder of classes as train and the rest as val: with
    thousands of images for evaluation, a point or two is distinguishable from chance."""
    if out.is_dir():
        return out
    with built(out) as partial:
        for split, chosen in zip(("val", "train"), _halves(data, 0.1), strict=True):
            _link(chosen, partial / split)
    return out


def _halves(folder: Path, share: float) -> list[dict[str, str]]:
    """Images of a folder of classes, relative path → real path, in two parts with 1 - share and
    share of each class."""
    files, names = find_classes(folder)
    assert isinstance(files, FileList)
    return [
        {
            os.fsdecode(files.key(index)): os.path.realpath(os.fsdecode(files.path(index)))
            for index in part.tolist()
        }
        for part in split_by_hash(files, labels_of(files, names), share)
    ]


def _link(chosen: dict[str, str], out: Path) -> None:
    for name, path in chosen.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(path)


@contextmanager
def built(out: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `out` when it is complete."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)
