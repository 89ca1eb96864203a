"""Which pictures there are: folders and lists of paths, read into one list."""

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fcmae.data.paths import FEWEST_TO_HOLD_OUT, FileList
from sparse.errors import InputError

__all__ = ["EXTENSIONS", "FEWEST_TO_HOLD_OUT", "FileList", "find_images", "refuse_to_replace"]

EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "npy"),
)
"""What counts as a picture when a folder is searched. The content decides how a file is read."""

_SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)
_LONGEST = 65_535
_Key = tuple[int, int]


def find_images(
    data: str | Sequence[str], exclude: str | None = None, setting: str = "data"
) -> FileList:
    """Return the pictures of a folder, of a text file of paths, or of several of them.

    A folder is searched with its subfolders, symbolic links followed; no folder and no linked
    picture is taken twice, hidden names and dangling links are left out, and the order is that of
    the relative paths' bytes. A text file holds a path a line, relative to its own folder or
    absolute; empty lines and lines that begin with # are skipped. `exclude` is a folder that is not
    searched, such as the run's own; `setting` is what error messages call `data`.

    Raises:
        InputError: a source that is missing, empty, unreadable, or given twice.
    """
    sources = [data] if isinstance(data, str) else list(data)
    if not sources:
        raise InputError("data [] names no source: give a folder of pictures")
    scan = _Scan(exclude, setting)
    for source in sources:
        before = scan.count
        try:
            scan.add_source(source)
        except OSError as error:
            where = os.fsdecode(error.filename or source)
            raise InputError(
                f"{setting} {where!r} can't be read ({error.strerror}): give a folder of pictures "
                "or a text file of paths that this user may read"
            ) from error
        if scan.count == before:
            already = " that are not named already" if before else ""
            raise InputError(
                f"{setting} {source!r} holds no pictures{already}: files ending in "
                f"{', '.join(EXTENSIONS)} count"
            )
    return scan.finish()


def refuse_to_replace(out: Path, files: FileList) -> None:
    """Raise InputError if the file that a command is to write is one of those it reads."""
    if out.exists():
        path = os.fsencode(os.path.abspath(out))
        if any(files.path(index) == path for index in range(len(files))):
            raise InputError(f"out {str(out)!r} is one of the pictures: give another file")


class _Scan:
    """Collects names, source by source."""

    def __init__(self, exclude: str | None, setting: str) -> None:
        self.setting = setting
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
        for line in _read_listing(path, f"{self.setting} {source!r}"):
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


def _read_listing(path: bytes, shown: str) -> list[bytes]:
    """Return the distinct paths of a text file, in byte order."""
    with open(path, "rb") as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    lines = {line.rstrip(b"\r") for line in content.split(b"\n")}
    names = [line for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if b"\0" in content or any(len(name) > _LONGEST for name in names):
        raise InputError(
            f"{shown} is neither a folder, nor a picture by its name, nor a text file of "
            "paths, one a line"
        )
    return sorted(names)
