"""Sample images: their number, where they are cropped, and reproducibility."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

import fcmae.data.samples
from fcmae.commands.samples import SamplesConfig
from fcmae.data.samples import PHOTOGRAPHS, Box, cells, crop_boxes, photograph, samples, square
from sparse.errors import InputError


@pytest.fixture
def two_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {name: PHOTOGRAPHS[name] for name in ("cat", "coins")}
    monkeypatch.setattr(fcmae.data.samples, "PHOTOGRAPHS", pictures)


def tiny(out: Path, **changes: int) -> SamplesConfig:
    settings = {"per_class_train": 5, "per_class_val": 2, "size": 32, **changes}
    return SamplesConfig(out=str(out), **settings)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.jpg")}


def overlap(one: Box, other: Box) -> bool:
    """Return whether the two boxes share a pixel."""
    return (
        max(one.left, other.left) < min(one.right, other.right)
        and max(one.top, other.top) < min(one.bottom, other.bottom)
    )  # fmt: skip


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_training_crop_shares_a_pixel_with_a_validation_crop(name: str, seed: int) -> None:
    photo = photograph(name)
    config = SamplesConfig(out="unused", seed=seed)
    boxes = crop_boxes(name, photo.width, photo.height, config)
    assert (len(boxes["train"]), len(boxes["val"])) == (120, 40)
    for box in boxes["train"] + boxes["val"]:
        assert 0 <= box.left < box.right <= photo.width
        assert 0 <= box.top < box.bottom <= photo.height
        assert box.right - box.left == box.bottom - box.top
    assert not [(a, b) for a in boxes["train"] for b in boxes["val"] if overlap(a, b)]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_both_splits_see_every_row_and_column(name: str) -> None:
    photo = photograph(name)
    boxes = crop_boxes(name, photo.width, photo.height, SamplesConfig(out="unused"))
    for split in ("train", "val"):
        rows = {box.top * 4 // photo.height for box in boxes[split]}
        columns = {box.left * 4 // photo.width for box in boxes[split]}
        assert (rows, columns) == ({0, 1, 2, 3}, {0, 1, 2, 3})


def test_overlap_means_a_shared_pixel() -> None:
    box = Box(10, 10, 20, 20)
    assert overlap(box, Box(19, 19, 30, 30))
    assert overlap(box, Box(0, 12, 30, 14))
    assert not overlap(box, Box(20, 10, 30, 20))
    assert not overlap(box, Box(10, 0, 20, 10))


def test_cells_keep_a_gap_and_cover_the_image() -> None:
    split = cells(400, 400, Random(0))
    assert (len(split["train"]), len(split["val"])) == (12, 4)
    assert {(box.left, box.right) for box in split["train"]} == {
        (4, 96), (104, 196), (204, 296), (304, 396),
    }  # fmt: skip


def test_a_square_fits_in_its_cell() -> None:
    random, cell = Random(0), Box(10, 20, 60, 60)
    boxes = [square(cell, random) for _ in range(500)]
    assert min(box.left for box in boxes) == 10
    assert min(box.top for box in boxes) == 20
    assert max(box.right for box in boxes) == 60
    assert max(box.bottom for box in boxes) == 60
    assert {box.right - box.left for box in boxes} == set(range(20, 40))


@pytest.mark.usefixtures("two_photographs")
def test_writes_the_requested_images(tmp_path: Path) -> None:
    root = samples(tiny(tmp_path / "a"))
    files = contents(root)
    assert len(files) == 2 * (5 + 2)
    assert {Path(name).parts[:2] for name in files} == {
        (split, name) for split in ("train", "val") for name in ("cat", "coins")
    }
    for name in files:
        with Image.open(root / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


@pytest.mark.usefixtures("two_photographs")
def test_bytes_depend_on_the_settings_alone(tmp_path: Path) -> None:
    first = contents(samples(tiny(tmp_path / "a")))
    assert contents(samples(tiny(tmp_path / "b"))) == first
    other = contents(samples(tiny(tmp_path / "c", seed=1)))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


@pytest.mark.usefixtures("two_photographs")
def test_a_finished_set_is_not_written_again(tmp_path: Path) -> None:
    victim = samples(tiny(tmp_path)) / "val/cat/0000.jpg"
    victim.unlink()
    samples(tiny(tmp_path))
    assert not victim.exists()


@pytest.mark.usefixtures("two_photographs")
def test_an_interrupted_set_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, write_class = tmp_path / "set", fcmae.data.samples.write_class

    def interrupted(folder: Path, name: str, *rest: Any) -> None:
        if name == "coins":
            raise KeyboardInterrupt
        write_class(folder, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fcmae.data.samples, "write_class", interrupted)
        with pytest.raises(KeyboardInterrupt):
            samples(tiny(root, per_class_train=7))
    assert not [path for path in root.iterdir() if not path.name.startswith(".")]
    assert contents(samples(tiny(root))) == contents(samples(tiny(tmp_path / "whole")))
    assert {path.name for path in root.iterdir()} == {"train", "val", "samples.json"}


@pytest.mark.usefixtures("two_photographs")
def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"not the sample set.*: give a new folder"):
        samples(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(InputError, match="is a file"):
        samples(tiny(tmp_path / "photo.jpg"))
    (tmp_path / "samples.json").write_text("[1]")
    with pytest.raises(InputError, match="not the sample set"):
        samples(tiny(tmp_path))


@pytest.mark.usefixtures("two_photographs")
def test_refuses_a_set_of_other_settings(tmp_path: Path) -> None:
    samples(tiny(tmp_path))
    with pytest.raises(InputError, match="not the sample set of these settings"):
        samples(tiny(tmp_path, seed=1))


def test_missing_scikit_image_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcmae.data.samples, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'fcmae\[samples\]'"):
        samples(tiny(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
