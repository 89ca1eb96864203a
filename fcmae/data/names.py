"""Names of images end to end in one block: no Python object for each, so forks share memory."""

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fcmae.data.sources import Indices

_BLOCK = 65_536


class Named:
    """What lists of images have in common. A selection shares the names with its list.

    Attributes:
        names: names end to end, uint8.
        lengths: the length of each name (N,), uint16.
    """

    names: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint16]

    def __post_init__(self, starts: Indices | None) -> None:
        """Called by dataclasses.

        Args:
            starts: where each name starts (N,), int64; None where names follow each other in order.
        """
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self._starts: Indices = ends - self.lengths if starts is None else starts

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> bytes:
        """Return a name: a file's path relative to its root (or absolute, as given in a text file),
        that of a member of a shard, or a path or a position in a dataset."""
        start = int(self._starts[index])
        return self.names[start : start + int(self.lengths[index])].tobytes()

    @property
    def folder(self) -> str:
        """The folder, or the first of several, that the images lie in."""
        raise NotImplementedError

    def prefix(self, data: str) -> str:
        """Return what precedes the names in messages: where the images are in a folder `data`."""
        inside = os.path.relpath(self.folder, os.path.expanduser(data))
        return "" if inside == "." else f"{inside}/"

    def fingerprint(self) -> str:
        """Return the SHA-256 of the keys in their order, wherever the images lie."""
        digest = hashlib.sha256(self.lengths.astype("<u2").tobytes())
        for names in self._blocks():
            digest.update(names.tobytes())
        return digest.hexdigest()

    def joined(self) -> npt.NDArray[np.uint8]:
        """Return the names end to end in the order of the images."""
        return np.concatenate([*self._blocks(), self.names[:0]])

    def _blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the names end to end in the order of the images, a bounded number at a time."""
        for first in range(0, len(self), _BLOCK):
            starts = self._starts[first : first + _BLOCK]
            lengths = self.lengths[first : first + _BLOCK].astype(np.int64)
            ends = np.cumsum(lengths)
            yield self.names[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])]
