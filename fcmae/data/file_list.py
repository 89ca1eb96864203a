"""Image files: folders and lists of paths are read into one compact list.

A million files take about 50 MB, which forked workers share. Paths are bytes, since a file name may
be any bytes; they become text only in messages.
"""

import io
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fcmae.data import remote
from fcmae.data.image import BadImage
from fcmae.data.names import Named
from fcmae.data.sources import Indices, PathOrFile, Source
from sparse.errors import InputError

EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "npy", "zarr"),
)
"""The images in a folder end in one of these. The content decides how a file is read; a folder that
ends in .zarr is an image."""

SUFFIXES = tuple(f".{extension}".encode() for extension in EXTENSIONS)
_ZARR = b".zarr"
LONGEST = 65_535
"""Largest number of bytes of a name."""

_ON_WEB = (
    "give the URL of a folder, but web servers list none: there, of a text file of paths, or of "
    "shards such as …/{0000..0127}.tar"
)

_Key = tuple[int, int]
"""Device and inode: the same for every path to a folder."""


@dataclass(eq=False)
class FileList(Named):
    """A source of image files: one block of all names, and 12 more bytes per file.

    A name is relative to one of the roots, and is the file's key. No Python object exists per file,
    so forked workers share the memory. A selection shares the names with the list it comes from.

    Args:
        roots: the folders that names are relative to, or their URLs.
        names: names end to end, uint8.
        lengths: the length of each name (N,), uint16.
        root_ids: the root of each file (N,), uint16.
        starts: where each name starts (N,), int64; None where names follow each other in order.
    """

    roots: tuple[str, ...]
    names: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint16]
    root_ids: npt.NDArray[np.uint16]
    starts: InitVar[Indices | None] = None

    @classmethod
    def of(cls, root: str, names: Iterable[bytes]) -> "FileList":
        """Return the list of files with these names, of at most `LONGEST` bytes, in this order."""
        kept = list(names)
        lengths = np.array([len(name) for name in kept], np.uint16)
        blob = np.frombuffer(b"".join(kept), np.uint8)
        return cls((root,), blob, lengths, np.zeros(len(kept), np.uint16))

    @property
    def folder(self) -> str:
        return self.roots[0]

    def path(self, index: int) -> bytes:
        """Return a file's path or URL, root included."""
        return remote.joined(self.roots[self.root_ids[index]], self.key(index))

    def open(self, index: int) -> PathOrFile:
        """Return the path, which the reader opens, or the content of a URL.

        Raises:
            BadImage: there is nothing at that URL.
            RemoteError: it can't be read now.
        """
        path = self.path(index)
        return io.BytesIO(remote.cached(os.fsdecode(path))) if remote.is_url(path) else path

    def name(self, index: int) -> str:
        """Return a path for messages: relative if there is one root, else absolute."""
        return os.fsdecode(self.key(index) if len(self.roots) == 1 else self.path(index))

    def select(self, indices: npt.ArrayLike) -> "FileList":
        """Return the files at `indices`, in that order."""
        picks = np.asarray(indices, dtype=np.int64)
        lengths, root_ids, starts = self.lengths[picks], self.root_ids[picks], self._starts[picks]
        return FileList(self.roots, self.names, lengths, root_ids, starts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the list as an .npz file: `roots`, `names` end to end, `lengths`, `root_ids`."""
        roots = np.array([os.fsencode(root) for root in self.roots], np.bytes_)
        with open(path, "wb") as file:  # given a path, numpy would add a suffix
            np.savez(
                file, roots=roots, names=self.joined(), lengths=self.lengths, root_ids=self.root_ids
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FileList":
        """Read what `save` wrote.

        Raises:
            InputError: the file can't be read, or is not what `save` wrote.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                parts = [stored[part] for part in ("roots", "names", "lengths", "root_ids")]
            roots, names, lengths, root_ids = parts
            kinds = [roots.dtype.kind, names.dtype, lengths.dtype, root_ids.dtype]
            if (
                kinds != ["S", np.uint8, np.uint16, np.uint16]
                or len(lengths) != len(root_ids)
                or lengths.sum(dtype=np.int64) != len(names)
                or (root_ids >= len(roots)).any()
            ):
                raise ValueError("its parts do not fit together")
        except Exception as error:  # a damaged archive raises nearly anything
            raise InputError(
                f"file list {str(path)!r} is missing or damaged ({error}): restore it or start over"
            ) from error
        return cls(tuple(map(os.fsdecode, roots.tolist())), names, lengths, root_ids)


def find_images(
    data: str | Sequence[str], exclude: str | None = None, setting: str = "data"
) -> FileList:
    """Return the images of a folder, of a text file of paths, or of several of them.

    A folder is searched with its subfolders, and files are listed in the byte order of their
    relative paths. Hidden names and dangling links are skipped; other symbolic links are followed.
    A folder that is reached twice is searched once.

    A text file holds one path per line, relative to its own folder or absolute; empty lines and
    lines that begin with # are skipped. A line can be a URL, and so can each source; of a text file
    there, paths are relative to its URL.

    Args:
        data: folders, text files of paths, or single images.
        exclude: a folder that is not searched, such as the run's own.
        setting: the name of `data` in error messages.

    Raises:
        InputError: a source is missing, empty, unreadable, or given twice.
        RemoteError: a source under a URL can't be read now.
    """
    sources = [data] if isinstance(data, str) else list(data)
    if not sources:
        raise InputError(f"{setting} [] names no source: give a folder of images")
    roots: list[str] = []
    names, lengths, root_ids = bytearray(), array("H"), array("H")
    searched: set[_Key | str] = set()
    excluded = _key(exclude) if exclude and os.path.isdir(exclude) else None
    for source in sources:
        shown = f"{setting} {source!r}"
        before = len(lengths)
        try:
            if remote.is_url(source):
                root, listed = _search_url(source, searched, shown)
            else:
                path = os.fsencode(os.path.abspath(os.path.expanduser(source)))
                is_folder = os.path.isdir(path) and not path.endswith(_ZARR)
                root = os.fsdecode(path if is_folder else os.path.dirname(path))
                listed = _search(path, searched, excluded) if is_folder else _listed(path, shown)
            for name in listed:
                names += name
                lengths.append(len(name))
                root_ids.append(len(roots))
        except OSError as error:
            where = os.fsdecode(error.filename or source)
            raise InputError(
                f"{setting} {where!r} can't be read ({error.strerror}): give a readable source"
            ) from error
        if len(lengths) == before:
            already = " that are not named already" if before else ""
            raise InputError(
                f"{shown} holds no images{already}: files ending in {', '.join(EXTENSIONS)} count"
            )
        roots.append(root)
    blob = np.frombuffer(names, np.uint8)
    return FileList(tuple(roots), blob, np.array(lengths), np.array(root_ids))


def refuse_to_replace(out: Path | None, source: Source) -> None:
    """Raise InputError if the file that a command writes is one of those that it reads."""
    if out is not None and out.exists() and isinstance(source, FileList):
        path = os.fsencode(os.path.abspath(out))
        if any(source.path(index) == path for index in range(len(source))):
            raise InputError(f"out {str(out)!r} is one of the images: give another file")


def _search(root: bytes, searched: set[_Key | str], excluded: _Key | None) -> Iterator[bytes]:
    """Yield the images below a folder, relative to it; folders in `searched` are skipped."""
    stack = [b""]
    while stack:
        name = stack.pop()
        if name and not name.endswith(b"/"):
            yield name
            continue
        folder = os.path.join(root, name)
        key = _key(folder)
        if key in searched or (name and key == excluded):
            continue
        searched.add(key)
        with os.scandir(folder) as entries:
            stack += sorted((name + kept for kept in map(_kept, entries) if kept), reverse=True)


def _key(folder: str | bytes) -> _Key:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _kept(entry: os.DirEntry[bytes]) -> bytes | None:
    """Return the name of an image, or of a subfolder followed by /; None for anything else.

    The / makes them sort like whole paths: "a/b" after "a-b".
    """
    name = entry.name
    try:
        if name.startswith(b"."):
            return None
        if entry.is_dir():
            return name if name.endswith(_ZARR) else name + b"/"
        return name if name.lower().endswith(SUFFIXES) and entry.is_file() else None
    except OSError:  # a link to itself, or into a folder that we can't read
        return None


def _listed(path: bytes, shown: str) -> Iterable[bytes]:
    """Return an image's own name, or the distinct paths of a text file, in byte order."""
    name = os.path.basename(path)
    if name.lower().endswith(SUFFIXES):
        os.stat(path)
        return [name]
    return _lines(Path(os.fsdecode(path)).read_bytes(), shown)


def _lines(content: bytes, shown: str) -> list[bytes]:
    """Return the distinct paths of a text file, in byte order."""
    lines = {line.rstrip(b"\r") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")}
    names = [line for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if b"\0" in content or any(len(name) > LONGEST for name in names):
        raise InputError(f"{shown} is not a folder, an image or a text file with one path per line")
    urls = {name.partition(b"://")[0]: name for name in names if remote.is_url(name)}
    for url in urls.values():
        remote.locate(os.fsdecode(url))  # or a missing package is noticed in mid-run
    return sorted(names)


def _search_url(url: str, searched: set[_Key | str], shown: str) -> tuple[str, Iterable[bytes]]:
    """Return the URL of a folder, and the images of a source under a URL, as for one on this
    machine.

    Raises:
        InputError: it is missing or not readable, a folder of a web server, or no list of paths.
        RemoteError: it can't be read now.
    """
    address = remote.without_query(url)
    root = address.rpartition("/")[0]
    if url in searched:
        return root, []
    searched.add(url)
    try:
        if os.fsencode(address).lower().endswith(SUFFIXES):
            remote.info(url)
            return root, [os.fsencode(url)]
        if not remote.on_web(url) and remote.is_folder(url):
            root = url.rstrip("/")
            found = sorted(map(os.fsencode, remote.walk(root)))
            return root, [name for name in found if name.lower().endswith(SUFFIXES)]
        content = remote.read(url)
    except BadImage as error:
        raise InputError(f"{shown} can't be read ({error}): {_ON_WEB}") from error
    if remote.on_web(url) and content.lstrip().startswith(b"<"):
        raise InputError(f"{shown} is a web page, not a list of images: {_ON_WEB}")
    names = _lines(content, shown)
    if absolute := next((name for name in names if name.startswith(b"/")), None):
        raise InputError(
            f"{shown} has {os.fsdecode(absolute)!r}: paths must be relative to its URL, or URLs"
        )
    return root, names
