"""Pictures in their centre crop: those held out of training, and a sample of all to measure."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import center_box
from fcmae.data.batch import Batch, Sample, as_float, collate
from fcmae.data.decode import BadImage, Pixels, read_picture
from fcmae.data.files import FileList
from fcmae.model.mask import grid_of, random_mask
from sparse.errors import InputError

LOOKED_AT = 32
"""Pictures by which to tell whether a mean and std are theirs."""

FAR_OFF = 5.0
"""Factor between deviations, and deviations between means, that are told."""

_log = logging.getLogger(__name__)


class HoldoutSet:
    """Centre crops of the held-out files, always with the same masks.

    A mask depends on the file's path alone, not on the other files or on the order. Files that
    can't be read are left out and collected in `bad` as (name, reason).
    """

    def __init__(
        self,
        files: FileList,
        img_size: tuple[int, int],
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.files = files
        self.img_size = img_size
        self.in_chans = in_chans
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.max_pixels = max_pixels
        self.bad: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the readable pictures in the order of the list; no batch is empty."""
        self.bad = []
        samples = []
        for index in range(len(self.files)):
            try:
                samples.append(self._sample(index))
            except BadImage as error:
                self.bad.append((self.files.name(index), error.reason))
            if len(samples) == batch_size:
                yield collate(samples)
                samples = []
        if samples:
            yield collate(samples)

    def _sample(self, index: int) -> Sample:
        image = _center_crop(self.files, index, self.img_size, self.in_chans, self.max_pixels)
        mask = random_mask(
            self.seed,
            0,
            self.files.path_hash(index),
            grid_of(self.img_size),
            self.mask_ratio,
            stream=rng.HOLDOUT_MASK,
        )
        return Sample(image, mask, index)


def _center_crop(
    files: FileList, index: int, img_size: tuple[int, int], in_chans: int, max_pixels: int
) -> Pixels:
    picture = read_picture(files.path(index), in_chans, max_pixels)
    return picture.resized(center_box(*picture.size, img_size), img_size)


def measure_mean_std(
    files: FileList,
    img_size: tuple[int, int],
    in_chans: int = 3,
    sample: int = 1024,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[float], list[float]]:
    """Return each channel's mean and deviation over centre crops, in units of [0, 1].

    At most `sample` files are read, chosen by hash.

    Raises:
        InputError: none of them can be read.
    """
    count, total, squares = 0, np.zeros(in_chans), np.zeros(in_chans)
    order = np.argsort(rng.bits(seed, rng.SAMPLE, 0, np.arange(len(files))), kind="stable")
    reason = "no pictures"
    for index in np.sort(order[:sample]).tolist():
        try:
            image = _center_crop(files, index, img_size, in_chans, max_pixels)
        except BadImage as error:
            reason = f"{files.name(index)!r}: {error.reason}"
            continue
        pixels = as_float(image).reshape(in_chans, -1).astype(np.float64)
        count += pixels.shape[1]
        total += pixels.sum(axis=1)
        squares += np.square(pixels).sum(axis=1)
    if not count:
        raise InputError(f"mean and std can't be measured, no picture can be read ({reason})")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def warn_if_far_off(
    files: FileList, img_size: tuple[int, int], in_chans: int, mean: Sequence[float],
    std: Sequence[float], seed: int, max_pixels: int,
) -> None:  # fmt: skip
    """Warn where mean and std are of other pictures than these: little is learnt from what is then
    all nearly the same number, or far from zero."""
    try:
        found = measure_mean_std(files, img_size, in_chans, LOOKED_AT, seed, max_pixels)
    except InputError:  # none of them can be read: the run will say so
        return
    shifts = [(m - given) / s for m, given, s in zip(found[0], mean, std, strict=True)]
    spreads = [measured / given for measured, given in zip(found[1], std, strict=True)]
    if min(spreads) < 1 / FAR_OFF or max(spreads) > FAR_OFF or max(map(abs, shifts)) > FAR_OFF:
        _log.warning(
            "the pictures have mean %s and std %s, but are normalised with %s and %s: give "
            "--augment.mean data --augment.std data",
            *([round(float(value), 4) for value in values] for values in (*found, mean, std)),
        )
