"""Files under URLs that fsspec reads (`s3://…`, `https://…`): read with retries, and cached.

What a server refuses for good is a bad image, as a missing file is. A failure that may pass must
not replace an image, since the run would differ from others: it ends the run, which resumes.
"""

import hashlib
import io
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from fcmae.data.image import BadImage
from sparse.errors import InputError, RunError

TRIES = 5
WAIT = 0.25
"""Seconds before the second try; they double for each further one."""
TIMEOUT = 30.0
"""Seconds that a try may take."""

AHEAD = 1 << 18
"""Bytes that `open_remote` reads at a time."""

_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime")
"""What file systems say about a file that is another one after a change."""
_TEMPORARY = (408, 425, 429)
"""Answers from 400 to 499 that may change."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_ENTRY = re.compile(r"[0-9a-f]{64}\.range(\.\d+)?")
_log = logging.getLogger(__name__)
_kept = set[Any]()
"""File systems in use, also those of a forked process's parent: destroying these would close what
the parent still uses."""

Result = TypeVar("Result")


class RemoteError(RunError):
    """A file could not be read, but perhaps can be later; the message is one line."""


class FileInfo(NamedTuple):
    """Size of a file in bytes, and a number that differs after most changes; 0 if unknown."""

    size: int
    version: int


def is_url(path: str | bytes) -> bool:
    """Return whether a source or an image is named by a URL."""
    return _URL.match(os.fsdecode(path)) is not None


def on_web(url: str) -> bool:
    """Return whether a URL is one of a web server, which lists no folders."""
    return url.lower().startswith(("http://", "https://"))


def without_query(url: str) -> str:
    """Return a URL without what follows `?` on the web."""
    return url.partition("?")[0] if on_web(url) else url


def joined(root: str, name: bytes) -> bytes:
    """Return the path or URL of a name: itself if it is a URL, else below `root`."""
    if is_url(name):
        return name
    if not is_url(root):
        return os.path.join(os.fsencode(root), name)
    return os.fsencode(f"{root}/{quote(name) if on_web(root) else os.fsdecode(name)}")


def read(url: str, start: int | None = None, size: int | None = None) -> bytes:
    """Return a file's content, or `size` bytes of it from `start` on.

    Raises:
        BadImage: there is no such file, or it may not be read.
        RemoteError: all tries failed, or the server ignores which part is asked for.
        InputError: the URL's protocol is unknown, or needs a package.
    """

    def once(system: Any, path: str) -> bytes:
        end = None if size is None else (start or 0) + size
        content: bytes = system.cat_file(path, start=start, end=end, **_timeout(system))
        if size is not None and len(content) > size:
            raise RemoteError(
                f"{url} is sent whole when a part of it is asked for: use a server that supports "
                "range requests, or a list of images instead of shards"
            )
        if size is not None and len(content) < size:
            raise ConnectionError(f"{len(content)} of {size} bytes arrived")
        return content

    return _tried(url, once)


def info(url: str) -> FileInfo:
    """Return what a server says about a file.

    Raises:
        BadImage: there is no such file, or its size is unknown.
        RemoteError, InputError: see `read`.
    """
    found = _tried(url, lambda system, path: system.info(path, **_timeout(system)))
    if found.get("size") is None:
        raise BadImage(f"{url}: the server does not give its size")
    version = next((str(found[name]) for name in _VERSIONS if found.get(name)), "")
    digest = hashlib.blake2b(version.encode(), digest_size=7).digest()
    return FileInfo(found["size"], int.from_bytes(digest, "little") if version else 0)


def exists(url: str) -> bool:
    """Return whether there is a file that can be read.

    Raises:
        RemoteError, InputError: see `read`.
    """
    try:
        info(url)
    except BadImage:
        return False
    return True


def is_folder(url: str) -> bool:
    """Return whether a URL names a folder; `Raises` as for `read`."""
    found: Any = _tried(url, lambda system, path: system.info(path, **_timeout(system)))
    return found["type"] == "directory"


def entries(url: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, hidden ones aside, and whether each is a folder.

    Raises:
        BadImage, RemoteError, InputError: see `read`.
    """

    def once(system: Any, path: str) -> list[tuple[str, bool]]:
        found = [(each["name"].rstrip("/"), each["type"]) for each in system.ls(path, detail=True)]
        return [
            (name.rpartition("/")[2], kind == "directory")
            for name, kind in found
            if name.strip("/") != path.strip("/")  # object stores may list a folder in itself
        ]

    return [entry for entry in _tried(url, once) if not entry[0].startswith(".")]


