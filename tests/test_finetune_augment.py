"""Samples are functions of (seed, epoch, index), independent of workers and random streams."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fcmae.data.evaluation import EvalDataset, batches_of
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split, find_classes, labels_of
from fcmae.data.loader import make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import collate
from fcmae.data.statistics import Preprocessing
from finetune.augment import TrainDataset, recolouring, seeded
from finetune.config import FinetuneAugmentConfig, FinetuneConfig
from sparse.errors import InputError

STRONG = FinetuneAugmentConfig(randaugment="rand-m9-mstd0.5-inc1", random_erasing=0.5)


def dataset(root: Path, augment: FinetuneAugmentConfig = STRONG, in_chans: int = 3) -> TrainDataset:
    files, names = find_classes(root)
    images = Preprocessing((32, 48), (0.5,) * in_chans, (0.25,) * in_chans)
    split = Split(files, "train/", labels_of(files, names))
    config = FinetuneConfig("", "", augment=augment, seed=3, max_pixels=10**6)
    return TrainDataset(split, images, config)


def test_workers_change_nothing(classes: Path) -> None:
    data = dataset(classes / "train")

    def run(workers: int) -> list[Any]:
        sampler = StepSampler(len(data), 8, 3, start_step=2, total_steps=6)
        return [*make_loader(data, sampler, workers)]

    for one, two in zip(run(0), run(2), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.targets, two.targets)
        assert torch.equal(one.indices, two.indices)
    assert one.images.dtype == torch.uint8
    assert one.images.shape == (8, 3, 32, 48)


def test_a_sample_depends_on_its_key_alone(classes: Path) -> None:
    data = dataset(classes / "train")
    first = data[0, 5].image
    random.seed(9)
    torch.manual_seed(9)
    assert first is not None
    assert np.array_equal(first, data[0, 5].image)
    assert not np.array_equal(first, data[1, 5].image)
    assert data[0, 5].target == 0
    assert data[0, 9].target == 1


def test_global_random_streams_are_untouched(classes: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    with seeded(1):
        wanted = draws()
    with seeded(1):
        data = dataset(classes / "train")
        for index in range(8):
            data[0, index]
        assert draws() == wanted


def test_an_unreadable_image_is_replaced_together_with_its_class(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), colour).save(tmp_path / name / "good.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"none")
    data = dataset(tmp_path, FinetuneAugmentConfig())
    sample = data[0, 0]
    assert sample.bad[0][0] == "train/a/bad.png"
    assert sample.index in (1, 2)
    assert sample.target == sample.index - 1
    assert sample.image is not None
    assert sample.image[:, 0, 0].tolist() == ([255, 0, 0], [0, 0, 255])[sample.target]


def test_erasing_changes_one_box(classes: Path) -> None:
    plain = dataset(classes / "train", FinetuneAugmentConfig(random_erasing=0))
    erasing = dataset(classes / "train", FinetuneAugmentConfig(random_erasing=1))
    for index in range(6):
        before, after = plain[0, index].image, erasing[0, index].image
        assert before is not None
        assert after is not None
        changed = (before != after).any(axis=0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.9
        assert 0.015 < box.size / changed.size < 0.34


@pytest.mark.parametrize(
    ("mode", "in_chans", "dtype"),
    [("L", 1, np.uint8), ("L", 3, np.uint8), ("RGBA", 4, np.uint8), ("I;16", 1, np.float32)],
)
def test_other_kinds_of_images(tmp_path: Path, mode: str, in_chans: int, dtype: Any) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    pixels = (
        values if mode == "RGBA" else values[..., 0].astype(np.uint16 if "16" in mode else "u1")
    )
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    image = dataset(tmp_path, STRONG, in_chans)[0, 0].image
    assert image is not None
    assert image.shape == (in_chans, 32, 48)
    assert image.dtype == dtype


def test_a_randaugment_string_that_timm_refuses() -> None:
    with pytest.raises(InputError, match="'rand-x9' is unknown to timm"):
        recolouring(FinetuneAugmentConfig(randaugment="rand-x9"), (32, 32), [0.5] * 3)


def test_evaluation_is_resize_and_centre_crop(pictures: Path) -> None:
    files = find_images(str(pictures))
    data = EvalDataset(Split(files), Preprocessing((56, 56), (0.5,) * 3, (0.5,) * 3))
    reference = v2.Compose(
        [v2.Resize(64, v2.InterpolationMode.BICUBIC), v2.CenterCrop(56), v2.PILToTensor()]
    )
    for index in range(4):
        wanted = reference(Image.open(files.path(index).decode())).numpy().astype(float)
        image = data[index].image
        assert image is not None
        # The crop's corner may be half a pixel off, since ours is cropped before it is resized.
        assert np.abs(image - wanted).mean() < 2


def test_an_unreadable_file_gives_no_image(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"none")
    images = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    data = EvalDataset(Split(find_images(str(tmp_path)), "val/"), images)
    batch = collate([data[0]])
    assert len(batch) == 0
    assert batch.bad[0][0] == "val/bad.png"


@pytest.mark.parametrize(("n", "batch", "size"), [(10, 3, 1), (10, 3, 2), (7, 2, 3), (1, 4, 4)])
def test_each_sample_is_measured_once_in_equal_numbers_of_batches(
    n: int, batch: int, size: int
) -> None:
    shares = [batches_of(n, batch, rank, size) for rank in range(size)]
    assert sorted(i for share in shares for part in share for i in part) == list(range(n))
    assert len({len(share) for share in shares}) == 1
    assert max(len(part) for share in shares for part in share) <= batch
