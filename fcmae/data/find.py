"""Finds the images that a setting names, whatever kind of source they are in."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fcmae.data.dataset_list import DatasetList, is_dataset, open_splits
from fcmae.data.file_list import FileList, find_images
from fcmae.data.shards import ShardList, find_shards, open_shards
from fcmae.data.sources import Source
from sparse.errors import InputError

_STORED: dict[str, Any] = {"shards": ShardList, "dataset": DatasetList}
"""What reads a stored list that has this part; any other is a `FileList`."""


def find_source(
    data: str | Sequence[str], exclude: str | None = None, setting: str = "data"
) -> Source:
    """Return the images of folders, text files of paths, tar shards, or a dataset.

    Args:
        data: folders, text files, single images; or tar files, patterns of them such as
            `shards/{0000..0127}.tar`, folders that hold them; or `hf:PATH_OR_NAME`. All but the
            last may be URLs.
        exclude: a folder that is not searched, such as the run's own.
        setting: the name of `data` in error messages.

    Raises:
        InputError: a source is missing, empty, unreadable, or given twice; or kinds of sources are
            mixed.
        RemoteError: a source under a URL can't be read now.
    """
    given = [data] if isinstance(data, str) else list(data)
    if datasets := [each for each in given if is_dataset(each)]:
        if len(given) > 1:
            raise InputError(f"{setting} {datasets[0]!r} is one of several: give one dataset alone")
        splits = open_splits(datasets[0], setting)
        return splits.images(splits.pick())
    shards = [find_shards(each) for each in given]
    if not any(shards):
        return find_images(data, exclude, setting)
    if not all(shards):
        files = given[shards.index([])]
        raise InputError(f"{setting} mixes shards with {files!r}: give either shards or images")
    return open_shards([path for found in shards for path in found], setting)


def load_source(path: str | os.PathLike[str], check: bool = True) -> Source:
    """Read what `save` of a source wrote.

    Args:
        path: of the list.
        check: look whether shards or a dataset have changed.

    Raises:
        InputError: the file can't be read, is not what `save` wrote, or its images have changed.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            kinds = [kind for part, kind in _STORED.items() if part in stored.files]
    except Exception:  # noqa: BLE001  # the readers say what is wrong
        kinds = []
    if not kinds:
        return FileList.load(path)
    source = kinds[0].load(path)
    return source.checked() if check else source
