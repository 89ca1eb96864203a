"""Finds the images that a setting names, whatever kind of source they are in."""

import os
from collections.abc import Sequence

import numpy as np

from fcmae.data.file_list import FileList, find_images
from fcmae.data.shards import ShardList, find_shards, open_shards
from fcmae.data.sources import Source
from sparse.errors import InputError


def find_source(
    data: str | Sequence[str], exclude: str | None = None, setting: str = "data"
) -> Source:
    """Return the images of folders, text files of paths, or tar shards, also under URLs.

    Args:
        data: folders, text files, single images; or tar files, patterns of them such as
            `shards/{0000..0127}.tar`, folders that hold them. Each may be a URL.
        exclude: a folder that is not searched, such as the run's own.
        setting: the name of `data` in error messages.

    Raises:
        InputError: a source is missing, empty, unreadable, or given twice; or files and shards are
            mixed.
        RemoteError: a source under a URL can't be read now.
    """
    given = [data] if isinstance(data, str) else list(data)
    shards = [find_shards(each) for each in given]
    if not any(shards):
        return find_images(data, exclude, setting)
    if not all(shards):
        files = given[shards.index([])]
        raise InputError(f"{setting} mixes shards with {files!r}: give either shards or images")
    return open_shards([path for found in shards for path in found], setting)


def load_source(path: str | os.PathLike[str], check: bool = True) -> Source:
    """Read what `save` of a list of files or of shards wrote.

    Args:
        path: of the list.
        check: look whether shards have changed.

    Raises:
        InputError: the file can't be read, is not what `save` wrote, or shards have changed.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            of_shards = "shards" in stored.files
    except Exception:  # noqa: BLE001  # the readers say what is wrong
        of_shards = False
    if not of_shards:
        return FileList.load(path)
    shards = ShardList.load(path)
    return shards.checked() if check else shards
