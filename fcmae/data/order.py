"""The samples of a step, determined by its number alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from fcmae import rng
from sparse.errors import InputError

Key = tuple[int, int]
"""(epoch, index) of a sample in the training list."""


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of steps that read each of n images at least once."""
    return -(-n // batch_size)


def epoch_order(seed: int, epoch: int, n: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Return the images that an epoch reads, (steps * batch_size,).

    All n in random order; the last batch is filled from the start of the same order, repeatedly if
    the source is smaller than the batch.
    """
    return np.resize(rng.permutation(seed, epoch, n), steps_per_epoch(n, batch_size) * batch_size)


def check_parts(batch_size: int, world_size: int, accumulate: int) -> None:
    """Make sure that a global batch divides into equal parts.

    Raises:
        InputError: processes x accumulate does not divide it; names the nearest sizes that work.
    """
    parts = world_size * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        raise InputError(
            f"batch_size {batch_size} is not divisible by processes {world_size} x accumulate "
            f"{accumulate}: the nearest are {below or parts} and {below + parts}"
        )


@dataclass
class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one process, from `start_step` up to but not including `total_steps`.

    A step's global batch is cut into accumulate * world_size equal parts (see `check_parts`), in
    order; the a-th micro-batch of a process is part a * world_size + rank. So the numbers of
    processes and micro-batches determine where and when a sample is computed, never which samples
    a step has.
    """

    n: int
    batch_size: int
    seed: int
    start_step: int
    total_steps: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __len__(self) -> int:
        return max(self.total_steps - self.start_step, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        steps = steps_per_epoch(self.n, self.batch_size)
        size = self.batch_size // (self.accumulate * self.world_size)
        current, order = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.total_steps):
            epoch, within = divmod(step, steps)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, self.n, self.batch_size)
            for micro in range(self.accumulate):
                part = micro * self.world_size + self.rank
                start = within * self.batch_size + part * size
                yield [(epoch, index) for index in order[start : start + size].tolist()]
