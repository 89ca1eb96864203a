"""A step of our fine-tuning compared with a plain timm loop with the same recipe.

    .venv/bin/python benchmarks/finetune_step.py [--model convnextv2_atto] [--rounds 15]

AdamW with layer decay, label smoothing 0.1, drop path 0.1, averaged weights; batches in memory.
Ours runs in `Loop`, with its gradient norm, gate, votes and records. Medians of interleaved steps.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import timm
import torch
from rich.console import Console
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fcmae.data.file_list import FileList
from fcmae.data.sample import Batch, normalise
from fcmae.data.statistics import Preprocessing, imagenet_mean_std
from fcmae.train.loop import Loop
from fcmae.train.optimizer import make_optimizer
from fcmae.train.plan import make_plan
from fcmae.train.signals import Signals
from fcmae.train.task import Images, Resolved
from finetune.blocks import speed_up
from finetune.config import FinetuneConfig, FinetuneOptimConfig
from finetune.optim import layer_depths
from finetune.train import Finetuning, make_ema

CLASSES = 10
EPOCHS = 30
MEAN, STD = imagenet_mean_std(3)
CPU = torch.device("cpu")


class Done(Exception):
    """All rounds have been timed."""


def plain_step(model: nn.Module, config: FinetuneConfig) -> Callable[[Tensor, Tensor], None]:
    """A typical training step around a timm model."""
    optimizer = make_optimizer(model, config.optim, layer_depths(model, "single"))
    ema = ModelEmaV3(model, decay=config.ema_decay or 0.0, foreach=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.augment.label_smoothing)
    model.train()

    def step(images: Tensor, labels: Tensor) -> None:
        criterion(model(normalise(images, MEAN, STD, CPU)), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)

    return step


def make_loop(model: nn.Module, config: FinetuneConfig, steps: int) -> Loop:
    """Our loop, without a run folder or validation images."""
    task = Finetuning(config)
    task.images = Images(FileList((), *np.empty((3, 0), np.uint8)), {})
    images = Preprocessing((0, 0), tuple(MEAN), tuple(STD))
    task.resolved = Resolved(images, make_plan(config, steps * config.batch_size, EPOCHS))
    task.model = model
    task.optimizer = make_optimizer(model, config.optim, layer_depths(model, "single"))
    task.ema = make_ema(model, config.ema_decay or 0.0)
    model.train()
    return Loop(task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    optim = FinetuneOptimConfig(layer_decay=0.75)
    config = FinetuneConfig(data="-", out="-", batch_size=options.batch_size, optim=optim)
    ours = timm.create_model(options.model, num_classes=CLASSES, drop_path_rate=config.drop_path)
    theirs = plain_step(copy.deepcopy(ours), config)
    speed_up(ours)
    shape = (options.batch_size, 3, options.img_size, options.img_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    labels = torch.randint(CLASSES, shape[:1])
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}

    def batches() -> Iterator[Batch]:
        """Our loop asks for a batch when it is done with the last; the plain step runs then."""
        asked = 0.0
        for round_number in range(options.rounds + 2):  # the first of each is a warm-up
            if round_number:
                seconds["ours"].append(time.perf_counter() - asked)
            began = time.perf_counter()
            theirs(images, labels)
            seconds["plain"].append(time.perf_counter() - began)
            asked = time.perf_counter()
            yield Batch(images, labels, targets=labels)
        raise Done

    with contextlib.suppress(Done):
        make_loop(ours, config, options.rounds + 3).run(batches(), Signals())
    plain, own = (statistics.median(values[1:]) for values in seconds.values())
    console = Console(highlight=False)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.model}")
    console.print(f"plain timm loop {plain:.3f} s, ours {own:.3f} s, a ratio of {own / plain:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
