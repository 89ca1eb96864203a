"""Near-duplicates: images that are the same photograph, resized, recompressed or retouched.

Images are compared by a perceptual hash: shrunk to 64×64 grey pixels, the signs of the 16×16
lowest frequencies of the cosine transform except the constant one. On 3,400 photographs, copies
(resized, blurred, recompressed, brightened) mostly differed in up to 20 of the 255 bits, other
images in 50 and more. Mirrored, clearly cropped and overexposed copies are not found; small objects
on a plain background, icons and scans are mistaken for each other.
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
from fcmae.console import tracked
from fcmae.data.decode import read_image
from fcmae.data.evaluation import batches_of, warn_of_first
from fcmae.data.image import BadImage, Reading
from fcmae.data.labelled import LabelledData
from fcmae.data.loader import lost_workers, make_loader
from fcmae.data.resize import as_float
from fcmae.data.sample import Sample
from fcmae.data.sources import PathOrFile, Source
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import ALONE, World

SIDE = 64
FREQUENCIES = 16
BITS = FREQUENCIES**2 - 1
MOST_BITS = 32
"""Largest number of bits in which two hashes of one photograph may differ."""

FLAT = 0.01
"""Standard deviation of the shrunk image, of a range of 1, below which its hash is noise."""

_AT_ONCE = 4096

_log = logging.getLogger(__name__)

_COSINES = np.cos(
    np.pi / SIDE * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5), dtype=np.float32
)

Hash = npt.NDArray[np.uint8]


class Duplicate(NamedTuple):
    """An image, the image that it nearly equals, and the number of bits that differ."""

    path: str
    of: str
    bits: int


@dataclass
class _HashDataset(Dataset[Sample]):
    """Hashes in place of images; a sample without a hash has None."""

    source: Source

    def __getitem__(self, index: int) -> Sample:
        return Sample(perceptual_hash(self.source.open(index)), index)


def perceptual_hash(path_or_file: PathOrFile) -> Hash | None:
    """The hash of an image, 32 bytes; None if it can't be read or has a single tone."""
    try:
        image = read_image(path_or_file, Reading(1))
        small = as_float(image.resized((0, 0, *image.size), (SIDE, SIDE), fast=True).pixels)[0]
    except BadImage:
        return None
    hashed = np.packbits((_COSINES @ small @ _COSINES.T).ravel()[1:] > 0)
    return None if small.std() < FLAT else hashed


def find_duplicates(
    source: Source, others: Source, workers: int, world: World = ALONE
) -> list[Duplicate]:
    """Find the images in `source` that are near-duplicates of one in `others`, with the nearest.

    The result is sorted by name. The main process shows progress bars on terminals.

    Args:
        source: the images to search.
        others: the images to compare with.
        workers: processes that read images.
        world: the processes that share the work; each returns the whole result. None of them waits
            while another works alone: a collective would time out.

    Raises:
        RunError: a process that reads images died.
    """
    parts = world.gather(_hashes(others, workers, world, "hashes of val"))
    wanted_at = [index for _, indices in parts for index in indices]
    signs = _signs(np.concatenate([hashes for hashes, _ in parts]))
    hashes, places = _hashes(source, workers, world, "hashes to compare")
    found: list[Duplicate] = []
    for start in range(0, len(hashes) if wanted_at else 0, _AT_ONCE):
        best = (_signs(hashes[start : start + _AT_ONCE]) @ signs.T).max(1)
        bits = ((BITS - best.values) / 2).round().int()
        for near in (bits <= MOST_BITS).nonzero().flatten().tolist():
            name, of = source.name(places[start + near]), wanted_at[int(best.indices[near])]
            found.append(Duplicate(name, others.name(of), int(bits[near])))
    return sorted(entry for part in world.gather(found) for entry in part)


def report_duplicates(
    source: Source, data: LabelledData, workers: str | int, world: World
) -> list[Duplicate]:
    """Report which images are near-duplicates of images in val, and return them.

    Args:
        source: the images.
        data: they are compared with its `val`.
        workers: processes that read images.
        world: the processes that share the work; the main one reports.

    Raises:
        RunError: a process that reads images died.
    """
    processes = resolve_workers(workers, world.device)
    found = find_duplicates(source, data.val.source, processes, world)
    if not world.is_main:
        return found
    pairs = [f"{path} is like {data.val.prefix}{of}" for path, of, _ in found]
    warn_of_first([f"near-duplicate of a validation image: {pair}" for pair in pairs])
    of = len({entry.of for entry in found})
    _log.info(f"{len(found)} of {len(source)} images are near-duplicates of {of} images in val")
    return found


def write_duplicates(found: Sequence[Duplicate], path: Path) -> None:
    """Write one JSON object per line."""
    with atomic_write(path) as file:
        file.write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in found))


def _hashes(source: Source, workers: int, world: World, what: str) -> tuple[Hash, list[int]]:
    """Hashes (N, 32) of this process's share of the images, and the indices of hashed images."""
    batches = batches_of(len(source), 64, world.rank, world.size)
    hashes, indices = [np.empty((0, 32), np.uint8)], []
    with lost_workers():
        loader = make_loader(_HashDataset(source), batches, workers)
        for batch in tracked(loader, len(batches), what if world.is_main else None):
            hashes.append(batch.images.numpy().reshape(-1, 32))
            indices += batch.indices.tolist()
    return np.concatenate(hashes), indices


def _signs(hashes: Hash) -> Tensor:
    """Bits as ±1 (N, 255): two hashes differ in (255 - dot product) / 2 bits."""
    return torch.from_numpy(np.unpackbits(hashes, axis=1, count=BITS)).float() * 2 - 1
