"""Images inside of tar files, in WebDataset's layout.

A shard is a plain tar file. The members of one sample share their name up to the first dot after
the last slash: `KEY.jpg` is the image, `KEY.cls` its label, if there is one. A sample's name is
that of its image.

Shards are read once, header by header, for an index of where each image is. Reading an image is
then one positioned read of its header and its content, from any process and in any order; the
header has to be the one that was indexed. A shard is the same as before if its size and its
modification time are, or else its size and the hash of all its headers, names and labels.

As in folders, hidden names are skipped, here also what macOS adds. Names are relative: `./` in
front, which `tar` writes for a folder, is removed.
"""

import hashlib
import io
import logging
import os
import re
import tarfile
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from fcmae.atomic import atomic_write
from fcmae.data import remote
from fcmae.data.file_list import EXTENSIONS, LONGEST
from fcmae.data.image import BadImage
from fcmae.data.names import Named
from fcmae.data.sources import NO_LABEL, Indices
from sparse.errors import InputError

BLOCK = tarfile.BLOCKSIZE
INDEX = "fcmae-index.npz"
"""The index of a folder of shards, in that folder."""

OPEN_SHARDS = 64
"""Shards that a process keeps open."""

LARGEST = 0x7FFFF000 - BLOCK
"""Bytes of an image: Linux reads no more at a time."""

HIDDEN = re.compile(rb"(^|/)(\.|__MACOSX(/|$))")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_IMAGE = re.compile(rf"\.({'|'.join(EXTENSIONS)})$", re.IGNORECASE)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_log = logging.getLogger(__name__)
_ARRAYS = {
    "names": np.uint8, "lengths": np.uint16, "shard_ids": np.uint32, "offsets": np.int64,
    "sizes": np.uint32, "headers": np.uint32, "labels": np.int32,
}  # fmt: skip


class Shard(NamedTuple):
    """What identifies a shard: its path or URL, size, modification time in ns (of a URL, a number
    for the version), and the SHA-256 of its headers, names and labels."""

    path: str
    size: int
    changed: int
    digest: str


