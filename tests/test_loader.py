import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fcmae import rng
from fcmae.config.pretraining import AugmentConfig, PretrainConfig
from fcmae.data.evaluation import EvalDataset, each_batch, held_out
from fcmae.data.file_list import FileList, find_images
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, lost_workers, make_loader
from fcmae.data.order import StepSampler, check_parts, epoch_order, steps_per_epoch
from fcmae.data.sample import Batch, Sample, collate, normalise
from fcmae.data.sources import key_hash
from fcmae.data.statistics import Preprocessing, measure_mean_std
from fcmae.data.survey import survey
from fcmae.model.mask import random_mask
from sparse.errors import InputError, RunError

COUNT = 23
BAD = ("05.jpg", "11.jpg")
SMALL = Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileList:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = random.integers(0, 256, (5 + i, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60 + i, 50)).save(folder / f"{i:02d}.jpg")
    (folder / BAD[0]).write_bytes(b"")
    (folder / BAD[1]).write_text("no picture")
    return find_images(str(folder))


def crops(files: FileList, *size: int, in_chans: int = 3, **settings: Any) -> PretrainDataset:
    images = Preprocessing(size, (0.5,) * in_chans, (0.5,) * in_chans)
    return PretrainDataset(Split(files), images, PretrainConfig("", "", **settings))


def keys_of(sampler: StepSampler) -> list[list[tuple[int, int]]]:
    return list(sampler)


@pytest.mark.parametrize(
    ("n", "batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (3, 8, 1), (1, 1, 1)]
)
def test_an_epoch_reads_every_file_and_fills_its_last_batch(
    n: int, batch_size: int, steps: int
) -> None:
    assert steps_per_epoch(n, batch_size) == steps
    order = epoch_order(0, 0, n, batch_size)
    assert len(order) == steps * batch_size
    permutation = rng.permutation(0, 0, n)
    assert order.tolist() == [permutation[i % n] for i in range(steps * batch_size)]


def test_steps_follow_the_epochs() -> None:
    batches = keys_of(StepSampler(10, 4, 7, 0, 7))
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}] * 3 + [{1}] * 3 + [{2}]
    assert [i for batch in batches[3:6] for _, i in batch] == epoch_order(7, 1, 10, 4).tolist()


