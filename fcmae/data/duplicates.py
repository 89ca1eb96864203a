"""Near-duplicates: pictures that are the same photograph, resized, recompressed or retouched.

Each picture is told by a perceptual hash: shrunk to 64×64 grey pixels, the signs of the 16×16
lowest frequencies of its cosine transform but the constant one. On 3,400 photographs, copies mostly
differed in up to 20 of the 255 bits (resized, blurred, recompressed, brightened), other pictures in
50 and more. Not found are mirrored copies, clear crops and those with blown-out light; small things
on a plain ground, icons and scans are taken for each other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.atomic import atomic_write
from fcmae.config.values import MAX_PIXELS
from fcmae.console import tracked
from fcmae.data.batch import as_float
from fcmae.data.decode import BadImage, read_picture
from fcmae.data.evaluation import SHOWN, batches_of
from fcmae.data.files import FileList, find_images
from fcmae.data.labelled import LabelledData
from fcmae.data.loader import lost_workers, make_loader
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import ALONE, World

SIDE = 64
FREQUENCIES = 16
BITS = FREQUENCIES**2 - 1
MOST_BITS = 32
"""Bits by which two hashes of one photograph may differ."""

FLAT = 0.01
"""Deviation of the shrunk picture under which its hash says nothing, of a range of 1."""

_AT_ONCE = 4096

_log = logging.getLogger(__name__)

_COSINES = np.cos(
    np.pi / SIDE * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5), dtype=np.float32
)

Hash = npt.NDArray[np.uint8]


class Duplicate(NamedTuple):
    """A file, the other file that it nearly is, and the bits by which they differ."""

    path: str
    of: str
    bits: int


@dataclass
class _Hashes:
    """Packed hashes (B, 32) of the files `indices` (B,)."""

    hashes: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)


class _HashDataset(Dataset["tuple[int, Hash] | None"]):
    def __init__(self, files: FileList) -> None:
        self.files = files

    def __getitem__(self, index: int) -> tuple[int, Hash] | None:
        found = perceptual_hash(self.files.path(index))
        return None if found is None else (index, found)


def perceptual_hash(path: str | bytes) -> Hash | None:
    """The hash of a picture, 32 bytes; None where it can't be read or is all of one tone."""
    try:
        picture = read_picture(path, 1, MAX_PIXELS)
        small = as_float(picture.resized((0, 0, *picture.size), (SIDE, SIDE), fast=True))[0]
    except BadImage:
        return None
    if small.std() < FLAT:
        return None
    return np.packbits((_COSINES @ small @ _COSINES.T).ravel()[1:] > 0)


def find_duplicates(
    files: FileList,
    others: FileList,
    workers: int,
    world: World = ALONE,
    shown: bool = False,
) -> list[Duplicate]:
    """Find the pictures in `files` that are near-duplicates of one in `others`, its nearest.

    Args:
        world: the processes that share the work, each with the whole result in the end. None of
            them waits for another that works alone: a collective would time out.
        shown: with a progress bar, on terminals.

    Raises:
        RunError: a process that reads pictures died.
    """
    wanted, wanted_at = _hashes(others, workers, world, "hashes of val" if shown else None)
    parts = world.gather((wanted, wanted_at))
    wanted = np.concatenate([part[0] for part in parts])
    wanted_at = [index for part in parts for index in part[1]]
    found, found_at = _hashes(files, workers, world, "hashes to compare" if shown else None)
    own = _nearest(files, found, found_at, others, wanted, wanted_at)
    everywhere = [entry for part in world.gather(own) for entry in part]
    return [entry for _, entry in sorted(everywhere)]


def _nearest(
    files: FileList, found: Hash, found_at: Sequence[int],
    others: FileList, wanted: Hash, wanted_at: Sequence[int],
) -> list[tuple[int, Duplicate]]:  # fmt: skip
    """(position, duplicate) of those of `found` that are near one of `wanted`."""
    result: list[tuple[int, Duplicate]] = []
    if not len(wanted):
        return result
    signs = _signs(wanted)
    for start in range(0, len(found), _AT_ONCE):
        alike = _signs(found[start : start + _AT_ONCE]) @ signs.T
        best = alike.max(1)
        bits = ((BITS - best.values) / 2).round().int()
        for place in (bits <= MOST_BITS).nonzero().flatten().tolist():
            index, near = found_at[start + place], wanted_at[int(best.indices[place])]
            entry = Duplicate(files.name(index), others.name(near), int(bits[place]))
            result.append((index, entry))
    return result


def report_duplicates(
    images: str, data: LabelledData, workers: str | int, world: World
) -> list[Duplicate]:
    """Say which pictures of a folder are near-duplicates of pictures in val, and return them.

    All processes of `world` share the work; the main one reports.

    Raises:
        InputError: no pictures there.
        RunError: a process that reads pictures died.
    """
    files = find_images(images, setting="near_duplicates")
    processes = resolve_workers(workers, world.device)
    found = find_duplicates(files, data.val.files, processes, world, shown=world.is_main)
    if not world.is_main:
        return found
    for entry in found[:SHOWN]:
        _log.warning(
            "near-duplicate of a validation picture: %s is like %s%s", entry.path, data.val.prefix,
            entry.of,
        )  # fmt: skip
    if len(found) > SHOWN:
        _log.warning("and %d more", len(found) - SHOWN)
    distinct = len({entry.of for entry in found})
    _log.info(
        "%d of %d pictures in %s are near-duplicates of %d of the %d pictures in val", len(found),
        len(files), images, distinct, len(data.val.files),
    )  # fmt: skip
    return found


def write_duplicates(found: Sequence[Duplicate], path: Path) -> None:
    """Write a JSON object a line."""
    with atomic_write(path) as file:
        file.write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in found))


def _hashes(
    files: FileList, workers: int, world: World, what: str | None
) -> tuple[Hash, Sequence[int]]:
    """Hashes (N, 32) of this process's share of the files, and which files these are."""
    batches = [batch for batch in batches_of(len(files), 64, world.rank, world.size) if batch]
    if not batches:
        return np.empty((0, 32), np.uint8), []
    loader = make_loader(_HashDataset(files), batches, workers, join=_join)
    with lost_workers():
        parts = list(tracked(loader, len(batches), what))
    hashes = torch.cat([part.hashes for part in parts])
    return hashes.numpy(), torch.cat([part.indices for part in parts]).tolist()


def _join(samples: Sequence[tuple[int, Hash] | None]) -> _Hashes:
    good = [sample for sample in samples if sample is not None]
    hashes = [sample[1] for sample in good]
    packed = np.stack(hashes) if hashes else np.empty((0, 32), np.uint8)
    indices = torch.tensor([sample[0] for sample in good], dtype=torch.int64)
    return _Hashes(torch.from_numpy(packed), indices)


def _signs(hashes: Hash) -> Tensor:
    """Bits as ±1 (N, 255): of a product of two, (255 - product) / 2 bits differ."""
    return torch.from_numpy(np.unpackbits(hashes, axis=1, count=BITS)).float() * 2 - 1
