import math
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fcmae.config.training import AugmentBase
from fcmae.data.augment import center_box, crop_box, random_geometry
from fcmae.data.decode import read_image
from fcmae.data.image import Reading

SCALE, RATIO = (0.2, 1.0), (0.75, 4 / 3)
SHAPES = AugmentBase(crop_scale=[*SCALE], crop_ratio=[*RATIO])
LARGE = AugmentBase(crop_scale=[0.9, 1.0], crop_ratio=[*RATIO])


@pytest.mark.parametrize(
    ("width", "height"), [(400, 533), (533, 400), (1, 30_000), (30_000, 1), (1, 1), (7, 5)]
)
def test_boxes_lie_inside_the_image(width: int, height: int) -> None:
    for index in range(300):
        left, top, w, h = crop_box(0, 0, index, (width, height), SHAPES)
        assert w >= 1
        assert h >= 1
        assert 0 <= left <= width - w
        assert 0 <= top <= height - h


def test_area_and_aspect_follow_random_resized_crop() -> None:
    ours = np.array([crop_box(1, 0, i, (4000, 4000), SHAPES) for i in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(1, 4000, 4000)
    theirs = np.array(
        [
            [params["left"], params["top"], params["width"], params["height"]]
            for params in (
                v2.RandomResizedCrop(224, scale=SCALE, ratio=RATIO).make_params([image])
                for _ in range(4000)
            )
        ]
    )
    for statistic in (
        lambda box: box[:, 2] * box[:, 3] / 4000**2,  # area
        lambda box: np.log(box[:, 2] / box[:, 3]),  # aspect
        lambda box: box[:, 0] / 4000,
        lambda box: box[:, 1] / 4000,
    ):
        quantiles = np.linspace(0.05, 0.95, 10)
        assert np.allclose(
            np.quantile(statistic(ours), quantiles),
            np.quantile(statistic(theirs), quantiles),
            atol=0.03,
        )


def test_an_image_too_long_for_any_draw_is_cropped_at_its_centre() -> None:
    assert crop_box(0, 0, 0, (1000, 10), LARGE) == (493, 0, 13, 10)
    assert crop_box(0, 0, 0, (9, 1000), LARGE) == (0, 494, 9, 12)


def test_a_crop_is_a_function_of_seed_epoch_and_index() -> None:
    base = crop_box(0, 0, 0, (400, 500), SHAPES)
    assert crop_box(0, 0, 0, (400, 500), SHAPES) == base
    others = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert all(crop_box(*other, (400, 500), SHAPES) != base for other in others)


def test_flips_are_fair_independent_and_only_where_allowed() -> None:
    def flips(index: int, hflip: bool, vflip: bool) -> tuple[bool, bool]:
        augment = AugmentBase(hflip=hflip, vflip=vflip)
        drawn = random_geometry(0, 0, index, (400, 500), augment)
        assert (drawn.size, drawn.box) == ((400, 500), crop_box(0, 0, index, (400, 500), augment))
        return drawn.flip_h, drawn.flip_v

    drawn = np.array([flips(index, True, True) for index in range(4000)])
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05
    across = [flips(index, True, False) for index in range(100)]
    assert [a for a, _ in across] == drawn[:100, 0].tolist()
    assert not any(down for _, down in across)
    assert flips(0, False, False) == (False, False)


@pytest.mark.parametrize(
    ("size", "img_size", "box"),
    [
        ((400, 300), (224, 224), (50, 0, 300, 300)),
        ((300, 400), (96, 192), (0, 125, 300, 150)),
        ((1, 30_000), (64, 64), (0, 14_999, 1, 1)),
    ],
)
def test_centre_boxes(
    size: tuple[int, int], img_size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert center_box(*size, img_size) == box


def photograph(width: int, height: int) -> Image.Image:
    """Edges, gradients and noise: more contrast than real photographs have."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)]
    pixels = 127 + 120 * np.stack(waves, axis=-1) + random.normal(0, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(400, 533), (640, 427), (90, 50), (2100, 2100)])
def test_resized_crops_equal_torchvision(tmp_path: Path, size: tuple[int, int]) -> None:
    image = photograph(*size)
    image.save(tmp_path / "x.png")
    picture = read_image(str(tmp_path / "x.png"), Reading(3, 10**8))
    assert picture.size == size
    for index in range(12):
        left, top, w, h = crop_box(0, 0, index, size, SHAPES)
        img_size = (224, 224) if index % 2 else (96, 160)
        upright = h - img_size[0] > max(0, 2 * (w - img_size[1]))
        if upright and int(PIL.__version__.split(".")[0]) < 13:
            continue  # there the rows went first, always
        expected = v2.functional.resized_crop(
            image, top, left, h, w, list(img_size), v2.InterpolationMode.BICUBIC, antialias=True
        )
        ours = picture.resized((left, top, w, h), img_size).pixels.transpose(1, 2, 0)
        assert np.abs(ours.astype(int) - np.asarray(expected).astype(int)).max() <= 2
        flipped = picture.resized((left, top, w, h), img_size, True, True).pixels.transpose(1, 2, 0)
        assert (flipped == ours[::-1, ::-1]).all()


def test_ratio_limits_hold() -> None:
    for index in range(500):
        _, _, w, h = crop_box(3, 1, index, (1000, 900), SHAPES)
        assert RATIO[0] * 0.99 < w / h < RATIO[1] * 1.01
        assert 0.19 < w * h / 900_000 <= 1
        assert math.isfinite(w / h)