def walk(url: str) -> Iterator[str]:
    """Yield the files below a folder, relative to it, in no order; `Raises` as for `read`."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, holds_more in entries(f"{url}/{folder}"):
            if holds_more:
                folders.append(f"{folder}{name}/")
            else:
                yield folder + name


def open_remote(url: str) -> tuple[io.BufferedReader, FileInfo]:
    """Return a file that is read as needed, and what the server says about it.

    Raises:
        BadImage, RemoteError, InputError: see `read`; also reading the file may.
    """
    known = info(url)
    return io.BufferedReader(_Remote(url, known.size), AHEAD), known


class _Remote(io.RawIOBase):
    """A file under a URL.

    Args:
        url: of the file.
        size: bytes of it.
    """

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._place = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._place))
        buffer[:size] = read(self._url, self._place, size) if size else b""
        self._place += size
        return size


def _tried(url: str, use: Callable[[Any, str], Result]) -> Result:
    """Return what `use` makes of the file system of a URL and the path there."""
    reason = ""
    for number in range(TRIES):
        if number:
            time.sleep(WAIT * 2 ** (number - 1))
        system, path = locate(url)
        try:
            return use(system, path)
        except RemoteError:
            raise
        except Exception as error:  # file systems raise nearly anything
            final, reason = _judged(error)
            if final:
                raise BadImage(f"{url}: {reason}") from error
    raise RemoteError(f"{url} can't be read, tried {TRIES} times ({reason})")


def _judged(error: BaseException) -> tuple[bool, str]:
    """Return whether another try would fail, too, and what went wrong, in one line."""
    cause = error.__cause__
    if cause and isinstance(error, FileNotFoundError) and type(cause).__module__[:7] == "aiohttp":
        error = cause  # fsspec reports any failure to look at a file on the web as a missing one
    status = getattr(error, "status", None)
    if isinstance(status, int):
        refused = 400 <= status < 500 and status not in _TEMPORARY
        return refused, f"answer {status} {getattr(error, 'message', '')}".strip()
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return False, f"no answer within {TIMEOUT:g} s"
    if isinstance(error, FileNotFoundError):
        return True, "no such file"
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return isinstance(error, PermissionError), what


def locate(url: str) -> tuple[Any, str]:
    """Return the file system of a URL in this process, and the path there.

    Raises:
        InputError: the URL's protocol is unknown, or needs a package.
    """
    try:
        from fsspec.core import url_to_fs  # imports much

        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        why = " ".join(str(error).split())  # of other protocols, it names the package
        ours = on_web(url) or getattr(error, "name", "") == "fsspec"
        fix = ": pip install 'fcmae[datasets]'" if ours else ""
        raise InputError(f"{url!r} can't be read, {why}{fix}") from error
    _kept.add(system)
    return system, path


def _timeout(system: Any) -> dict[str, float]:
    """Options of a call: only asynchronous file systems can give up on one."""
    return {"timeout": TIMEOUT} if system.async_impl else {}


@dataclass
class Cache:
    """Parts of remote files on this machine, which processes share. The parts that were not used
    for the longest time are deleted once they take more than 90 % of the limit.

    Args:
        folder: holds a file for each part; other files in it stay.
        limit: bytes, of which each process may be 1 % over the 90 % until it notices.
    """

    folder: Path
    limit: float
    _unseen: float = inf

    def get(self, key: str) -> bytes | None:
        """Return a part that is there and undamaged."""
        path = self.folder / f"{key}.range"
        with suppress(OSError):
            stored = path.read_bytes()
            if len(stored) > 4 and zlib.crc32(stored[4:]) == int.from_bytes(stored[:4], "little"):
                os.utime(path)
                return stored[4:]
        return None

    def put(self, key: str, content: bytes) -> None:
        """Store a part; a disk that is full is not an error."""
        path = self.folder / f"{key}.range"
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
        self._unseen += len(content)
        if self._unseen > self.limit / 100:
            self._unseen = 0.0
            self._trim()

    def _trim(self) -> None:
        found = list[tuple[int, int, str]]()
        with suppress(OSError), os.scandir(self.folder) as listed:
            for entry in listed:
                if _ENTRY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # another process deletes, too
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= 0.9 * self.limit:
                break
            with suppress(OSError):
                os.unlink(path)
            total -= size


_cache: Cache | None = None


def use_cache(folder: str | None, limit_gb: float) -> None:
    """Keep what `cached` reads in a folder, also in processes that are forked from now on.

    Args:
        folder: is made if it is not there; None keeps nothing.
        limit_gb: most gigabytes to keep, about.

    Raises:
        InputError: the folder can't be made.
    """
    global _cache
    _cache = None
    if folder is not None:
        path = Path(folder).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cache {folder!r} can't be made ({error.strerror}): give another folder"
            ) from error
        _cache = Cache(path, limit_gb * 1e9)


def cached(url: str, start: int | None = None, size: int | None = None, version: str = "") -> bytes:
    """Return what `read` does, from the cache if it is there.

    Args:
        url, start, size: see `read`.
        version: of the file, if known: parts of another version are not used.

    Raises:
        BadImage, RemoteError, InputError: see `read`.
    """
    if _cache is None:
        return read(url, start, size)
    key = hashlib.sha256(repr((url, start, size, version)).encode()).hexdigest()
    content = _cache.get(key)
    if content is None:
        content = read(url, start, size)
        _cache.put(key, content)
    return content
