"""Our loader against torchvision's ImageFolder and v1 transforms, on a folder of classes.

    .venv/bin/python benchmarks/loader.py FOLDER [--workers 2] [--batches 20] [--rounds 5]

Both decode, crop (RandomResizedCrop, 224 px, bicubic), flip, normalise and collate batches of 64;
the same crops of the first images are compared pixel by pixel. Then single images of 12 megapixels,
upscaled from the folder's, also with `fast_decode`. Medians of interleaved rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from fcmae.config.pretraining import AugmentConfig, PretrainConfig
from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import crop_box
from fcmae.data.decode import read_image
from fcmae.data.file_list import FileList, find_images
from fcmae.data.image import Reading
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import collate, normalise
from fcmae.data.statistics import Preprocessing, imagenet_mean_std
from sparse.engines import get_engine

SIDE = 224
SCALE = (0.2, 1.0)
RATIO = (0.75, 1.3333)
SHAPES = AugmentConfig(crop_scale=[*SCALE], crop_ratio=[*RATIO])
BATCH = 64
LARGE = (4000, 3000)
LARGE_COUNT = 8
COMPARED = 100
MEAN, STD = imagenet_mean_std(3)
IMAGES = Preprocessing((SIDE, SIDE), tuple(MEAN), tuple(STD))

Rounds = dict[str, Callable[[], float]]


def torchvision_dataset(folder: Path) -> ImageFolder:
    crop = transforms.RandomResizedCrop(
        SIDE, SCALE, RATIO, interpolation=transforms.InterpolationMode.BICUBIC
    )
    flip = transforms.RandomHorizontalFlip()
    numbers = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return ImageFolder(str(folder), transforms.Compose([crop, flip, *numbers]))


def speed(loader: Any, batches: int, finish: Callable[[Any], Any]) -> float:
    """Images per second, after a first batch that starts the workers."""
    iterator = iter(loader)
    next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        finish(next(iterator))
    return batches * BATCH / (time.perf_counter() - began)


def loaders(folder: Path, files: FileList, workers: int, batches: int) -> Rounds:
    """One round of each loader, in images per second."""
    reference = torchvision_dataset(folder)
    ours = PretrainDataset(Split(files), IMAGES, PretrainConfig("", ""))

    def theirs_once() -> float:
        loader = DataLoader(reference, BATCH, shuffle=True, num_workers=workers)
        return speed(loader, batches, lambda batch: batch)

    def ours_once(with_sites: bool) -> float:
        sampler = StepSampler(len(files), BATCH, 0, 0, batches + 1)
        lay_out = get_engine("patch").lay_out if with_sites else None
        return speed(
            make_loader(ours, sampler, workers, lay_out=lay_out),
            batches,
            lambda batch: normalise(batch.images, MEAN, STD, "cpu"),
        )

    return {
        "torchvision": theirs_once,
        "ours": partial(ours_once, False),
        "ours, laying out the encoder's sites": partial(ours_once, True),
    }


def large_photographs(files: FileList, folder: Path) -> Rounds:
    """One round of each way to read images of 12 megapixels, in this process."""
    (folder / "class").mkdir()
    for i in range(LARGE_COUNT):
        with Image.open(files.path(i * (len(files) // LARGE_COUNT))) as image:
            large = image.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC)
        large.save(folder / "class" / f"{i}.jpg", quality=92)
    reference = torchvision_dataset(folder)
    photographs = find_images(str(folder))

    def timed(read: Callable[[int], Any], join: Callable[[list[Any]], Any]) -> float:
        began = time.perf_counter()
        join([read(i) for i in range(LARGE_COUNT)])
        return LARGE_COUNT / (time.perf_counter() - began)

    def ours(fast: bool) -> Callable[[], float]:
        config = PretrainConfig("", "", augment=AugmentConfig(fast_decode=fast))
        dataset = PretrainDataset(Split(photographs), IMAGES, config)
        return lambda: timed(
            lambda i: dataset[(0, i)],
            lambda samples: normalise(collate(samples).images, MEAN, STD, "cpu"),
        )

    return {
        "torchvision": lambda: timed(reference.__getitem__, list),
        "ours": ours(False),
        "ours, fast_decode": ours(True),
    }


def largest_difference(files: FileList) -> int:
    """Largest difference between torchvision's crop of an image and ours, in units of 1/255."""
    worst = 0
    for index in range(min(COMPARED, len(files))):
        path = files.path(index)
        picture = read_image(path, Reading(3, MAX_PIXELS))
        left, top, width, height = crop_box(0, 0, index, picture.size, SHAPES)
        image = default_loader(path)
        expected = transforms.functional.resized_crop(
            image, top, left, height, width, [SIDE, SIDE],
            transforms.InterpolationMode.BICUBIC,
        )  # fmt: skip
        found = picture.resized((left, top, width, height), (SIDE, SIDE)).pixels
        gap = found.astype(int) - np.asarray(expected).transpose(2, 0, 1)
        worst = max(worst, int(np.abs(gap).max()))
    return worst


def show(console: Console, title: str, contestants: Rounds, rounds: int) -> None:
    """Time interleaved rounds; print medians, and the median ratio to torchvision."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, once in contestants.items():
            rates[name].append(once())
    table = Table(title=title)
    for heading in ("", "images/s", "÷ torchvision", "÷ ours"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in rates.items():
        ratios = [
            statistics.median(a / b for a, b in zip(values, rates[other], strict=True))
            for other in ("torchvision", "ours")
        ]
        cells = [f"{ratio:.2f}" for ratio in ratios]
        table.add_row(name, f"{statistics.median(values):.1f}", *cells)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", type=Path, help="folder with one folder per class")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    files = find_images(str(options.data))
    console = Console(highlight=False)
    console.print(f"{len(files)} images; largest difference {largest_difference(files)} / 255")
    title = f"{options.workers} workers, batches of {BATCH}, {SIDE} px"
    contestants = loaders(options.data, files, options.workers, options.batches)
    show(console, title, contestants, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        contestants = large_photographs(files, Path(folder))
        show(console, "12 megapixels, in one process", contestants, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
