"""Windows of large images: where they are, what is held out, which tiles are read."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fcmae.config.pretraining import PretrainConfig
from fcmae.data.file_list import FileList, find_images
from fcmae.data.image import OpenedImage
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset
from fcmae.data.statistics import Preprocessing, center_crop, measure_mean_std
from fcmae.data.survey import survey
from fcmae.data.windows import (
    WHOLE,
    hold_out_windows,
    overlap,
    random_windows,
    split_windows,
    taken_places,
    window_box,
)
from sparse.errors import InputError
from tests.cli import TINY, kill_all, metrics, reaped, run, start, wait_for_steps, weights
from tests.test_rasters import write_map

IMAGES = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> FileList:
    """Three maps of 512×640 whose values are their coordinates, and one of the size of a window."""
    folder = tmp_path_factory.mktemp("maps")
    y, x = np.mgrid[:512, :640]
    pixels = np.stack([y // 4, x // 4, np.full_like(x, 9)]).astype(np.uint8)
    for n in range(3):
        write_map(folder / f"{n}.tif", pixels)
    write_map(folder / "small.tif", pixels[:, :70, :64])
    return find_images(str(folder))


def config_of(maps: FileList, **options: object) -> PretrainConfig:
    options = {"img_size": 64, "window": 64, "crops_per_image": 200, **options}
    return PretrainConfig(maps.roots[0], "", **options)


def test_a_window_is_inside_and_reaches_every_pixel():
    assert window_box((640, 512), 64, (0.0, 0.0)) == (0, 0, 64, 64)
    assert window_box((640, 512), 64, (1 - 1e-9, 1 - 1e-9)) == (576, 448, 64, 64)
    assert window_box((50, 512), 64, (0.9, 0.5)) == (0, 224, 50, 64)
    assert overlap((0, 0, 64, 64), (63, 63, 64, 64))
    assert not overlap((0, 0, 64, 64), (64, 0, 64, 64))
    assert not overlap((0, 0, 64, 64), (10, 64, 64, 64))


def test_windows_are_held_out_and_never_trained_on(maps, monkeypatch):
    config = config_of(maps)
    held = hold_out_windows(maps, config)
    train, windows = split_windows(maps, held, 64)
    counts = Counter(index for index, *_ in held)
    assert len(held) == len(windows) <= config.holdout
    whole = [index for index, *place in held if tuple(place) == WHOLE]
    assert whole == [index for index in range(4) if maps.name(index) == "small.tif"]
    assert all(counts[index] == (1 if index in whole else 8) for index in counts)
    assert train.tolist() == [index for index in range(4) if index not in whole]
    assert hold_out_windows(maps, config_of(maps, crops_per_image=100)) == []  # under 500 samples

    boxes: dict[str, set[tuple[int, ...]]] = {}
    real = OpenedImage.window
    monkeypatch.setattr(
        OpenedImage, "window", lambda self, box: seen.append(box) or real(self, box)
    )
    dataset = PretrainDataset(Split(maps.select(train)), IMAGES, config, taken_places(windows))
    for epoch in range(60):
        for index in range(len(train)):
            seen: list[tuple[int, ...]] = []
            sample = dataset[epoch, index]
            (box,) = seen
            boxes.setdefault(maps.name(int(train[index])), set()).add(box)
            crop = sample.geometry.box
            assert crop[0] + crop[2] <= 64
            assert sample.image[0].max() <= (box[1] + 64) // 4 + 2
    for index, x, y in held:
        other = window_box((640, 512), 64, (x, y))
        assert index in whole or not any(overlap(box, other) for box in boxes[maps.name(index)])
    assert min(map(len, boxes.values())) > 50


def test_held_out_windows_are_read_as_images(maps):
    held = hold_out_windows(maps, config_of(maps))
    _, windows = split_windows(maps, held, 64)
    for index, (_, x, y) in enumerate(held):
        (pixels, _), geometry = center_crop(windows, index, IMAGES, 10**6)
        if (x, y) != WHOLE:
            left, top, *_ = window_box((640, 512), 64, (x, y))
            assert geometry.size == (64, 64)
            # 56 pixels are enlarged to 64: column 4 is 7.4 pixels from the window's edge.
            expected = [(top + 7.4) / 4, (left + 7.4) / 4, 9]
            assert np.abs(pixels[:, 4, 4] - expected).max() < 1.5
    assert len({windows.key(index) for index in range(len(windows))}) == len(windows)
    assert windows.select([2, 0]).key(0) == windows.key(2)


def test_only_the_tiles_of_a_window_are_read(maps, monkeypatch):
    areas = []
    real = OpenedImage.resized

    def resized(self, box, *arguments, **options):
        inner = self.decode

        def decode(factor, corners):
            areas.append((corners[2] - corners[0]) * (corners[3] - corners[1]))
            return inner(factor, corners)

        object.__setattr__(self, "decode", decode)
        return real(self, box, *arguments, **options)

    monkeypatch.setattr(OpenedImage, "resized", resized)
    dataset = PretrainDataset(Split(maps), IMAGES, config_of(maps))
    for index in range(3):
        assert dataset[0, index].image.shape == (3, 64, 64)
    assert len(areas) == 3
    assert max(areas) <= 64 * 64


def test_statistics_are_measured_in_windows(maps, monkeypatch):
    """Whole, a large map would be too large to be read at once."""
    windows = random_windows(maps, 0, 64)
    config = config_of(maps, max_pixels=64 * 64)
    mean, _ = measure_mean_std(config, IMAGES, windows)
    assert abs(mean[2] - 9 / 255) < 1e-6
    with pytest.raises(InputError, match="max_pixels"):
        measure_mean_std(config, IMAGES, maps.select([0]))
    found = survey(windows, IMAGES, 0, 64 * 64)
    assert found.sizes == [(640, 512)] * 3 + [(64, 70)]
    assert not found.bad


@pytest.mark.slow
def test_an_epoch_has_so_many_crops_of_each_image_and_resumes(maps, tmp_path):
    options = [*TINY, "--window", 96, "--crops_per_image", 6, "--epochs", 6]
    command = ["pretrain", maps.roots[0], "--out"]
    run(*command, tmp_path / "one", *options)
    assert len(metrics(tmp_path / "one")) == 6 * 3  # 24 samples in batches of 8
    with reaped():
        process = start(*command, tmp_path / "two", *options)
        wait_for_steps(tmp_path / "two", 7, process)
        kill_all(process)
    run(*command, tmp_path / "two", *options, "--workers", 2)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    out = tmp_path / "picture.png"
    run("reconstruct", tmp_path / "one", "--images", maps.roots[0], "--out", out)
    with Image.open(out) as picture:
        assert picture.height > 4 * 64


@pytest.mark.slow
def test_a_run_keeps_its_held_out_windows(maps, tmp_path):
    options = [*TINY, "--window", 64, "--crops_per_image", 130, "--batch_size", 64, "--epochs", 1]
    out = tmp_path / "run"
    said = run("pretrain", maps.roots[0], "--out", out, *options, "--picture_epochs", 1).stderr
    assert "found 4 images" in said
    assert "25 windows are held out" in said
    assert metrics(out, "holdout_loss")
    again = run("pretrain", maps.roots[0], "--out", out, *options).stderr
    assert "25 windows are held out" in again
