"""Predictions for maps: windows of bounded memory, with the coordinates of the map."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.features import rasterize
from torch import Tensor, nn

from fcmae.data.evaluation import WholeDataset
from fcmae.data.file_list import find_images
from fcmae.data.image import OpenedImage
from fcmae.data.labelled import Split
from fcmae.data.masks import IGNORE
from fcmae.data.rasters import Placement, placement_of, write_map
from fcmae.data.sample import Batch
from fcmae.data.statistics import Preprocessing
from finetune.figures import scratch
from finetune.found import Part, features
from finetune.tasks.segment import Segment
from tests import test_rasters

TRANSFORM = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
IMAGES = Preprocessing((64, 64), (0.5,) * 3, (0.25,) * 3)


class Threshold(nn.Module):
    """Class 1 where the first channel is above its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.stack([-images_BCHW[:, 0], images_BCHW[:, 0]], 1) * self.slope


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A map with holes, its pixels and which of them count."""
    random = np.random.default_rng(0)
    pixels = random.integers(1, 256, (3, 300, 410), np.uint8)
    valid = np.ones((300, 410), np.bool_)
    valid[100:180, 70:330] = False
    folder = tmp_path / "images"
    folder.mkdir()
    return test_rasters.write_map(folder / "a.tif", pixels, valid), pixels, valid


@torch.no_grad()
def test_masks_of_maps_are_maps_computed_in_windows(picture, tmp_path, monkeypatch):
    path, pixels, valid = picture
    read = []
    real = OpenedImage.resized
    monkeypatch.setattr(
        OpenedImage,
        "resized",
        lambda self, box, *a, **k: read.append(box) or real(self, box, *a, **k),
    )
    kind, source = Segment(("dark", "light")), find_images(str(path.parent))
    dataset = WholeDataset(Split(source), IMAGES)
    view = dataset.view(0)
    mask = kind.tiled(Threshold(), view, 96)
    assert max(width * height for *_, width, height in read) == 96 * 96
    expected = np.where(valid, pixels[0] > 127, IGNORE)
    assert np.array_equal(mask, expected)
    whole = kind.tiled(Threshold(), view, 512)
    assert np.array_equal(whole, expected)

    out = tmp_path / "predicted"
    with kind.writing(out, source, 1) as write:
        write(["a"], Batch(torch.empty(1, 0), torch.tensor([0]), geometry=[view.geometry]), [mask])
    with rasterio.open(out / "a.tif") as written:
        assert np.array_equal(written.read(1), expected)
        assert written.transform == TRANSFORM
        assert written.crs.to_string() == "EPSG:32633"
        assert written.nodata == IGNORE


def test_other_images_give_pngs(tmp_path):
    for name, options in (("a.png", {}), ("b.tif", {}), ("c.jpg", {"quality": 90})):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name, **options)
        assert placement_of(str(tmp_path / name)) is None
    test_rasters.write_map(tmp_path / "d.tif", np.zeros((1, 40, 30), np.uint8))
    with (tmp_path / "d.tif").open("rb") as file:
        assert placement_of(file) is not None


def test_a_large_mask_is_a_file(monkeypatch):
    monkeypatch.setattr("finetune.figures.MOST_IN_MEMORY", 100)
    mask = scratch((20, 30))
    assert isinstance(mask, np.memmap)
    mask[:] = 7
    assert mask.sum() == 7 * 600
    assert not isinstance(scratch((9, 9)), np.memmap)


@pytest.mark.parametrize("masks", [False, True])
def test_objects_have_the_coordinates_of_the_map(masks):
    found: dict[str, Any] = {
        "boxes": np.array([[4.0, 6.0, 14.0, 26.0], [30.0, 2.0, 38.0, 9.0]]),
        "labels": np.array([2, 1]), "scores": np.array([0.75, 0.5]),
    }  # fmt: skip
    truth = np.zeros((40, 50), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(found["boxes"].astype(int).tolist(), 1):
        truth[y1:y2, x1:x2] = number
    if masks:
        truth[6:9, 4:14] = 0
        found["masks"] = [Part(2, 3, truth[3:, 2:] == 1), Part(29, 1, truth[1:12, 29:] == 2)]
    where = Placement(rasterio.CRS.from_epsg(32633), TRANSFORM)
    written = json.loads(json.dumps(features(found, ("a", "b"), where)))
    assert written["crs"]["properties"]["name"] == "EPSG:32633"
    described = [feature["properties"] for feature in written["features"]]
    assert described == [{"class": "b", "score": 0.75}, {"class": "a", "score": 0.5}]
    shapes = [(feature["geometry"], n) for n, feature in enumerate(written["features"], 1)]
    assert np.array_equal(rasterize(shapes, truth.shape, transform=TRANSFORM), truth)


def test_a_map_is_written_whole(tmp_path):
    values = np.arange(300 * 70, dtype=np.uint16).reshape(300, 70)
    write_map(tmp_path / "x.tif", values, Placement(None, TRANSFORM))
    with rasterio.open(tmp_path / "x.tif") as data:
        assert np.array_equal(data.read(1), values)
        assert data.profile["tiled"]
