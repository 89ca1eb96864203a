"""Near-duplicates: images that are the same photograph, resized, recompressed or retouched.

Each image is known by a perceptual hash: shrunk to 64×64 grey pixels, the signs of the 16×16
lowest frequencies of its cosine transform but the constant one. On 3,400 photographs, copies mostly
differed in up to 20 of the 255 bits (resized, blurred, recompressed, brightened), other images in
50 and more. Not found are mirrored copies, clear crops and those with blown-out light; small things
on a plain ground, icons and scans are mistaken for each other.
"""

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
from fcmae.data.decode import BadImage, read_image
from fcmae.data.evaluation import batches_of, warn_of_first
from fcmae.data.labelled import LabelledData
from fcmae.data.loader import lost_workers, make_loader
from fcmae.data.sample import Sample, as_float
from fcmae.data.sources import PathOrFile, Source
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import ALONE, World

SIDE = 64
FREQUENCIES = 16
BITS = FREQUENCIES**2 - 1
MOST_BITS = 32
"""Bits by which two hashes of one photograph may differ."""

FLAT = 0.01
"""Deviation of the shrunk image under which its hash says nothing, of a range of 1."""

_AT_ONCE = 4096

_log = logging.getLogger(__name__)

_COSINES = np.cos(
    np.pi / SIDE * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5), dtype=np.float32
)

Hash = npt.NDArray[np.uint8]


class Duplicate(NamedTuple):
    """An image, the other that it nearly is, and the bits by which they differ."""

    path: str
    of: str
    bits: int


@dataclass
class _HashDataset(Dataset[Sample]):
    """Hashes in place of images; a sample without one where there is none."""

    source: Source

    def __getitem__(self, index: int) -> Sample:
        return Sample(perceptual_hash(self.source.open(index)), index)


def perceptual_hash(path_or_file: PathOrFile) -> Hash | None:
    """The hash of an image, 32 bytes; None where it can't be read or is all of one tone."""
    try:
        image = read_image(path_or_file, 1, MAX_PIXELS)
        small = as_float(image.resized((0, 0, *image.size), (SIDE, SIDE), fast=True))[0]
    except BadImage:
        return None
    if small.std() < FLAT:
        return None
    return np.packbits((_COSINES @ small @ _COSINES.T).ravel()[1:] > 0)


def find_duplicates(
    source: Source, others: Source, workers: int, world: World = ALONE, shown: bool = False
) -> list[Duplicate]:
    """Find the images in `source` that are near-duplicates of one in `others`, its nearest.

    Args:
        source: the images to search.
        others: what they are compared with.
        workers: processes that read images.
        world: the processes that share the work, each with the whole result in the end. None of
            them waits for another that works alone: a collective would time out.
        shown: with a progress bar, on terminals.

    Raises:
        RunError: a process that reads images died.
    """
    parts = world.gather(_hashes(others, workers, world, "hashes of val" if shown else None))
    wanted_at = [index for _, indices in parts for index in indices]
    signs = _signs(np.concatenate([hashes for hashes, _ in parts]))
    hashes, places = _hashes(source, workers, world, "hashes to compare" if shown else None)
    found: list[tuple[int, Duplicate]] = []
    for start in range(0, len(hashes) if wanted_at else 0, _AT_ONCE):
        best = (_signs(hashes[start : start + _AT_ONCE]) @ signs.T).max(1)
        bits = ((BITS - best.values) / 2).round().int()
        for near in (bits <= MOST_BITS).nonzero().flatten().tolist():
            place, of = places[start + near], wanted_at[int(best.indices[near])]
            entry = Duplicate(source.name(place), others.name(of), int(bits[near]))
            found.append((place, entry))
    everywhere = [pair for part in world.gather(found) for pair in part]
    return [entry for _, entry in sorted(everywhere)]


def report_duplicates(
    source: Source, data: LabelledData, workers: str | int, world: World
) -> list[Duplicate]:
    """Report which images are near-duplicates of images in val, and return them.

    Args:
        source: the images.
        data: its `val` is what they are compared with.
        workers: processes that read images.
        world: the processes that share the work; the main one reports.

    Raises:
        RunError: a process that reads images died.
    """
    processes = resolve_workers(workers, world.device)
    found = find_duplicates(source, data.val.source, processes, world, shown=world.is_main)
    if not world.is_main:
        return found
    near = [f"{entry.path} is like {data.val.prefix}{entry.of}" for entry in found]
    warn_of_first([f"near-duplicate of a validation image: {pair}" for pair in near])
    _log.info(
        f"{len(found)} of {len(source)} images are near-duplicates of "
        f"{len({entry.of for entry in found})} of the {len(data.val.source)} images in val"
    )
    return found


def write_duplicates(found: Sequence[Duplicate], path: Path) -> None:
    """Write a JSON object a line."""
    with atomic_write(path) as file:
        file.write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in found))


def _hashes(source: Source, workers: int, world: World, what: str | None) -> tuple[Hash, list[int]]:
    """Hashes (N, 32) of this process's share of the images that have one, and which these are."""
    batches = [batch for batch in batches_of(len(source), 64, world.rank, world.size) if batch]
    hashes, indices = [np.empty((0, 32), np.uint8)], []
    with lost_workers():
        loader = make_loader(_HashDataset(source), batches, workers)
        for batch in tracked(loader, len(batches), what):
            if len(batch):
                hashes.append(batch.images.numpy())
                indices += batch.indices.tolist()
    return np.concatenate(hashes), indices


def _signs(hashes: Hash) -> Tensor:
    """Bits as ±1 (N, 255): of a product of two, (255 - product) / 2 bits differ."""
    return torch.from_numpy(np.unpackbits(hashes, axis=1, count=BITS)).float() * 2 - 1
