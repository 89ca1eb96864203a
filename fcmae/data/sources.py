"""Sources of images: their interface, and the split by hash."""

import hashlib
import os
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FEWEST_TO_HOLD_OUT = 500
"""With fewer images, pretraining holds none out."""

NO_LABEL = -1

Indices = npt.NDArray[np.int64]
PathOrFile = str | bytes | BinaryIO
"""A path for `open`, or a seekable binary file at its start."""


class Source(Protocol):
    """Images by position, from 0 to `len(source) - 1`, always in the same order.

    Worker processes use the same source at the same time, so `open` must not move a file position
    that they share. Keep few Python objects per image: forked workers share the memory of a source
    until its reference counts change.
    """

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """Return an image's name for messages and predictions."""

    def key(self, index: int, /) -> bytes:
        """Return what identifies an image in the source, independent of the source's location."""

    def open(self, index: int, /) -> PathOrFile:
        """Return an image's path, or a new binary file of its content, which the reader closes.

        Raises:
            BadImage: the content can't be opened.
            RunError: it can't be opened now, but perhaps later; see `fcmae.data.remote`.
        """

    def select(self, indices: npt.ArrayLike, /) -> "Source":
        """Return the images at `indices`, in that order."""

    def fingerprint(self) -> str:
        """Return a digest of the keys in order."""

    def save(self, path: str | os.PathLike[str], /) -> None:
        """Write the list of images as an .npz file, which `fcmae.data.find.load_source` reads."""


@runtime_checkable
class LabelledSource(Source, Protocol):
    """Images that bring their labels along.

    Attributes:
        classes: names of the labels.
        labels: the position of each image's label in `classes` (N,), int32; `NO_LABEL` for none.
    """

    classes: tuple[str, ...]
    labels: npt.NDArray[np.int32]


def key_hash(source: Source, index: int) -> int:
    """Return 64 bits that depend on an image's key alone, not on the other images."""
    digest = hashlib.blake2b(source.key(index), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def key_hashes(source: Source) -> npt.NDArray[np.uint64]:
    """Return the `key_hash` of every image, (N,)."""
    hashes = (key_hash(source, index) for index in range(len(source)))
    return np.fromiter(hashes, np.uint64, len(source))


def split_holdout(
    source: Source, count: int, minimum: int = FEWEST_TO_HOLD_OUT
) -> tuple[Indices, Indices]:
    """Return the indices to train on and the indices held out, both ascending.

    The `count` images whose keys have the smallest hashes are held out, so adding or removing other
    images changes little.

    Args:
        source: all images.
        count: number of images to hold out.
        minimum: none are held out of fewer images.
    """
    held = np.zeros(len(source), np.bool_)
    if 0 < count < len(source) >= minimum:
        held[np.argsort(key_hashes(source), kind="stable")[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
