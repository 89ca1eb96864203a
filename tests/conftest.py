"""Generated folders of images; no process that a test starts outlives it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli import reaped


@pytest.fixture(autouse=True)
def _reaped() -> Iterator[None]:
    with reaped():
        yield


def write_pictures(folder: Path, count: int, seed: int = 0, size: int = 80) -> Path:
    """Write PNGs of smooth random colour fields, each different."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((size, size + 16), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 80×96 pixels; read-only."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 24)


def write_classes(root: Path, classes: int = 3, train: int = 8, val: int = 4) -> Path:
    """Write labelled images of 40×48 pixels, root/train/CLASS and root/val/CLASS."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (48, 40, 3), dtype=np.uint8)
                top, left = rng.integers(4, 20, 2)
                pixels[top : top + 20, left : left + 16, label % 3] += 160
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 24 images for training and 12 for validation; read-only."""
    return write_classes(tmp_path_factory.mktemp("classes"))


def disc(size: tuple[int, int], seed: int) -> tuple[Image.Image, np.ndarray]:
    """A bright disc on a dark background, and its mask."""
    width, height = size
    draws = np.random.default_rng(seed).uniform(0.3, 0.7, 2)
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(x - draws[0] * width, y - draws[1] * height) < 0.25 * min(size)
    pixels = np.where(inside, 220, 40).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB"), inside.astype(np.uint8)


def write_masks(folder: Path, masks: str, count: int = 4, size: tuple[int, int] = (80, 72)) -> None:
    """Write images of a disc, and in the folder `masks` (masks or instances) its masks."""
    for name in ("images", masks):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        image, mask = disc(size, index)
        image.save(folder / "images" / f"{index}.jpg", quality=95)
        Image.fromarray(mask * (1 if masks == "masks" else 7)).save(folder / masks / f"{index}.png")
