"""`fcmae shard`: pack images into tar files, which large collections are copied and read faster in.

Images are packed as they are, in the order of their source, under their names; one that does not
end like that of an image, such as a position in a dataset, gets the ending of its format. Shards
depend on the images and the settings alone, which a file beside them records: those that are there
already are kept, if they hold what they should, and a folder with anything else is left alone.
"""

import io
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fcmae.atomic import atomic_write, check_out_folder
from fcmae.commands.shard import ShardConfig
from fcmae.config.values import MAX_PIXELS
from fcmae.console import show_logs, tracked
from fcmae.data.decode import FORMATS, MASK
from fcmae.data.file_list import SUFFIXES, FileList
from fcmae.data.find import find_source
from fcmae.data.image import BadImage, opened, reading
from fcmae.data.shards import HIDDEN, open_shards, read_shard, sample_of
from fcmae.data.sources import Source
from sparse.errors import InputError, RunError, brief

RECORD = "fcmae-shards.json"
"""What a folder's shards are made of."""

Content = tuple[bytes, bytes]
"""Name and bytes of a member."""

_log = logging.getLogger(__name__)


def shard(config: ShardConfig) -> int:
    """Write the shards and their index; return the number of images.

    Raises:
        InputError: an image can't be opened, names or classes do not suit, or the folder holds
            something else.
        RunError: a shard could not be written, or does not hold what was written.
    """
    show_logs()
    source, out = find_source(config.data, exclude=config.out), check_out_folder(config.out)
    _check_names(source, config.classes)
    _check_folder(out, source, config)
    firsts = range(0, len(source), config.per_shard)
    kept, paths = 0, list[str]()
    for number, first in enumerate(tracked(firsts, len(firsts), "shards")):
        path = out / f"shard-{number:06}.tar"
        paths.append(os.path.abspath(path))
        chosen = range(first, min(first + config.per_shard, len(source)))
        if path.is_file() and _holds(path, map(_sum, _members(source, chosen, config.classes))):
            kept += 1
            continue
        try:
            with atomic_write(path) as temporary:
                sums = _write(temporary, _members(source, chosen, config.classes))
        except OSError as error:
            raise RunError(f"shard {str(path)!r} could not be written: {error}") from error
        if not _holds(path, iter(sums)):
            raise RunError(f"shard {str(path)!r} does not hold what was written: check the disk")
    found = open_shards(paths)
    there = f", {kept} of them were there already" if kept else ""
    _log.info(f"{len(found)} images in {len(paths)} shards in {out}{there}")
    return len(found)


def _check_names(source: Source, classes: bool) -> None:
    """Make sure that names work inside of tar files.

    Raises:
        InputError: one is absolute or leaves its folder, is there twice, or has no class.
    """
    seen, samples = set[bytes](), set[bytes]()
    for index in range(len(source)):
        name = source.key(index)
        shown = f"image {source.name(index)!r}"
        if name.startswith(b"/") or b".." in name.split(b"/") or HIDDEN.search(name):
            raise InputError(
                f"{shown} has no path below a folder, which would be its name in a shard: give the "
                "folder, or a list with paths relative to it"
            )
        if name in seen:
            raise InputError(
                f"{shown} is there twice, from different folders: give the folder around them, or "
                "pack them separately"
            )
        if classes and b"/" not in name:
            raise InputError(
                f"{shown} is in no folder, which would be its class: omit --classes, or give a "
                "folder of classes"
            )
        seen.add(name)
        samples.add(sample_of(name))
    if twins := len(seen) - len(samples):
        _log.warning(
            "%d images share their name up to the first dot with another: here they are images of "
            "their own, other readers of WebDataset take them for one sample", twins,
        )  # fmt: skip


def _check_folder(out: Path, source: Source, config: ShardConfig) -> None:
    """Create the folder, or make sure that it holds these shards and nothing else.

    Raises:
        InputError: it does not.
        RunError: it can't be written.
    """
    asked = {
        "images": len(source), "sha256": source.fingerprint(), "per_shard": config.per_shard,
        "classes": config.classes,
    }  # fmt: skip
    record = out / RECORD
    if record.is_file():
        try:
            same = json.loads(record.read_text("utf-8")) == asked
        except ValueError:
            same = False
        if not same:
            raise InputError(
                f"out {str(out)!r} holds shards of other images or settings: give a new folder, or "
                "delete it"
            )
    elif out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        raise InputError(f"out {str(out)!r} holds {brief(there)}: give a new folder")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with atomic_write(record) as path:
                path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"out {str(out)!r} could not be written: {error}") from error


def _members(source: Source, chosen: range, classes: bool) -> Iterator[Content]:
    """Images, each followed by its class if asked for and not there yet.

    Raises:
        InputError: an image can't be opened.
    """
    labelled = set[bytes]()
    for index in chosen:
        name = source.key(index)
        if isinstance(source, FileList) and os.path.isfile(source.path(index) + MASK.encode()):
            raise InputError(
                f"image {source.name(index)!r} has a mask beside it ({MASK}), which shards do not "
                "hold: write it into the image, as GeoTIFF or alpha"
            )
        try:
            with opened(source.open(index)) as file:
                content = file.read()
            name += _ending(name, content)
            yield name, content
        except (OSError, BadImage) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"image {source.name(index)!r} can't be read: {why}") from error
        if classes and (sample := sample_of(name)) not in labelled:
            labelled.add(sample)
            yield sample + b".cls", name.split(b"/", 1)[0]


def _ending(name: bytes, content: bytes) -> bytes:
    """Return what a name lacks to be that of an image, without which a member does not count.

    Raises:
        BadImage: the format is unknown.
    """
    if name.lower().endswith(SUFFIXES):
        return b""
    if content.startswith(b"\x93NUMPY"):
        return b".npy"
    with reading(MAX_PIXELS):
        form = str(Image.open(io.BytesIO(content), formats=FORMATS).format).lower()
    return {"jpeg2000": b".jp2", "mpo": b".jpg"}.get(form, f".{form}".encode())


def _sum(member: Content) -> tuple[bytes, int, int]:
    """A member's name, size and CRC-32."""
    name, content = member
    return name, len(content), zlib.crc32(content)


def _write(path: Path, members: Iterator[Content]) -> list[tuple[bytes, int, int]]:
    """Write a tar file that depends on nothing but its members, and return what it should hold."""
    sums = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            sums.append(_sum((name, content)))
    return sums


def _holds(path: Path, expected: Iterator[tuple[bytes, int, int]]) -> bool:
    """Whether a tar file has exactly these members."""
    try:
        found = read_shard(str(path))
    except InputError:
        return False
    return found == list(expected)
