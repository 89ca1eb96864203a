"""Random numbers as a function of where they are used, so a run has no generator state to save.

Every draw is a hash of (seed, stream, epoch, index, counter). Order, crops, flips and masks do not
depend on the number of workers or processes, nor on the version of torch or numpy, and a resumed
run draws the same numbers as one never stopped. The golden values in the tests pin the hash.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

ORDER = 1
MASK = 2
CROP = 3
FLIP = 4
REPLACE = 5
HOLDOUT = 6
HOLDOUT_MASK = 7
MODEL = 8
AUGMENT = 9
SAMPLE = 10
DROP_PATH = 11
FINETUNE = 12
REDRAW = 13
WINDOW = 14
"""Streams: what a number is drawn for. Never reuse or change a value: old runs depend on it."""

Words = npt.NDArray[np.uint64]
Index = int | npt.NDArray[np.integer[Any]]

_WORD = 0xFFFFFFFFFFFFFFFF


def _mix(x: Any) -> Any:
    """Scramble 64 bits one to one: the finaliser of splitmix64, then half of murmur3's.

    Works on an int and, element by element, on an array of uint64.
    """
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & _WORD
    return x ^ (x >> 32)


def bits(seed: Index, stream: int, epoch: Index, index: Index, counter: Index = 0) -> Words:
    """Return 64 random bits for each element of the broadcast arguments.

    The arguments are absorbed one after the other, each by a bijection of the 64-bit state, so two
    calls that differ in one argument never collide. All are taken modulo 2^64. The result has the
    broadcast shape of the arguments, with at least one dimension.
    """
    state: Any = 0
    for value in (seed, stream, epoch, index, counter):
        word = value.astype(np.uint64) if isinstance(value, np.ndarray) else int(value) & _WORD
        state = _mix(((state ^ word) + 0x9E3779B97F4A7C15) & _WORD)
    return np.atleast_1d(np.asarray(state, dtype=np.uint64))


def uniform(
    seed: Index, stream: int, epoch: Index, index: Index, counter: Index = 0
) -> npt.NDArray[np.float64]:
    """Return numbers uniform over [0, 1), with 53 bits each; shapes as in `bits`."""
    words = bits(seed, stream, epoch, index, counter)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """Return the order (n,) in which an epoch visits n samples: their hashes, sorted."""
    return np.argsort(bits(seed, ORDER, epoch, np.arange(n)), kind="stable").astype(np.int64)


def seed_for(seed: int, stream: int, epoch: int, index: int) -> int:
    """Return 63 random bits as an int, to seed another generator such as torch's."""
    return int(bits(seed, stream, epoch, index)[0] >> np.uint64(1))
