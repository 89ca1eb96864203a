"""The interface of image sources: any other source gives the same as a folder."""

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fcmae.config.pretraining import AugmentConfig, PretrainConfig
from fcmae.data.decode import read_image
from fcmae.data.duplicates import find_duplicates
from fcmae.data.evaluation import EvalDataset, held_out
from fcmae.data.file_list import FileList, find_images
from fcmae.data.image import Reading
from fcmae.data.labelled import Split, labels_of, split_by_hash
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import Batch, collate
from fcmae.data.sources import Source, key_hash, split_holdout
from fcmae.data.statistics import Preprocessing, measure_mean_std

BAD = "b/03.png"
IMAGES = Preprocessing((64, 96), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)


class Memory:
    """Images in memory, by name."""

    def __init__(self, images: dict[str, bytes]) -> None:
        self._images = images
        self._names = list(images)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def key(self, index: int) -> bytes:
        return os.fsencode(self._names[index])

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self._images[self._names[index]])

    def select(self, indices: npt.ArrayLike) -> "Memory":
        names = [self._names[index] for index in np.asarray(indices, np.int64).tolist()]
        return Memory({name: self._images[name] for name in names})

    def fingerprint(self) -> str:
        keys = [os.fsencode(name) for name in self._names]
        lengths = np.array([len(key) for key in keys], "<u2")
        return hashlib.sha256(lengths.tobytes() + b"".join(keys)).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FileList:
    """Images of several formats and depths, one of them broken; read-only."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(12):
        path = root / "ab"[i % 2] / f"{i:02d}{('.png', '.jpg', '.tif', '.npy')[i % 4]}"
        path.parent.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        if path.suffix == ".npy":
            np.save(path, pixels / np.float32(255))
        else:
            Image.fromarray(pixels).save(path)
    (root / BAD).write_bytes(b"none")
    return find_images(str(root))


@pytest.fixture(scope="module")
def memory(folder: FileList) -> Memory:
    content = (Path(os.fsdecode(folder.path(i))).read_bytes() for i in range(len(folder)))
    return Memory(dict(zip(map(folder.name, range(len(folder))), content, strict=True)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_in_memory_trains_like_its_folder(
    folder: FileList, memory: Memory, workers: int
) -> None:
    def batches(source: Source, workers: int) -> list[Batch]:
        sampler = StepSampler(len(source), 5, 3, 0, 6)
        config = PretrainConfig("", "", seed=3, augment=AugmentConfig(vflip=True))
        dataset = PretrainDataset(Split(source), IMAGES, config)
        return list(make_loader(dataset, sampler, workers))

    for ours, theirs in zip(batches(memory, workers), batches(folder, 0), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.masks, theirs.masks)
        assert torch.equal(ours.indices, theirs.indices)
        assert ours.bad == theirs.bad


def test_a_source_in_memory_is_measured_and_split_like_its_folder(
    folder: FileList, memory: Memory
) -> None:
    assert memory.fingerprint() == folder.fingerprint()
    assert [key_hash(memory, i) for i in range(13)] == [key_hash(folder, i) for i in range(13)]
    for ours, theirs in zip(split_holdout(memory, 4, 0), split_holdout(folder, 4, 0), strict=True):
        assert ours.tolist() == theirs.tolist()
    labels = labels_of(memory, ("a", "b"))
    assert labels.tolist() == labels_of(folder, ("a", "b")).tolist()
    held, expected = (split_by_hash(source, labels, 0.3)[1] for source in (memory, folder))
    assert held.tolist() == expected.tolist()
    measured = [measure_mean_std(PretrainConfig("", ""), IMAGES, s) for s in (memory, folder)]
    assert measured[0] == measured[1]

    crops = [
        collate([EvalDataset(Split(source, "", labels), IMAGES)[i] for i in range(13)])
        for source in (memory, folder)
    ]
    assert torch.equal(crops[0].images, crops[1].images)
    masks = [held_out(s, crops[0], crops[0].images, 0.6, 0)[1] for s in (memory, folder)]
    assert torch.equal(masks[0], masks[1])
    assert crops[0].bad == crops[1].bad == [(BAD, "not an image of a known format")]


def test_sources_are_compared_with_each_other(folder: FileList, memory: Memory) -> None:
    found = find_duplicates(memory, folder, 0)
    assert [(name, of, bits) for name, of, bits in found if name != of or bits] == []
    assert len(found) == 9  # arrays have no grey version to compare


def test_a_file_is_closed_after_reading(memory: Memory) -> None:
    for index in range(len(memory)):
        if memory.name(index) != BAD:
            file = memory.open(index)
            opened = read_image(file, Reading(3, 10**6))
            assert file.closed
            assert opened.resized((0, 0, *opened.size), (32, 32)).pixels.shape == (3, 32, 32)