@dataclass(eq=False)
class ShardList(Named):
    """A source of the images in tar files. No Python object exists per image.

    Args:
        shards: the files.
        classes: names of the labels, sorted.
        names: names of the image members end to end, uint8.
        lengths: the length of each name (N,), uint16.
        shard_ids: the shard of each image (N,), uint32.
        offsets: where the content of each starts in its shard (N,), int64.
        sizes: bytes of each (N,), uint32.
        headers: CRC-32 of the header of each (N,), uint32.
        labels: the position of each image's label in `classes` (N,), int32; `NO_LABEL` for none.
        starts: where each name starts (N,), int64; None where names follow each other in order.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    names: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint16]
    shard_ids: npt.NDArray[np.uint32]
    offsets: Indices
    sizes: npt.NDArray[np.uint32]
    headers: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.int32]
    starts: InitVar[Indices | None] = None
    _files: "OrderedDict[int, int]" = field(default_factory=OrderedDict, init=False, repr=False)

    def __del__(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, which mean nothing to another process."""
        return self.__dict__ | {"_files": OrderedDict()}

    @property
    def folder(self) -> str:
        return os.path.dirname(self.shards[0].path)

    def name(self, index: int) -> str:
        """Return the name of an image inside its shard, as text."""
        return os.fsdecode(self.key(index))

    def open(self, index: int) -> BinaryIO:
        """Return the content of an image.

        Raises:
            BadImage: its shard is missing, shorter, or has something else in this place.
            RemoteError: its shard is under a URL that can't be read now.
        """
        shard = self.shards[int(self.shard_ids[index])]
        start, size = int(self.offsets[index]) - BLOCK, int(self.sizes[index]) + BLOCK
        try:
            if remote.is_url(shard.path):
                content = remote.cached(shard.path, start, size, shard.digest)
            else:
                content = os.pread(self._file(int(self.shard_ids[index])), size, start)
        except OSError as error:
            raise BadImage(f"{shard.path}: {error.strerror}") from error
        if len(content) < size or zlib.crc32(content[:BLOCK]) != self.headers[index]:
            raise BadImage(f"{shard.path} has changed since it was indexed")
        return io.BytesIO(content[BLOCK:])

    def _file(self, shard: int) -> int:
        """A descriptor of a shard; positioned reads share no position, so forks may share it."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def checked(self) -> "ShardList":
        """Return the list, after a look at each shard that an image is in.

        Raises:
            InputError: a shard is missing or has changed.
        """
        used = set(np.unique(self.shard_ids).tolist())
        shards = [_checked(s, s.path) if n in used else s for n, s in enumerate(self.shards)]
        return replace(self, shards=tuple(shards), starts=self._starts)

    def of_shards(self, paths: Sequence[str]) -> "ShardList":
        """Return the images of some of the shards, in the order of `paths`, where these are now.

        Raises:
            InputError: a shard is not among those of the list, is missing, or has changed.
        """
        places = {os.path.basename(shard.path): n for n, shard in enumerate(self.shards)}
        if unknown := [path for path in paths if os.path.basename(path) not in places]:
            raise InputError(f"the index lacks {unknown[0]!r}")
        ranks, shards = np.full(len(self.shards), len(paths)), list(self.shards)
        for rank, path in enumerate(paths):
            place = places[os.path.basename(path)]
            ranks[place], shards[place] = rank, _checked(shards[place], path)
        rank_of_image = ranks[self.shard_ids]
        order = np.argsort(rank_of_image, kind="stable")
        found = self.select(order[: np.count_nonzero(rank_of_image < len(paths))])
        return replace(found, shards=tuple(shards), starts=found._starts)

    def select(self, indices: npt.ArrayLike) -> "ShardList":
        """Return the images at `indices`, in that order."""
        picks = np.asarray(indices, dtype=np.int64)
        parts: Any = {part: getattr(self, part)[picks] for part in [*_ARRAYS][1:]}
        starts = self._starts[picks]
        return ShardList(self.shards, self.classes, self.names, **parts, starts=starts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the list as an .npz file."""
        parts = {part: getattr(self, part) for part in _ARRAYS} | {"names": self.joined()}
        shards = np.array([[*map(str, shard)] for shard in self.shards], dtype=np.str_)
        classes = np.array(self.classes, dtype=np.str_)
        with open(path, "wb") as file:
            np.savez(file, shards=shards, classes=classes, **parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardList":
        """Read what `save` wrote, from a path or a URL.

        Raises:
            InputError: the file can't be read, or is not what `save` wrote.
            RemoteError: it is under a URL that can't be read now.
        """
        try:
            at_url = remote.is_url(os.fspath(path))
            content = remote.read(str(path)) if at_url else Path(path).read_bytes()
            with io.BytesIO(content) as file, np.load(file, allow_pickle=False) as stored:
                rows, classes = stored["shards"].tolist(), stored["classes"].tolist()
                parts: list[Any] = [stored[part] for part in _ARRAYS]
            shards = tuple(Shard(where, int(s), int(c), digest) for where, s, c, digest in rows)
            _, lengths, shard_ids, *_, labels = parts
            if (
                [part.dtype for part in parts] != [*_ARRAYS.values()]
                or len({len(part) for part in parts[1:]}) > 1
                or lengths.sum(dtype=np.int64) != len(parts[0])
                or (shard_ids >= len(shards)).any()
                or ((labels < NO_LABEL) | (labels >= len(classes))).any()
            ):
                raise ValueError("its parts do not fit together")
        except remote.RemoteError:
            raise
        except Exception as error:  # a damaged archive raises nearly anything
            raise InputError(
                f"index {str(path)!r} is missing or damaged ({error}): delete it to make it anew"
            ) from error
        return cls(shards, tuple(classes), *parts)


def find_shards(given: str) -> list[str]:
    """Return the tar files that a path, a URL or a pattern means; none if it means something else.

    A folder means shards if it directly holds tar files, and neither images nor folders.

    Raises:
        RemoteError: a folder under a URL can't be read now.
    """
    if remote.is_url(given):
        return _remote_shards(given)
    path = os.path.expanduser(given)
    if not os.path.isdir(path):
        found = expand(path) if path.endswith(".tar") else []
        return list(map(os.path.abspath, found))
    names = []
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _IMAGE.search(entry.name) or _is_folder(entry):
                return []
            names.append(entry.name)
    tars = sorted(name for name in names if name.endswith(".tar"))
    return [os.path.join(os.path.abspath(path), name) for name in tars]


def _remote_shards(url: str) -> list[str]:
    if remote.without_query(url).endswith(".tar"):
        return expand(url)
    with suppress(BadImage):
        if not remote.on_web(url) and remote.is_folder(url):
            listed = remote.entries(url)
            if not any(folder or _IMAGE.search(name) for name, folder in listed):
                names = sorted(name for name, _ in listed if name.endswith(".tar"))
                return [f"{url.rstrip('/')}/{name}" for name in names]
    return []


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def open_shards(paths: Sequence[str], setting: str = "data") -> ShardList:
    """Return the images of tar files, from the index beside them if it knows them. Otherwise they
    are indexed, and if they are all of a folder on this machine, the index is kept there.

    Raises:
        InputError: see `index_shards`.
    """
    folders = {os.path.dirname(path) for path in paths}
    folder = folders.pop() if len(folders) == 1 else ""
    place, at_url = os.path.join(folder, INDEX), remote.is_url(folder)
    known = found = None
    if folder and (remote.exists(place) if at_url else os.path.isfile(place)):
        try:
            known = ShardList.load(place)
            found = known.of_shards(paths)
        except InputError as error:
            _log.warning("shards are indexed anew: %s", str(error).split(":", 1)[0])
    if found is None:
        found = index_shards(paths, setting)
    changed = known is None or found.shards != known.shards
    if folder and not at_url and changed and list(paths) == find_shards(folder):
        with suppress(OSError), atomic_write(Path(place)) as path:
            found.save(path)
    return found


def index_shards(paths: Sequence[str], setting: str = "data") -> ShardList:
    """Read all headers of tar files.

    Raises:
        InputError: a shard can't be read, is compressed or cut off, or has two members of one name;
            or there are no images.
    """
    names, lengths, shard_ids = bytearray(), array("H"), array("I")
    offsets, sizes, headers = array("q"), array("I"), array("I")
    labels, shards, seen = list[str | None](), list[Shard](), dict[bytes, int]()
    skipped = 0
    for number, path in enumerate(paths):
        shard, members, classes, links = _read_headers(path, setting)
        shards.append(shard)
        skipped += links
        for member in members:
            if len(member.name) > LONGEST or member.size > LARGEST:
                raise InputError(
                    f"{setting} {path!r} has an image of {member.size} bytes with a name of "
                    f"{len(member.name)}: at most {LARGEST} and {LONGEST} can be read"
                )
            digest = hashlib.blake2b(member.name, digest_size=8).digest()
            if (other := seen.setdefault(digest, number)) != number or member.again:
                name, there = os.fsdecode(member.name), paths[other]
                where = "twice" if member.again else f"that {there!r} has too"
                raise InputError(
                    f"{setting} {path!r} has a member {name!r} {where}: rename one, or give one of "
                    "the shards, since names tell images apart"
                )
            names += member.name
            lengths.append(len(member.name))
            shard_ids.append(number)
            offsets.append(member.offset)
            sizes.append(member.size)
            headers.append(member.header)
            labels.append(classes.get(sample_of(member.name)))
    if not lengths:
        raise InputError(f"{setting} {paths[0]!r} holds no images: members like KEY.jpg count")
    if skipped:
        _log.warning("%d images in shards are links or sparse files and are skipped", skipped)
    known = tuple(sorted({label for label in labels if label is not None}))
    place = {label: position for position, label in enumerate(known)}
    return ShardList(
        tuple(shards), known, np.frombuffer(names, np.uint8), np.array(lengths),
        np.array(shard_ids), np.array(offsets), np.array(sizes), np.array(headers),
        np.array([NO_LABEL if label is None else place[label] for label in labels], np.int32),
    )  # fmt: skip


def _checked(shard: Shard, path: str) -> Shard:
    """The shard at a path, if it is the same.

    Raises:
        InputError: it is not, or it is missing.
        RemoteError: it is under a URL that can't be read now.
    """
    try:
        if remote.is_url(path):
            size, changed = remote.info(path)
        else:
            status = os.stat(path)
            size, changed = status.st_size, status.st_mtime_ns
    except (OSError, BadImage) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"shard {path!r} is missing ({why}): restore it") from error
    found = shard._replace(path=path, size=size, changed=changed)
    # An index that came with uploaded shards has the times of their originals.
    comparable = remote.is_url(path) == remote.is_url(shard.path)
    if comparable and found.size == shard.size and found.changed != shard.changed:
        found = _read_headers(path, "shard")[0]
    if (found.size, found.digest) != (shard.size, shard.digest):
        raise InputError(f"shard {path!r} has changed since it was indexed: restore it")
    return found


