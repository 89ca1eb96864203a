"""Which pictures there are: a compact list of paths, and how folders and lists are read into one.

Paths are bytes throughout, since a file name may be any bytes; text is only made for messages.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse.errors import InputError

EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "npy"),
)
"""What counts as a picture when a folder is searched. The content decides how a file is read."""

_SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)
_FORMAT = "fcmae-files-1"
_LONGEST = 65_535
_BLOCK = 65_536

Indices = npt.NDArray[np.int64]
_Key = tuple[int, int]


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

    def split_holdout(self, count: int, minimum: int = 500) -> tuple[Indices, Indices]:
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the list: a line of JSON, lengths, root numbers, names, SHA-256 of all before.

        Numbers are 16 bits, little-endian.
        """
        header = {
            "format": _FORMAT,
            "roots": list(self.roots),
            "files": len(self),
            "bytes": int(self._lengths.sum(dtype=np.int64)),
        }
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
        line, newline, _ = content.partition(b"\n")
        body = len(line) + len(newline)
        if hashlib.sha256(memoryview(content)[:-32]).digest() != content[-32:]:
            raise InputError(f"file list {str(path)!r} is damaged: restore it or start a new run")
        header = json.loads(line)
        if header.get("format") != _FORMAT:
            raise InputError(
                f"file list {str(path)!r} has format {header.get('format')!r}: this version reads "
                f"{_FORMAT!r}"
            )
        count = header["files"]
        return cls(
            [os.fsencode(root) for root in header["roots"]],
            np.frombuffer(content, np.uint8, header["bytes"], body + 4 * count),
            np.frombuffer(content, "<u2", count, body),
            np.frombuffer(content, "<u2", count, body + 2 * count),
        )


def find_images(data: str | Sequence[str], exclude: str | None = None) -> FileList:
    """Return the pictures of a folder, of a text file of paths, or of several of them.

    A folder is searched with its subfolders, symbolic links followed; no folder and no linked
    picture is taken twice, hidden names and dangling links are left out, and the order is that of
    the relative paths' bytes. A text file holds a path a line, relative to its own folder or
    absolute; empty lines and lines that begin with # are skipped. `exclude` is a folder that is not
    searched, such as the run's own.

    Raises:
        InputError: a source that is missing, empty, unreadable, or given twice.
    """
    sources = [data] if isinstance(data, str) else list(data)
    if not sources:
        raise InputError("data [] names no source: give a folder of pictures")
    scan = _Scan(exclude)
    for source in sources:
        before = scan.count
        try:
            scan.add_source(source)
        except OSError as error:
            where = os.fsdecode(error.filename or source)
            raise InputError(
                f"data {where!r} can't be read ({error.strerror}): give a folder of pictures or a "
                "text file of paths that this user may read"
            ) from error
        if scan.count == before:
            raise InputError(
                f"data {source!r} holds no pictures that are not named already: files ending in "
                f"{', '.join(EXTENSIONS)} count"
            )
    return scan.finish()


class _Scan:
    """Collects names, source by source."""

    def __init__(self, exclude: str | None) -> None:
        self.roots: list[bytes] = []
        self.names = bytearray()
        self.lengths = array("H")
        self.root_ids = array("H")
        self.visited: dict[_Key, bytes] = {}
        self.links: list[tuple[int, _Key]] = []
        self.excluded = _key(exclude) if exclude and os.path.isdir(exclude) else None

    @property
    def count(self) -> int:
        return len(self.lengths)

    def add_source(self, source: str) -> None:
        path = os.fsencode(os.path.abspath(os.path.expanduser(source)))
        if os.path.isdir(path):
            self.roots.append(path)
            self._add_folder(path)
            return
        folder, name = os.path.split(path)
        self.roots.append(folder)
        if name.lower().endswith(_SUFFIXES):
            os.stat(path)
            self._add(name)
            return
        for line in _read_listing(path, source):
            self._add(line)

    def _add(self, name: bytes) -> None:
        self.names += name
        self.lengths.append(len(name))
        self.root_ids.append(len(self.roots) - 1)

    def _add_folder(self, root: bytes) -> None:
        """Walk a tree depth first, in the byte order of the relative paths."""
        if _key(root) in self.visited:
            return
        stack = [(b"", self._entries(root))]
        while stack:
            folder, entries = stack[-1]
            for name, link in entries:
                inner = folder + name
                if not name.endswith(b"/"):
                    if link:
                        self.links.append((self.count, link))
                    self._add(inner)
                    continue
                path = os.path.join(root, inner)
                if _key(path) not in self.visited and _key(path) != self.excluded:
                    stack.append((inner, self._entries(path)))
                    break
            else:
                stack.pop()

    def _entries(self, path: bytes) -> Iterator[tuple[bytes, _Key | None]]:
        """Return a folder's subfolders (ending in /) and pictures, sorted; links with their target.

        The / makes the order of the tree that of whole paths: "a/b" sorts after "a-b".
        """
        self.visited[_key(path)] = path
        names, links = [], {}
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                try:
                    if entry.is_dir():
                        names.append(entry.name + b"/")
                    elif entry.name.lower().endswith(_SUFFIXES) and entry.is_file():
                        names.append(entry.name)
                        if entry.is_symlink():
                            links[entry.name] = _key(entry.path)
                except OSError:  # a link to itself, or into a folder that is closed to us
                    continue
        names.sort()
        return ((name, links.get(name)) for name in names)

    def finish(self) -> FileList:
        files = FileList(
            self.roots,
            np.frombuffer(self.names, np.uint8),
            np.frombuffer(self.lengths, np.uint16),
            np.frombuffer(self.root_ids, np.uint16),
        )
        repeats = self._repeats()
        return files.select(np.delete(np.arange(len(files)), repeats)) if repeats else files

    def _repeats(self) -> list[int]:
        """Return the positions of links to a picture that is in the list anyway."""
        if not self.links:
            return []
        targets = {key for _, key in self.links}
        taken = set()
        for (device, _), path in self.visited.items():
            with os.scandir(path) as entries:
                for entry in entries:
                    if (device, entry.inode()) in targets and _is_picture(entry):
                        taken.add((device, entry.inode()))
        repeats = []
        for position, key in self.links:
            if key in taken:
                repeats.append(position)
            taken.add(key)
        return repeats


def _key(path: str | bytes) -> _Key:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_picture(entry: os.DirEntry[bytes]) -> bool:
    name = entry.name
    return (
        not name.startswith(b".")
        and name.lower().endswith(_SUFFIXES)
        and entry.is_file(follow_symlinks=False)
    )


def _read_listing(path: bytes, source: str) -> list[bytes]:
    """Return the distinct paths of a text file, in byte order."""
    with open(path, "rb") as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    lines = {line.rstrip(b"\r") for line in content.split(b"\n")}
    names = [line for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if b"\0" in content or any(len(name) > _LONGEST for name in names):
        raise InputError(
            f"data {source!r} is neither a folder, nor a picture by its name, nor a text file of "
            "paths, one a line"
        )
    return sorted(names)
