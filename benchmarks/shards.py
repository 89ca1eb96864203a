"""Tar shards and datasets: how fast they are indexed and read, against loose files.

    .venv/bin/python -m benchmarks.shards FOLDER [--members 1000000] [--rounds 5]

The index is of MEMBERS members of one byte in 1,000 shards, written to a temporary folder (1 GB).
The loaders read, crop and collate the images of FOLDER, packed or not, in the same order, with two
workers; medians of rounds in turns, page cache warm. An image is opened and its bytes are read in
one process. With `pip install webdataset`, its reader gives the bytes to the same crops.
"""

import argparse
import importlib.util
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from torch.utils.data import DataLoader

from fcmae.commands.shard import ShardConfig
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.augment import random_geometry
from fcmae.data.decode import read_image
from fcmae.data.file_list import EXTENSIONS, find_images
from fcmae.data.find import find_source
from fcmae.data.image import Reading, opened
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import Sample, collate
from fcmae.data.sharding import shard
from fcmae.data.shards import find_shards, open_shards
from fcmae.data.sources import Source
from fcmae.data.statistics import Preprocessing, imagenet_mean_std
from fcmae.model.mask import random_mask

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


def rate_of(loader: Iterable[Any], batches: int) -> float:
    """Images per second, after a first batch that starts the workers."""
    iterator = iter(loader)
    next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * BATCH / (time.perf_counter() - began)


def speed(source: Source, workers: int, batches: int) -> float:
    """Images per second of our loader."""
    dataset = PretrainDataset(Split(source), IMAGES, PretrainConfig("", ""))
    loader = make_loader(dataset, StepSampler(len(source), BATCH, 0, 0, batches + 1), workers)
    return rate_of(loader, batches)


def webdataset_speed(folder: str, workers: int, batches: int) -> float:
    """As `speed`, of the images in the order of the shards, read by webdataset."""
    import webdataset

    config, numbers = PretrainConfig("", ""), itertools.count()

    def sample(entry: dict[str, Any]) -> Sample:
        content = next(entry[key] for key in entry if key in EXTENSIONS)
        opened, number = read_image(io.BytesIO(content), Reading(3)), next(numbers)
        cut = random_geometry(0, 0, number, opened.size, config.augment)
        pixels, _ = opened.resized(cut.box, IMAGES.img_size, cut.flip_h)
        return Sample(pixels, number, mask=random_mask(0, 0, number, (7, 7), config.mask_ratio))

    read = webdataset.WebDataset(find_shards(folder) * 100, shardshuffle=False).map(sample)
    loader = DataLoader(read.batched(BATCH, collate), batch_size=None, num_workers=workers)
    return rate_of(loader, batches)


def opening(source: Source) -> float:
    """Microseconds to open an image and read its bytes, of all in the loader's order."""
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    began = time.perf_counter()
    for index in order:
        with opened(source.open(index)) as file:
            file.read()
    return (time.perf_counter() - began) / len(source) * 1e6


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
        loose = find_images(str(options.folder))
        paths = [os.fsdecode(loose.path(index)) for index in range(len(loose))]
        images = Dataset.from_dict({"image": paths}).cast_column("image", Image())
        images.save_to_disk(os.path.join(name, "dataset"))
        sources = {
            "loose files": loose,
            "shards": find_source(os.path.join(name, "shards")),
            "dataset": find_source(f"hf:{name}/dataset"),
        }
        rates: dict[str, list[float]] = {what: [] for what in sources}
        times: dict[str, list[float]] = {what: [] for what in sources}
        with_webdataset = importlib.util.find_spec("webdataset") is not None
        for _ in range(options.rounds):
            for what, source in sources.items():
                rates[what].append(speed(source, options.workers, options.batches))
                times[what].append(opening(source))
            if with_webdataset:
                found = webdataset_speed(f"{name}/shards", options.workers, options.batches)
                rates.setdefault("webdataset", []).append(found)
    medians = {what: statistics.median(found) for what, found in rates.items()}
    for what, rate in medians.items():
        print(f"{what}: {rate:.0f} images/s, {rate / medians['loose files']:.2f}")
    for what, each in times.items():
        print(f"{what}: {statistics.median(each):.0f} µs to open and read an image")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