class Member(NamedTuple):
    """An image of a shard; `again` if its name was there before."""

    name: bytes
    offset: int
    size: int
    header: int
    again: bool


def sample_of(name: bytes) -> bytes:
    """Return a member's name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition(b"/")
    return folder + slash + file.split(b".", 1)[0]


def _read_headers(path: str, setting: str) -> tuple[Shard, list[Member], dict[bytes, str], int]:
    """Return a shard, its images, the labels of its samples, and the number of images that are
    links or sparse files.

    Raises:
        InputError: it can't be read to its end.
    """
    members, classes, names = list[Member](), dict[bytes, str](), set[bytes]()
    skipped, digest = 0, hashlib.sha256()
    try:
        file, size, changed = _opened(path)
        with file:
            for mark, kind in _COMPRESSED.items():
                if _part(file, 0, 6).startswith(mark):
                    raise InputError(
                        f"{setting} {path!r} is compressed ({kind}), so images can't be read one "
                        "by one: unpack it, or make shards with `fcmae shard`"
                    )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    vars(tar)["members"].clear()  # or it keeps all of them
                    header = _part(file, info.offset_data - BLOCK, BLOCK)
                    name = os.fsencode(info.name)
                    while name.startswith(b"./"):
                        name = name[2:]
                    digest.update(header + name)
                    plain = info.isreg() and not info.issparse()
                    if plain and info.offset_data + info.size > size:
                        raise tarfile.ReadError(f"it ends inside of {info.name!r}")
                    if HIDDEN.search(name):
                        continue
                    if not _IMAGE.search(info.name):
                        if plain and name.endswith(b".cls"):
                            label = _part(file, info.offset_data, info.size)
                            digest.update(label)
                            if label.strip():
                                text = label.decode("utf-8", "replace").strip()
                                classes[sample_of(name)] = text
                    elif plain:
                        crc, again = zlib.crc32(header), name in names
                        members.append(Member(name, info.offset_data, info.size, crc, again))
                        names.add(name)
                    else:
                        skipped += not info.isdir()
                _check_end(file, tar.offset)
    except (OSError, tarfile.TarError, BadImage) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(
            f"{setting} {path!r} can't be read as a tar file ({what}): replace it or leave it out"
        ) from error
    return Shard(path, size, changed, digest.hexdigest()), members, classes, skipped


def _opened(path: str) -> tuple[BinaryIO, int, int]:
    """Return a shard's file, its size, and what changes with it."""
    if remote.is_url(path):
        there, (size, changed) = remote.open_remote(path)
        return there, size, changed
    file = open(path, "rb")  # noqa: SIM115  # the caller closes it
    status = os.fstat(file.fileno())
    return file, status.st_size, status.st_mtime_ns


