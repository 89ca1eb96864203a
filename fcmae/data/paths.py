"""A list of paths that stays small: a million files in some 60 MB, shared with forked workers.

Paths are bytes, since a file name may be any bytes; text is only made for messages.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse.errors import InputError

_FORMAT = "fcmae-files-1"
_BLOCK = 65_536

FEWEST_TO_HOLD_OUT = 500
"""Of fewer pictures, none are kept from pretraining."""

Indices = npt.NDArray[np.int64]


class FileList:
    """Paths of pictures, kept as one block of names and 12 bytes a file beside it.

    A name is relative to one of the roots. There is no Python object for a file, so that forked
    workers share the memory, and a selection shares the names with the list that it comes from.
    """

    def __init__(
        self,
        roots: Sequence[bytes],
        names: npt.NDArray[np.uint8],
        lengths: npt.NDArray[np.uint16],
        root_ids: npt.NDArray[np.uint16],
        starts: Indices | None = None,
    ) -> None:
        """Hold arrays: names end to end, and for each file its length, root and (optional) start.

        Without `starts`, the names follow each other in the order of the files.
        """
        self._roots = tuple(roots)
        self._names = names
        self._lengths = lengths
        self._root_ids = root_ids
        self._starts = np.cumsum(lengths, dtype=np.int64) - lengths if starts is None else starts

    @property
    def roots(self) -> tuple[str, ...]:
        """Return the folders that names are relative to."""
        return tuple(os.fsdecode(root) for root in self._roots)

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileList):
            return NotImplemented
        return (
            self._roots == other._roots
            and np.array_equal(self._lengths, other._lengths)
            and np.array_equal(self._root_ids, other._root_ids)
            and all(map(np.array_equal, self._blocks(), other._blocks()))
        )

    __hash__ = None  # type: ignore[assignment]

    def relative(self, index: int) -> bytes:
        """Return the path of a file relative to its root (or absolute, if a list said so)."""
        start = int(self._starts[index])
        return self._names[start : start + int(self._lengths[index])].tobytes()

    def path(self, index: int) -> bytes:
        """Return the path that `open` takes."""
        return os.path.join(self._roots[self._root_ids[index]], self.relative(index))

    def name(self, index: int) -> str:
        """Return a path for messages: relative where there is one root, in full otherwise."""
        return os.fsdecode(self.relative(index) if len(self._roots) == 1 else self.path(index))

    def path_hash(self, index: int) -> int:
        """Return 64 bits that depend on the relative path alone, not on the other files."""
        digest = hashlib.blake2b(self.relative(index), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def select(self, indices: npt.ArrayLike) -> "FileList":
        """Return the files at `indices`, in that order."""
        picks = np.asarray(indices, dtype=np.int64)
        return FileList(
            self._roots,
            self._names,
            self._lengths[picks],
            self._root_ids[picks],
            self._starts[picks],
        )

    def split_holdout(
        self, count: int, minimum: int = FEWEST_TO_HOLD_OUT
    ) -> tuple[Indices, Indices]:
        """Return the indices to train on and those held out, both ascending.

        Held out are the `count` files whose paths have the smallest hashes, so that other files,
        added or removed, change little; none of a list shorter than `minimum`.
        """
        everything = np.arange(len(self), dtype=np.int64)
        if count <= 0 or len(self) < max(minimum, count + 1):
            return everything, everything[:0]
        hashes = np.fromiter(map(self.path_hash, range(len(self))), np.uint64, len(self))
        held_out = np.argsort(hashes, kind="stable")[:count]
        training = np.ones(len(self), dtype=np.bool_)
        training[held_out] = False
        return everything[training], everything[~training]

    def _blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the names end to end in the order of the files, a bounded number at a time."""
        for first in range(0, len(self), _BLOCK):
            starts = self._starts[first : first + _BLOCK]
            lengths = self._lengths[first : first + _BLOCK].astype(np.int64)
            ends = np.cumsum(lengths)
            yield self._names[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])]

    def digest(self) -> str:
        """SHA-256 of the names in their order, wherever the roots lie."""
        digest = hashlib.sha256(self._lengths.astype("<u2").tobytes())
        for names in self._blocks():
            digest.update(names.tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the list: a line of JSON, lengths, root numbers, names, SHA-256 of all before.

        Numbers are 16 bits, little-endian.
        """
        header = {"format": _FORMAT, "roots": list(self.roots), "files": len(self)}
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for part in (
                json.dumps(header).encode("ascii") + b"\n",
                self._lengths.astype("<u2").tobytes(),
                self._root_ids.astype("<u2").tobytes(),
            ):
                digest.update(part)
                file.write(part)
            for names in self._blocks():
                digest.update(names.tobytes())
                file.write(names.tobytes())
            file.write(digest.digest())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FileList":
        """Read what `save` wrote.

        Raises:
            InputError: the file can't be read, or is not what `save` wrote.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"file list {str(path)!r} can't be read: {error.strerror}") from error
        try:
            return cls._parse(content)
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(
                f"file list {str(path)!r} is damaged ({error}): restore it or start a new run"
            ) from error

    @classmethod
    def _parse(cls, content: bytes) -> "FileList":
        if hashlib.sha256(memoryview(content)[:-32]).digest() != content[-32:]:
            raise ValueError("its SHA-256 does not fit")
        line = content[: content.index(b"\n") + 1]
        header = json.loads(line)
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']!r} is not {_FORMAT!r}")
        roots = [os.fsencode(root) for root in header["roots"]]
        numbers = np.frombuffer(content, "<u2", 2 * header["files"], len(line))
        lengths, root_ids = np.split(numbers, 2)
        names = np.frombuffer(content, np.uint8, offset=len(line) + numbers.nbytes)[:-32]
        if lengths.sum(dtype=np.int64) != len(names) or (root_ids >= len(roots)).any():
            raise ValueError("its parts do not fit together")
        return cls(roots, names, lengths, root_ids)
