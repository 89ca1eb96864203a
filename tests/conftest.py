"""Folders of pictures made on the spot."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_pictures(folder: Path, count: int, seed: int = 0, size: int = 80) -> Path:
    """Smooth random colour fields, each different, as PNGs."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((size, size + 16), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 80×96 pixels; read-only."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 24)
