"""Image files: folders and lists of paths are read into one list that stays small.

A million files take some 50 MB, which forked workers share. Paths are bytes, since a file name may
be any bytes; text is only made for messages.
"""

import hashlib
import io
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fcmae.data.sources import Indices
from sparse.errors import InputError

EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "npy"),
)
"""What counts as an image when a folder is searched. The content decides how a file is read."""

_SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)
_LONGEST = 65_535
_BLOCK = 65_536
_Key = tuple[int, int]
"""Device and inode: the same for every path to a folder."""


class FileList:
    """A source of image files: one block of all names, and 12 bytes per file beside it.

    A name is relative to one of the roots, and is the file's key. No Python object exists per file,
    so forked workers share the memory. A selection shares the names with the list it comes from.

    Args:
        roots: the folders that names are relative to.
        names: names end to end, uint8.
        lengths: the length of each name (N,), uint16.
        root_ids: the root of each file (N,), uint16.
        starts: where each name starts (N,), int64; None where names follow each other in order.
    """

    def __init__(
        self,
        roots: Sequence[bytes],
        names: npt.NDArray[np.uint8],
        lengths: npt.NDArray[np.uint16],
        root_ids: npt.NDArray[np.uint16],
        starts: Indices | None = None,
    ) -> None:
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

    def key(self, index: int) -> bytes:
        """Return a file's path relative to its root (or absolute, if a text file said so)."""
        start = int(self._starts[index])
        return self._names[start : start + int(self._lengths[index])].tobytes()

    def path(self, index: int) -> bytes:
        """Return a file's path, root included."""
        return os.path.join(self._roots[self._root_ids[index]], self.key(index))

    def open(self, index: int) -> bytes:
        """Return the path; whoever reads the image opens it."""
        return self.path(index)

    def name(self, index: int) -> str:
        """Return a path for messages: relative where there is one root, in full otherwise."""
        return os.fsdecode(self.key(index) if len(self._roots) == 1 else self.path(index))

    def select(self, indices: npt.ArrayLike) -> "FileList":
        """Return the files at `indices`, in that order."""
        picks = np.asarray(indices, dtype=np.int64)
        lengths, root_ids, starts = self._lengths[picks], self._root_ids[picks], self._starts[picks]
        return FileList(self._roots, self._names, lengths, root_ids, starts)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the keys in their order, wherever the roots lie."""
        digest = hashlib.sha256(self._lengths.astype("<u2").tobytes())
        for names in self._blocks():
            digest.update(names.tobytes())
        return digest.hexdigest()

    def _blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the names end to end in the order of the files, a bounded number at a time."""
        for first in range(0, len(self), _BLOCK):
            starts = self._starts[first : first + _BLOCK]
            lengths = self._lengths[first : first + _BLOCK].astype(np.int64)
            ends = np.cumsum(lengths)
            yield self._names[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the list as an .npz file: `roots`, `names` end to end, `lengths`, `root_ids`."""
        names = np.concatenate([*self._blocks(), self._names[:0]])
        roots = np.array(self._roots, np.bytes_)
        with open(path, "wb") as file:  # given a path, numpy would add its own suffix
            np.savez(file, roots=roots, names=names, lengths=self._lengths, root_ids=self._root_ids)

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
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                parts = [stored[part] for part in ("roots", "names", "lengths", "root_ids")]
            roots, names, lengths, root_ids = parts
            kinds = [(part.dtype.str[1:2] if part is roots else part.dtype) for part in parts]
            if kinds != ["S", np.uint8, np.uint16, np.uint16] or (
                len(lengths) != len(root_ids)
                or lengths.sum(dtype=np.int64) != len(names)
                or (root_ids >= len(roots)).any()
            ):
                raise ValueError("its parts do not fit together")
        except Exception as error:  # a damaged archive raises nearly anything
            raise InputError(
                f"file list {str(path)!r} is damaged ({error}): restore it or start a new run"
            ) from error
        return cls(roots.tolist(), names, lengths, root_ids)


def find_images(
    data: str | Sequence[str], exclude: str | None = None, setting: str = "data"
) -> FileList:
    """Return the images of a folder, of a text file of paths, or of several of them.

    A folder is searched with its subfolders, and files are listed in the byte order of their
    relative paths. Hidden names are skipped. Symbolic links are followed and dangling ones skipped;
    a folder that is reached twice is searched once, and a link to a file is skipped where the file
    that it names is listed itself, or by an earlier link.

    A text file holds one path per line, relative to its own folder or absolute; empty lines and
    lines that begin with # are skipped.

    Args:
        data: folders, text files of paths, or single images.
        exclude: a folder that is not searched, such as the run's own.
        setting: what error messages call `data`.

    Raises:
        InputError: a source is missing, empty, unreadable, or given twice.
    """
    sources = [data] if isinstance(data, str) else list(data)
    if not sources:
        raise InputError("data [] names no source: give a folder of images")
    scan = _Scan(exclude, setting)
    for source in sources:
        before = len(scan.lengths)
        try:
            scan.add_source(source)
        except OSError as error:
            where = os.fsdecode(error.filename or source)
            raise InputError(
                f"{setting} {where!r} can't be read ({error.strerror}): give a folder of images "
                "or a text file of paths that this user may read"
            ) from error
        if len(scan.lengths) == before:
            already = " that are not named already" if before else ""
            raise InputError(
                f"{setting} {source!r} holds no images{already}: files ending in "
                f"{', '.join(EXTENSIONS)} count"
            )
    return scan.finish()


def refuse_to_replace(out: Path, files: FileList) -> None:
    """Raise InputError if the file that a command is to write is one of those it reads."""
    if out.exists():
        path = os.fsencode(os.path.abspath(out))
        if any(files.path(index) == path for index in range(len(files))):
            raise InputError(f"out {str(out)!r} is one of the images: give another file")


class _Scan:
    """Collects names, source by source."""

    def __init__(self, exclude: str | None, setting: str) -> None:
        self.setting = setting
        self.roots: list[bytes] = []
        self.names = bytearray()
        self.lengths = array("H")
        self.root_ids = array("H")
        self.searched: set[_Key] = set()
        self.links: list[tuple[int, _Key, bytes]] = []
        """Position of a link in the list, and the folder and name that it points to."""
        self.excluded = _key(exclude) if exclude and os.path.isdir(exclude) else None

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
        for line in _read_listing(path, f"{self.setting} {source!r}"):
            self._add(line)

    def _add(self, name: bytes) -> None:
        self.names += name
        self.lengths.append(len(name))
        self.root_ids.append(len(self.roots) - 1)

    def _add_folder(self, root: bytes) -> None:
        stack = [(b"", False)]
        while stack:
            name, is_link = stack.pop()
            if name and not name.endswith(b"/"):
                if is_link:
                    link = os.path.join(root, name)
                    target = os.path.join(os.path.dirname(link), os.readlink(link))
                    folder, file = os.path.split(target)
                    self.links.append((len(self.lengths), _key(folder), file))
                self._add(name)
                continue
            folder = os.path.join(root, name)
            key = _key(folder)
            if key not in self.searched and (not name or key != self.excluded):
                self.searched.add(key)
                inside = [(name + entry, link) for entry, link in _entries(folder)]
                stack += sorted(inside, reverse=True)

    def finish(self) -> FileList:
        files = FileList(
            self.roots,
            np.frombuffer(self.names, np.uint8),
            np.frombuffer(self.lengths, np.uint16),
            np.frombuffer(self.root_ids, np.uint16),
        )
        repeats, linked = [], set()
        for position, folder, name in self.links:
            if (folder in self.searched and _is_image(name)) or (folder, name) in linked:
                repeats.append(position)
            linked.add((folder, name))
        return files.select(np.delete(np.arange(len(files)), repeats)) if repeats else files


def _key(path: str | bytes) -> _Key:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_image(name: bytes) -> bool:
    return not name.startswith(b".") and name.lower().endswith(_SUFFIXES)


def _entries(folder: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield a folder's subfolders (ending in /) and images, and whether each is a symbolic link.

    The / sorts them as whole paths are sorted: "a/b" after "a-b".
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    if not entry.name.startswith(b"."):
                        yield entry.name + b"/", False
                elif _is_image(entry.name) and entry.is_file():
                    yield entry.name, entry.is_symlink()
            except OSError:  # a link to itself, or into a folder that is closed to us
                continue


def _read_listing(path: bytes, shown: str) -> list[bytes]:
    """Return the distinct paths of a text file, in byte order."""
    with open(path, "rb") as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    lines = {line.rstrip(b"\r") for line in content.split(b"\n")}
    names = [line for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if b"\0" in content or any(len(name) > _LONGEST for name in names):
        raise InputError(
            f"{shown} is neither a folder, nor an image by its name, nor a text file of "
            "paths, one a line"
        )
    return sorted(names)