def _part(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _check_end(file: BinaryIO, offset: int) -> None:
    """Make sure that a tar file ends where its reader stopped, which also stops at damage.

    Raises:
        ReadError: it does not.
    """
    if len(end := _part(file, offset, BLOCK)) < BLOCK or any(end):
        raise tarfile.ReadError(f"it is damaged or cut off at byte {offset}")
    while block := _part(file, offset, 1 << 20):
        if any(block):
            raise tarfile.ReadError("it has more after its end, as if it were two in one")
        offset += len(block)


def read_shard(path: str) -> list[tuple[bytes, int, int]]:
    """Return the name, the size and the CRC-32 of the content of every member of a tar file.

    Raises:
        InputError: it can't be read.
    """
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                file = tar.extractfile(info)
                content = b"" if file is None else file.read()
                found.append((os.fsencode(info.name), len(content), zlib.crc32(content)))
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"shard {path!r} can't be read ({error}): delete it") from error
    return found


def expand(pattern: str) -> list[str]:
    """Return what braces stand for: `{0000..0127}` and `{a,b}`, as in a shell.

    Raises:
        InputError: a range does not ascend.
    """
    parts, last = list[list[str]](), 0
    for found in _BRACES.finditer(pattern):
        low, high, words = found.groups()
        if low and int(low) > int(high):
            raise InputError(f"{pattern!r} has a descending range: give {{{high}..{low}}}")
        numbers = range(int(low), int(high) + 1) if low else ()
        parts += [[pattern[last : found.start()]]]
        parts += [words.split(",") if words else [f"{n:0{len(low)}}" for n in numbers]]
        last = found.end()
    return ["".join(words) for words in product(*parts, [pattern[last:]])]
