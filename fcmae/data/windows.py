"""Windows of large images: what is cut first, so that only the tiles it touches are read.

A window's place in an image is a pair of numbers from 0 to 1, so it needs no size. Windows, not
images, are held out: training windows do not overlap them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fcmae import rng
from fcmae.data.augment import Box
from fcmae.data.decode import read_image
from fcmae.data.image import BadImage, OpenedImage
from fcmae.data.sources import FEWEST_TO_HOLD_OUT, Indices, PathOrFile, Source, key_hashes
from fcmae.data.statistics import asked_reading

LEAST_SIDES = 4
"""An image of fewer windows along both sides is held out whole."""

MOST_HELD = 10
"""At most one in so many pixels of an image is held out."""

Place = tuple[float, float]
"""Where a window is between the left and the right end of an image, and its top and bottom."""


WHOLE: Place = (-1.0, -1.0)
"""Stands for all of an image."""


def window_box(size: tuple[int, int], side: int, place: Place) -> Box:
    """Return a square window, or all of an image of (width, height) that is smaller."""
    width, height = min(side, size[0]), min(side, size[1])
    left, top = place[0] * (size[0] - width + 1), place[1] * (size[1] - height + 1)
    return int(left), int(top), width, height


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have a pixel in common."""
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


@dataclass(eq=False)
class Windows:
    """A source of windows.

    Args:
        source: the image of each window.
        places: of each (N, 2); `WHOLE` for a whole image.
        side: of the windows in pixels.
    """

    source: Source
    places: npt.NDArray[np.float64]
    side: int

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def key(self, index: int) -> bytes:
        x, y = self.places[index].tolist()
        place = "" if (x, y) == WHOLE else f" at {x:.6f},{y:.6f}"
        return self.source.key(index) + place.encode()

    def open(self, index: int) -> PathOrFile:
        """Return the whole image; see `cut`."""
        return self.source.open(index)

    def cut(self, index: int, opened: OpenedImage) -> OpenedImage:
        """Return the window of its opened image."""
        x, y = self.places[index].tolist()
        if (x, y) == WHOLE:
            return opened
        return opened.window(window_box(opened.size, self.side, (x, y)))

    def select(self, indices: npt.ArrayLike) -> "Windows":
        picks = np.asarray(indices, dtype=np.int64)
        return replace(self, source=self.source.select(picks), places=self.places[picks])

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the images, without the windows, which follow from them."""
        self.source.save(path)


Held = tuple[int, float, float]
"""An image's index and a place in it: what is held out."""


def hold_out_windows(source: Source, config: Any) -> list[Held]:
    """Return the windows to hold out.

    Images are visited in the order of the hashes of their keys until there are `holdout` windows,
    which take about a tenth of an image's pixels at most. An image with too little room for a
    window beside them is held out whole. With fewer than 500 samples, nothing is held out.

    Args:
        source: all images.
        config: of pretraining, with a `window`.
    """
    side, hashes = config.window, key_hashes(source)
    if len(source) * config.crops_per_image < FEWEST_TO_HOLD_OUT:
        return []
    held, left = list[Held](), len(source)
    for index in np.argsort(hashes, kind="stable").tolist():
        if len(held) >= config.holdout:
            break
        try:
            width, height = read_image(source.open(index), asked_reading(config)).size
        except BadImage:
            continue  # training reports it
        if max(width, height) >= LEAST_SIDES * side:
            count = max(1, width * height // (MOST_HELD * side**2))
            draws = rng.uniform(0, rng.WINDOW, 0, int(hashes[index]), np.arange(2 * count))
            held += [(index, x, y) for x, y in draws.reshape(count, 2).tolist()]
        elif left > 1:
            held.append((index, *WHOLE))
            left -= 1
    return held[: config.holdout]


def split_windows(source: Source, held: Sequence[Held], side: int) -> tuple[Indices, Windows]:
    """Return the indices to train on, ascending, and the windows held out."""
    whole = [index for index, *place in held if tuple(place) == WHOLE]
    train = np.setdiff1d(np.arange(len(source)), whole)
    places = np.array([place for _, *place in held], np.float64).reshape(-1, 2)
    return train, Windows(source.select([index for index, *_ in held]), places, side)


def random_windows(source: Source, seed: int, side: int) -> Windows:
    """Return a random window of each image."""
    images = np.arange(len(source))[:, None]
    return Windows(source, rng.uniform(seed, rng.SAMPLE, 1, images, np.arange(2)), side)


def taken_places(held: Windows) -> dict[bytes, list[Place]]:
    """Return the places held out of each image, by its key."""
    taken = dict[bytes, list[Place]]()
    for index, (x, y) in enumerate(held.places.tolist()):
        taken.setdefault(held.source.key(index), []).append((x, y))
    return taken