def test_a_resumed_sampler_continues_at_its_step() -> None:
    whole = keys_of(StepSampler(10, 4, 7, 0, 9, accumulate=2))
    for start in range(10):
        rest = StepSampler(10, 4, 7, start, 9, accumulate=2)
        assert keys_of(rest) == whole[2 * start :]
        assert len(rest) == len(whole[2 * start :])


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (3, 4)])
def test_processes_and_micro_batches_divide_the_same_global_batch(
    world_size: int, accumulate: int
) -> None:
    one = keys_of(StepSampler(100, 24, 1, 2, 7))
    parts = [
        keys_of(StepSampler(100, 24, 1, 2, 7, rank, world_size, accumulate))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(one):
        joined = []
        for micro in range(accumulate):
            for rank in range(world_size):
                joined += parts[rank][step * accumulate + micro]
        assert joined == batch


def test_a_batch_that_does_not_divide_names_sizes_that_do() -> None:
    with pytest.raises(InputError, match="60 and 66"):
        check_parts(64, 2, 3)


def test_a_sample_is_a_function_of_its_key(files: FileList) -> None:
    dataset = crops(files, 64, 96, seed=3, augment=AugmentConfig(vflip=True))
    first, again = dataset[(1, 4)], dataset[(1, 4)]
    assert first.image is not None
    assert first.mask is not None
    assert (first.image == again.image).all()
    assert first.image.shape == (3, 64, 96)
    assert first.image.dtype == np.uint8
    assert first.mask.shape == (2, 3)
    assert first.bad == []
    for other in (dataset[(2, 4)], crops(files, 64, 96, seed=4)[(1, 4)]):
        assert (first.image != other.image).any()


def test_bad_files_are_replaced_by_the_same_ones_in_every_run(files: FileList) -> None:
    replaced = []
    for _ in range(2):
        dataset = crops(files, 64, 64, seed=0)
        sample = dataset[(0, 5)]
        assert sample.bad[0] == (BAD[0], "not an image of a known format")
        assert files.name(sample.index) not in BAD
        assert sample.image is not None
        replaced.append((sample.index, sample.image.tobytes()))
        assert dataset[(1, 5)].index == sample.index
    assert replaced[0] == replaced[1]


def test_a_sample_of_a_deleted_folder_has_no_image(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.jpg").touch()
    sample = crops(find_images(str(tmp_path)), 64, 64)[(0, 0)]
    assert sample.image is None
    assert (sample.bad[0][0], len(sample.bad)) == ("0.jpg", 21)
    batch = collate([sample, sample])
    assert (len(batch), batch.missing, batch.bad) == (0, sample.bad, 2 * sample.bad)


def stream(files: FileList, workers: int, start: int = 0) -> list[Batch]:
    dataset = crops(files, 64, 64, seed=1)
    return list(make_loader(dataset, StepSampler(len(files), 6, 1, start, 9), workers))


def test_workers_change_nothing(files: FileList) -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    expected = stream(files, 0)
    assert len(expected) == 9
    for workers in (1, 2):
        for start in (0, 5):
            got = stream(files, workers, start)
            assert len(got) == 9 - start
            for ours, theirs in zip(got, expected[start:], strict=True):
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.masks, theirs.masks)
                assert torch.equal(ours.indices, theirs.indices)
                assert ours.bad == theirs.bad
    assert {name for batch in expected for name, _ in batch.bad} == set(BAD)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_batch_has_the_masks_of_its_samples(files: FileList) -> None:
    dataset = crops(files, 64, 64, mask_ratio=0.75)
    batch = collate([dataset[(0, 0)], dataset[(0, 1)]])
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.masks is not None
    assert batch.masks.dtype == torch.bool
    assert batch.masks.sum((1, 2)).tolist() == [3, 3]
    assert batch.indices.tolist() == [0, 1]
    assert len(batch) == 2


def test_eight_bit_and_deeper_images_share_a_batch(tmp_path: Path) -> None:
    Image.new("L", (64, 64), 51).save(tmp_path / "a.png")
    Image.fromarray(np.full((64, 64), 13107, np.uint16)).save(tmp_path / "b.png")
    dataset = crops(find_images(str(tmp_path)), 64, 64, in_chans=1)
    eight, deep = dataset[(0, 0)], dataset[(0, 1)]
    assert eight.image is not None
    assert deep.image is not None
    assert eight.image.dtype == np.uint8
    assert deep.image.dtype == np.float32
    batch = collate([eight, deep])
    assert batch.images.dtype == torch.float32
    assert torch.allclose(batch.images, torch.tensor(0.2))
    alone = normalise(collate([eight]).images, [0.1], [0.5], "cpu")
    assert torch.allclose(alone, normalise(batch.images, [0.1], [0.5], "cpu")[:1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise(dtype: torch.dtype) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    units = images.double() / 255
    given = images.to(torch.uint8) if dtype == torch.uint8 else units.float()
    kept = given.clone()
    got = normalise(given, mean, std, "cpu")
    expected = (units - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5
    assert torch.equal(given, kept)


def test_held_out_images_have_the_same_masks_whatever_the_other_images(files: FileList) -> None:
    def masks_of(files: FileList) -> tuple[dict[str, Tensor], list[str]]:
        images = Preprocessing((64, 96), (0.5,) * 3, (0.5,) * 3)
        masks: dict[str, Tensor] = {}
        bad: list[str] = []
        for batch, pixels in each_batch(
            EvalDataset(Split(files), images), torch.device("cpu"), 8, 0
        ):
            assert pixels.shape == (len(batch), 3, 64, 96)
            _, drawn, valid = held_out(files, batch, pixels, 0.6, 0)
            assert valid is None
            names = map(files.name, batch.indices.tolist())
            masks |= dict(zip(names, drawn, strict=True))
            bad += [name for name, _ in batch.bad]
        return masks, bad

    masks, bad = masks_of(files)
    assert (len(masks), bad) == (COUNT - 2, list(BAD))
    assert len({mask.numpy().tobytes() for mask in masks.values()}) > 5
    again, _ = masks_of(files.select([20, 3]))
    assert set(again) == {files.name(20), files.name(3)}
    assert all(torch.equal(mask, masks[name]) for name, mask in again.items())
    golden = random_mask(0, 0, key_hash(files, 3), (2, 3), 0.6, rng.HOLDOUT_MASK)
    assert masks[files.name(3)].tolist() == golden.tolist()


def test_mean_and_std_are_measured(tmp_path: Path, files: FileList) -> None:
    colours = np.array([(10, 200, 30), (90, 100, 150), (250, 0, 60)])
    for i, colour in enumerate(colours.tolist()):
        Image.new("RGB", (40, 40), tuple(colour)).save(tmp_path / f"{i}.png")
    config = PretrainConfig("", "")
    mean, std = measure_mean_std(config, SMALL, find_images(str(tmp_path)))
    assert np.allclose(mean, colours.mean(0) / 255)
    assert np.allclose(std, colours.std(0) / 255)

    sampled = measure_mean_std(config, SMALL, files, 5)
    assert sampled == measure_mean_std(config, SMALL, files, 5)
    assert sampled != measure_mean_std(PretrainConfig("", "", seed=1), SMALL, files, 5)
    with pytest.raises(InputError, match="no image can be read"):
        measure_mean_std(config, SMALL, files.select([5, 11]))


SCRIPT = """
import json, os, sys, time
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.statistics import default_preprocessing

def main():
    files = find_images(sys.argv[1])
    dataset = PretrainDataset(Split(files), default_preprocessing(3), PretrainConfig("", ""))
    sampler = StepSampler(len(files), 2, 0, 0, 10**6)
    batches = iter(make_loader(dataset, sampler, 2))
    for _ in range(2):  # one of each worker, which is then set up
        next(batches)
    print(json.dumps([worker.pid for worker in batches._workers]), flush=True)
    sys.stdin.readline()
    for _ in range(50):
        next(batches)
    print("still here", flush=True)
    sys.stdin.readline()

main()
"""


@pytest.fixture
def running(files: FileList) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, files.roots[0]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    yield process
    process.kill()
    process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_workers_leave_signals_to_the_main_process_and_end_with_it(
    running: subprocess.Popen[str],
) -> None:
    assert running.stdin
    assert running.stdout
    workers = json.loads(running.stdout.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in workers:
            os.kill(pid, number)
    time.sleep(0.2)
    assert all(map(is_alive, workers))
    running.stdin.write("\n")
    running.stdin.flush()
    assert running.stdout.readline() == "still here\n"
    began = time.monotonic()
    running.communicate("\n", timeout=30)
    assert running.returncode == 0
    assert time.monotonic() - began < 15
    assert not any(map(is_alive, workers))


def test_a_worker_that_dies_while_sending_ends_in_one_line():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    said = r"failed \(EOFError while it sent images\).*--workers"
    with pytest.raises(RunError, match=said), lost_workers():
        ours.recv_bytes()
    ours.close()
    with pytest.raises(EOFError), lost_workers():
        raise EOFError("something else")
    with pytest.raises(RuntimeError, match="something else"), lost_workers():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("scale", "std", "reported"), [(1.0, 0.2, False), (0.02, 0.2, True), (1.0, 30.0, True)]
)
def test_a_mean_and_std_of_other_images_are_reported(tmp_path, caplog, scale, std, reported):
    random = np.random.default_rng(0)
    for number in range(4):
        pixels = random.uniform(0, scale, (40, 40, 5)).astype(np.float32)
        np.save(tmp_path / f"{number}.npy", pixels)
    files = find_images(str(tmp_path))
    config = PretrainConfig("", "", in_chans=5, max_pixels=10_000)
    images = Preprocessing((32, 32), (0.45,) * 5, (std,) * 5)
    found = survey(files, images, config.seed, config.max_pixels)
    found.warn_if_far_off(images)
    assert found.lines()[0] == (
        "a sample of images: 4 NumPy, 5 bands of float32; 40×40 pixels, 32.1 kB each"
    )
    assert ("--augment.mean data --augment.std data" in caplog.text) == reported


def test_arrays_of_another_shape_name_a_fix(tmp_path):
    for name, shape, fix in (
        (
            "last",
            (9, 8, 5),
            "5 bands, not 3: pretrain and finetune take --in_chans 5, or --bands '[1,2,3]'",
        ),
        ("first", (5, 9, 8), "array of shape (5, 9, 8) is not (H, W, 3): channels come last"),
    ):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", np.zeros(shape, np.float32))
        sample = crops(find_images(str(tmp_path / name)), 64, 64)[0, 0]
        assert sample.bad[0][1] == fix


def test_the_first_sample_without_an_image_names_the_files_tried():
    """Not an image of another sample of the batch, which was replaced."""
    replaced = Sample(np.zeros((1, 2, 2), np.uint8), 3, bad=[("a.jpg", "cut short")])
    missing = Sample(None, 4, bad=[("b.jpg", "empty"), ("c.jpg", "empty")])
    batch = collate([replaced, missing])
    assert (len(batch), batch.missing) == (1, missing.bad)
    assert batch.bad == [*replaced.bad, *missing.bad]
    assert collate([replaced]).missing == []
