"""Tar shards: how fast they are indexed and read, against loose files.

    .venv/bin/python -m benchmarks.shards FOLDER [--members 1000000] [--rounds 5]

The index is of MEMBERS members of one byte in 1,000 shards, written to a temporary folder (1 GB).
The loaders read, crop and collate the images of FOLDER, packed or not, in the same order, with two
workers; medians of rounds in turns, page cache warm.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

from fcmae.commands.shard import ShardConfig
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.file_list import find_images
from fcmae.data.find import find_source
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sharding import shard
from fcmae.data.shards import find_shards, open_shards
from fcmae.data.sources import Source
from fcmae.data.statistics import Preprocessing, imagenet_mean_std

SHARDS, BATCH, SIDE = 1000, 64, 224
MEAN, STD = imagenet_mean_std(3)
IMAGES = Preprocessing((SIDE, SIDE), tuple(MEAN), tuple(STD))


def index(folder: Path, members: int) -> None:
    """Print the seconds that the index of many members takes, at first and again."""
    info = tarfile.TarInfo()
    info.size = 1
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number:06}.tar", "w") as tar:
            for member in range(members // SHARDS):
                info.name = f"{number:06}{member:06}.jpg"
                tar.addfile(info, io.BytesIO(b"x"))
    paths = find_shards(str(folder))
    for what in ("indexed", "opened again"):
        began = time.perf_counter()
        found = open_shards(paths)
        print(
            f"{len(found)} members in {SHARDS} shards {what}: {time.perf_counter() - began:.2f} s"
        )
    parts = [value for value in vars(found).values() if hasattr(value, "nbytes")]
    print(f"{sum(part.nbytes for part in parts) / len(found):.1f} bytes for each")


def speed(source: Source, workers: int, batches: int) -> float:
    """Images per second, after a first batch that starts the workers."""
    dataset = PretrainDataset(Split(source), IMAGES, PretrainConfig("", ""))
    loader = make_loader(dataset, StepSampler(len(source), BATCH, 0, 0, batches + 1), workers)
    iterator = iter(loader)
    next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * BATCH / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        index(Path(name), options.members)
    with tempfile.TemporaryDirectory() as name:
        shard(ShardConfig(str(options.folder), os.path.join(name, "shards")))
        rounds = {
            what: partial(speed, source, options.workers, options.batches)
            for what, source in (
                ("loose files", find_images(str(options.folder))),
                ("shards", find_source(os.path.join(name, "shards"))),
            )
        }
        found: dict[str, list[float]] = {what: [] for what in rounds}
        for _ in range(options.rounds):
            for what, once in rounds.items():
                found[what].append(once())
    medians = {what: statistics.median(rates) for what, rates in found.items()}
    for what, rate in medians.items():
        print(f"{what}: {rate:.0f} images/s, {rate / medians['loose files']:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
