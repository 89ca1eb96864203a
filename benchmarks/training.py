"""The cost of reading images during training: the model alone, the loader alone, both together.

    .venv/bin/python benchmarks/training.py FOLDER [--model atto] [--batch 64] [--rounds 3]

A whole pretraining step at 224 px (decoder, loss, AdamW) repeated on one batch; the loader with two
workers and no model; and steps on the loader's batches, with the number of workers that a run
chooses by default. Where both share the cores, 1 / (1/model + 1/loader) images per second is the
upper limit.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from fcmae.config.pretraining import PretrainConfig
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import normalise
from fcmae.data.statistics import Preprocessing, imagenet_mean_std
from fcmae.inspect.steps import WHOLE, make_step
from fcmae.train.machine import resolve_workers

SIDE = 224
MEAN, STD = imagenet_mean_std(3)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="atto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    files = find_images(options.folder)
    preprocessing = Preprocessing((SIDE, SIDE), tuple(MEAN), tuple(STD))
    dataset = PretrainDataset(Split(files), preprocessing, PretrainConfig("", ""))
    step = make_step("patch" + WHOLE, options.model, CPU)
    workers = int(resolve_workers("auto", CPU))

    def read(workers: int, use: Callable[[Tensor, Tensor], None] | None) -> float:
        """Images per second over batches from the loader, after a first one."""
        sampler = StepSampler(len(files), options.batch, 0, 0, options.batches + 1)
        batches = iter(make_loader(dataset, sampler, workers))
        next(batches)
        began = time.perf_counter()
        for batch in batches:
            images = normalise(batch.images, MEAN, STD, CPU)
            if use is not None:
                use(images, batch.masks)
        return options.batches * options.batch / (time.perf_counter() - began)

    sampler = StepSampler(len(files), options.batch, 0, 0, 1)
    fixed = next(iter(make_loader(dataset, sampler, 0)))
    images = normalise(fixed.images, MEAN, STD, CPU)

    def model_alone() -> float:
        began = time.perf_counter()
        for _ in range(options.batches):
            step(images, fixed.masks)
        return options.batches * options.batch / (time.perf_counter() - began)

    contestants = {
        "model": model_alone,
        "loader": lambda: read(torch.get_num_threads(), None),
        "both": lambda: read(workers, step),
    }
    step(images, fixed.masks)
    rounds = [{name: run() for name, run in contestants.items()} for _ in range(options.rounds)]
    speeds = {name: statistics.median(r[name] for r in rounds) for name in contestants}
    shares = [r["both"] * (1 / r["model"] + 1 / r["loader"]) for r in rounds]
    console = Console()
    for name, speed in speeds.items():
        console.print(f"{name}: {speed:.1f} images/s")
    console.print(
        f"both ÷ (1 / (1/model + 1/loader)): {statistics.median(shares):.2f} "
        f"({min(shares):.2f} to {max(shares):.2f}), {workers} workers, {options.model}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
