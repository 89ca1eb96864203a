"""Labelled folders: classes, splits and refused input."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcmae.data.labelled import find_classes, find_labelled, labels_of, split_by_hash
from sparse.errors import InputError


def touch(root: Path, *names: str) -> Path:
    """Create empty files: finding them does not read them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number}.jpg" for number in range(count)]


def test_a_class_is_the_first_folder_of_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.jpg", "train/a/deep/er/2.jpg", "train/a/0.jpg", "val/a/3.jpg")
    touch(tmp_path, "val/b/4.jpg", "train/.hidden/5.jpg", "test/c/6.jpg")
    data = find_labelled(str(tmp_path), 0.0)
    assert data.names == ("a", "b")
    assert [data.train.source.name(i) for i in range(3)] == [
        "a/0.jpg",
        "a/deep/er/2.jpg",
        "b/1.jpg",
    ]
    assert labels_of(data.train.source, data.names).tolist() == [0, 0, 1]
    assert labels_of(data.val.source, data.names).tolist() == [0, 1]
    assert (data.train.prefix, data.val.prefix) == ("train/", "val/")


@pytest.mark.parametrize(("folder", "prefix"), [("", ""), ("train/", "train/")])
def test_val_fraction_divides_each_class(tmp_path: Path, folder: str, prefix: str) -> None:
    names = numbered(f"{folder}a", 20) + numbered(f"{folder}b", 3) + numbered(f"{folder}c", 1)
    data = find_labelled(str(touch(tmp_path, *names)), 0.25)
    train, val = (labels_of(split.source, data.names) for split in (data.train, data.val))
    assert np.bincount(train, minlength=3).tolist() == [15, 2, 1]
    assert np.bincount(val, minlength=3).tolist() == [5, 1, 0]
    paths = [split.source.name(i) for split in (data.train, data.val) for i in range(len(split[0]))]
    assert sorted(paths) == sorted(name.removeprefix(folder) for name in names)
    assert (data.train.prefix, data.val.prefix) == (prefix, prefix)


def test_the_split_of_a_class_does_not_depend_on_other_classes(tmp_path: Path) -> None:
    def held(*folders: str) -> set[str]:
        root = tmp_path / "-".join(folders)
        touch(root, *(name for folder in folders for name in numbered(folder, 12)))
        files, names = find_classes(root)
        _, positions = split_by_hash(files, labels_of(files, names), 0.25)
        return {files.name(i) for i in positions if files.name(i).startswith("b/")}

    assert held("b", "c") == held("a", "b")
    assert len(held("b", "d")) == 3


def test_a_class_that_is_only_in_train_and_stray_images_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "train/a/0.jpg", "train/b/0.jpg", "train/stray.jpg", "val/a/1.jpg")
    with caplog.at_level(logging.WARNING):
        assert len(find_labelled(str(tmp_path), 0.0).train.source) == 2
    assert "never measured: 'b'" in caplog.text
    assert "1 images in" in caplog.text


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda root: (root / old).rename(root / new)


def empty(folder: str) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        shutil.rmtree(root / folder)
        (root / folder).mkdir()

    return spoil


def remove(*folders: str) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        for folder in folders:
            shutil.rmtree(root / folder)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "fraction", "message"),
    [
        (remove("train"), 0.0, "train' is not a folder"),
        (remove("val"), 0.0, "val' is not a folder: .*--val_fraction 0.2"),
        (lambda _: None, 0.2, "its own val: leave val_fraction at 0"),
        (remove("train/b"), 0.0, "has one class, 'a'"),
        (remove("train/a", "train/b"), 0.0, "has no folders"),
        (empty("train/b"), 0.0, "classes without images: 'b'"),
        (
            rename("val/b", "val/bb"),
            0.0,
            r"does not have: 'bb'; did you mean b\?",
        ),
        (rename("train/b", "train/A"), 0.0, "similar classes 'A' and 'a': rename one"),
        (rename("train/b", "train/b\n"), 0.0, "rename it to printable UTF-8"),
        (rename("train/b", "train/b\udcff"), 0.0, "rename it to printable UTF-8"),
    ],
)
def test_bad_folders_are_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], fraction: float, message: str
) -> None:
    touch(tmp_path, "train/a/0.jpg", "train/b/0.jpg", "val/a/1.jpg", "val/b/1.jpg")
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        find_labelled(str(tmp_path), fraction)
    assert "\n" not in str(error.value)


def test_ten_thousand_classes(tmp_path: Path) -> None:
    names = [f"{label:05d}" for label in range(10_000)]
    touch(tmp_path, *(f"train/{name}/0.jpg" for name in names), "val/00007/1.jpg")
    data = find_labelled(str(tmp_path), 0.0)
    assert data.names == tuple(names)
    assert labels_of(data.train.source, data.names).tolist() == [*range(10_000)]
    assert labels_of(data.val.source, data.names).tolist() == [7]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.* is not a folder"):
        find_labelled(str(tmp_path / "nowhere"), 0.0)


def test_one_image_per_class_leaves_nothing_to_validate_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every class has one image"):
        find_labelled(str(touch(tmp_path, "a/0.jpg", "b/0.jpg")), 0.5)
