"""`fcmae shard`: pack images into tar files, which large collections are copied and read faster in.

Images are packed as they are, in the order of their paths, under these paths. Shards depend on the
images alone: those that are there already are kept, if they hold what they should.
"""

import io
import logging
import os
import tarfile
import zlib
from pathlib import Path

from fcmae.atomic import atomic_write, check_out_folder
from fcmae.commands.shard import ShardConfig
from fcmae.console import show_logs, tracked
from fcmae.data.decode import BadImage, opened
from fcmae.data.file_list import find_images
from fcmae.data.shards import open_shards, read_shard, sample_of
from fcmae.data.sources import Source
from sparse.errors import InputError, RunError

_log = logging.getLogger(__name__)


def shard(config: ShardConfig) -> int:
    """Write the shards and their index; return the number of images.

    Raises:
        InputError: an image can't be opened, two would have one name, or has no class.
        RunError: a shard could not be written, or does not hold what was written.
    """
    show_logs()
    source, out = find_images(config.data, exclude=config.out), check_out_folder(config.out)
    firsts = range(0, len(source), config.per_shard)
    kept, paths = 0, list[str]()
    for number, first in enumerate(tracked(firsts, len(firsts), "shards")):
        path = out / f"shard-{number:06}.tar"
        chosen = range(first, min(first + config.per_shard, len(source)))
        members = [part for index in chosen for part in _members(source, index, config.classes)]
        paths.append(os.path.abspath(path))
        if path.is_file() and _holds(path, members):
            kept += 1
            continue
        try:
            out.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                _write(temporary, members)
        except OSError as error:
            raise RunError(f"shard {str(path)!r} could not be written: {error}") from error
        if not _holds(path, members):
            raise RunError(f"shard {str(path)!r} does not hold what was written: check the disk")
    found = open_shards(paths)
    there = f", {kept} of them were there already" if kept else ""
    _log.info(f"{len(found)} images in {len(paths)} shards in {out}{there}")
    return len(found)


Content = tuple[bytes, bytes]
"""Name and bytes of a member."""


def _members(source: Source, index: int, classes: bool) -> list[Content]:
    """An image, and its class if asked for."""
    name = source.key(index).lstrip(b"/")
    try:
        with opened(source.open(index)) as file:
            members = [(name, file.read())]
    except (OSError, BadImage) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"image {source.name(index)!r} can't be read: {why}") from error
    if classes:
        folder, slash, _ = name.partition(b"/")
        if not slash:
            raise InputError(
                f"image {source.name(index)!r} is in no folder, which would be its class: omit "
                "--classes, or give a folder of classes"
            )
        members.append((sample_of(name) + b".cls", folder))
    return members


def _write(path: Path, members: list[Content]) -> None:
    """Write a tar file that depends on nothing but its members."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _holds(path: Path, members: list[Content]) -> bool:
    """Whether a tar file has exactly these members."""
    try:
        found = read_shard(str(path))
    except InputError:
        return False
    expected = [(name, len(content), zlib.crc32(content)) for name, content in members]
    return found == expected
