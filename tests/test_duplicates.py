"""Near-duplicates among photographs: copies are found, other images and mirrored ones are not."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fcmae.data.duplicates import MOST_BITS, Duplicate, find_duplicates, perceptual_hash
from fcmae.data.file_list import FileList, find_images
from fcmae.data.samples import photograph
from fcmae.train.processes import World
from sparse.errors import RunError
from tests.conftest import write_pictures

NAMES = ("astronaut", "camera", "cat", "coffee", "moon")
COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "third": lambda picture: picture.resize((picture.width // 3, picture.height // 3)),
    "squeezed": lambda picture: picture.resize((picture.width, picture.height // 2)),
    "bright": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "grey": ImageOps.grayscale,
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(3)),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images in `NAMES`; read-only."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in NAMES:
        photograph(name).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of every photograph, made in every way; read-only."""
    folder = tmp_path_factory.mktemp("copies")
    for name in NAMES:
        picture = photograph(name)
        for way, change in COPIES.items():
            change(picture).save(folder / f"{name} {way}.png")
        picture.save(folder / f"{name} recompressed.jpg", quality=30)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be rotated back by 90 degrees
        picture.transpose(Image.Transpose.ROTATE_90).save(folder / f"{name} turned.jpg", exif=exif)
    return folder


def bits(one: Path, other: Path) -> int:
    hashes = [perceptual_hash(str(path)) for path in (one, other)]
    unpacked = [np.unpackbits(found) for found in hashes if found is not None]
    return int((unpacked[0] != unpacked[1]).sum())


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_are_found(photographs: Path, copies: Path, workers: int) -> None:
    files = find_images(str(copies))
    found = find_duplicates(files, find_images(str(photographs)), workers)
    names = [name for name, _, _ in found]
    assert names == [files.name(index) for index in range(len(files))]
    assert len(found) == 5 * 7
    for name, original, differ in found:
        assert original == f"{name.split()[0]}.png"
        assert differ == bits(copies / name, photographs / original)
        assert differ <= 20 < MOST_BITS


def test_other_images_and_mirrored_copies_are_not_found(photographs: Path, tmp_path: Path) -> None:
    for name in NAMES:
        picture = photograph(name)
        ImageOps.mirror(picture).save(tmp_path / f"{name}.png")
        half = (picture.width // 2, 0, *picture.size)
        picture.crop(half).save(tmp_path / f"{name} half.png")
    write_pictures(tmp_path / "smooth", 100, seed=5)
    originals = find_images(str(photographs))
    assert find_duplicates(find_images(str(tmp_path)), originals, 0) == []
    for index in range(len(originals)):
        others = originals.select([other for other in range(len(originals)) if other != index])
        assert find_duplicates(originals.select([index]), others, 0) == []


def test_the_nearest_match_is_reported(photographs: Path, tmp_path: Path) -> None:
    photograph("camera").save(tmp_path / "a far.jpg", quality=3)
    photograph("camera").save(tmp_path / "b same.png")
    wanted = find_images(str(photographs)).select([1])
    (found,) = find_duplicates(wanted, find_images(str(tmp_path)), 0)
    assert found == Duplicate("camera.png", "b same.png", 0)
    assert 0 < bits(photographs / "camera.png", tmp_path / "a far.jpg") <= MOST_BITS


def test_flat_and_unreadable_images_match_nothing(tmp_path: Path, pictures: Path) -> None:
    Image.new("RGB", (60, 40), (9, 99, 199)).save(tmp_path / "flat.png")
    Image.new("L", (1, 1), 9).save(tmp_path / "one pixel.png")
    (tmp_path / "bad.png").write_bytes(b"none")
    faint = np.full((40, 60), 100, np.uint8)
    faint[:20] = 102
    Image.fromarray(faint).save(tmp_path / "faint.png")
    odd, whole = find_images(str(tmp_path)), find_images(str(pictures))
    assert [perceptual_hash(odd.path(index)) for index in range(4)] == [None] * 4
    assert find_duplicates(odd, odd, 0) == []
    assert find_duplicates(odd, whole, 0) == find_duplicates(whole, odd, 0) == []


def test_many_images_against_each_other(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if not all are compared at once; an image is a copy of itself only."""
    monkeypatch.setattr("fcmae.data.duplicates._AT_ONCE", 5)
    files = find_images(str(pictures))
    expected = [Duplicate(files.name(index), files.name(index), 0) for index in range(24)]
    assert find_duplicates(files, files, 0) == expected


def test_a_dead_worker_is_reported(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(files: FileList, index: int) -> bytes:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    monkeypatch.setattr(FileList, "path", read)
    files = find_images(str(pictures))
    with pytest.raises(RunError, match=r"killed by signal.*fewer --workers"):
        find_duplicates(files, files, 0)


class Threads(World):
    """Two processes of a run, simulated by two threads."""

    items: dict[int, Any] = {}  # noqa: RUF012
    meeting = threading.Barrier(2, timeout=60)

    def gather(self, item: Any) -> list[Any]:
        self.items[self.rank] = item
        self.meeting.wait()
        found = [self.items[0], self.items[1]]
        self.meeting.wait()
        return found


def test_processes_share_the_search(
    photographs: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process waits for one that searches alone, and each has the result of one process."""
    files, originals = find_images(str(copies)), find_images(str(photographs))
    expected = find_duplicates(files, originals, 0)
    # Hash first: reading sets Pillow's limits, which are not thread-safe.
    hashes = {
        s.path(i): perceptual_hash(s.path(i)) for s in (files, originals) for i in range(len(s))
    }
    monkeypatch.setattr("fcmae.data.duplicates.perceptual_hash", hashes.__getitem__)

    def search(rank: int) -> list[Duplicate]:
        return find_duplicates(files, originals, 0, Threads(rank, 2, torch.device("cpu")))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(search, range(2))) == [expected] * 2
