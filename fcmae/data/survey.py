"""What the images of a source are like, by a sample: formats, sizes, how fast they are read."""

import io
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fcmae.data.augment import center_box
from fcmae.data.image import BadImage, MissingReader
from fcmae.data.sources import PathOrFile, Source
from fcmae.data.statistics import Preprocessing, sample_of
from sparse.errors import InputError

LOOKED_AT = 32
"""Number of images that are read."""

FAR_OFF = 5.0
"""Warn if the ratio of standard deviations, or the distance of means in std, exceeds this."""

_UNITS = ((10**9, "GB"), (10**6, "MB"), (1000, "kB"), (1, "B"))

_log = logging.getLogger(__name__)


@dataclass
class Survey:
    """A sample of the images of a source.

    Attributes:
        kinds: numbers of images by format, bands and bit depth, in words.
        sizes: (width, height) of each in pixels.
        stored: bytes of each that is a file.
        valid: share of the pixels that count, of each.
        seconds: to read a crop of each.
        mean, std: of each channel, in units of [0, 1]; empty if no pixel counts.
        bad: (name, reason) of those that can't be read.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    bad: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Describe the images in lines for a log."""
        if not self.sizes:  # a source has images, so there is a bad one
            return [f"no image of a sample can be read, such as {': '.join(self.bad[0])}"]
        kinds = "; ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        smallest, largest = (
            "{}×{}".format(*choose(self.sizes, key=lambda size: size[0] * size[1]))
            for choose in (min, max)
        )
        sizes = smallest if smallest == largest else f"{smallest} to {largest}"
        each = f", {_in_words(float(np.mean(self.stored)))} each" if self.stored else ""
        lines = [f"a sample of images: {kinds}; {sizes} pixels{each}"]
        rate = 1 / float(np.median(self.seconds[1:] or self.seconds))  # the first imports packages
        lines.append(f"one worker reads about {rate:.3g} images/s")
        if min(self.valid) < 1:
            lines.append(f"{1 - np.mean(self.valid):.1%} of their pixels have no value")
        if self.bad:
            lines.append(f"{len(self.bad)} can't be read, such as {': '.join(self.bad[0])}")
        return lines

    def warn_if_far_off(self, images: Preprocessing) -> None:
        """Warn if mean and std are far from those of the images: little is learned from values that
        are nearly equal or far from zero."""
        if not self.mean:
            return
        found, given = np.array([self.mean, self.std]), np.array([images.mean, images.std])
        shifts, spreads = np.abs(found[0] - given[0]) / given[1], found[1] / given[1]
        if spreads.min() < 1 / FAR_OFF or max(*spreads, *shifts) > FAR_OFF:
            _log.warning(
                "images have mean %s, std %s, not %s, %s: use --augment.mean data --augment.std "
                "data", *np.round([*found, *given], 4).tolist(),
            )  # fmt: skip


def survey(source: Source, images: Preprocessing, seed: int, max_pixels: int) -> Survey:
    """Read centre crops of a few images that the seed chooses.

    Raises:
        InputError: a format needs a package that is not installed.
    """
    found, values = Survey(), list[np.ndarray]()
    for index in sample_of(seed, len(source), LOOKED_AT):
        began = time.perf_counter()
        try:
            opened = images.read(source, index, max_pixels)
            box = center_box(*opened.size, images.img_size)
            crop = opened.resized(box, images.img_size, interpolation=images.interpolation)
        except MissingReader as error:
            raise InputError(f"image {source.name(index)!r} can't be read: {error}") from error
        except BadImage as error:
            found.bad.append((source.name(index), str(error)))
            continue
        found.seconds.append(time.perf_counter() - began)
        found.kinds[opened.kind] += 1
        found.sizes.append(opened.whole_size)
        found.valid.append(1.0 if crop.valid is None else float(crop.valid.mean()))
        values.append(crop.values())
        if size := _stored(source.open(index)):
            found.stored.append(size)
    every = np.concatenate(values, axis=1, dtype=np.float64) if values else np.empty((0, 0))
    if every.size:
        found.mean, found.std = tuple(every.mean(1).tolist()), tuple(every.std(1).tolist())
    return found


def _stored(path_or_file: PathOrFile) -> int:
    if isinstance(path_or_file, str | bytes):
        return os.path.getsize(path_or_file) if os.path.isfile(path_or_file) else 0
    with path_or_file as file:
        return file.seek(0, io.SEEK_END)


def _in_words(size: float) -> str:
    unit, name = next(entry for entry in _UNITS if size >= entry[0] or entry[0] == 1)
    return f"{size / unit:.3g} {name}"
