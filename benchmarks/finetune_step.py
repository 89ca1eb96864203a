"""A step of our fine-tuning compared with a plain loop around the same model, the same recipe.

    .venv/bin/python -m benchmarks.finetune_step [--task TASK] [--model NAME] [--rounds 30]

AdamW with layer decay, drop path 0.1, averaged weights; batches in memory. `classify` has label
smoothing 0.1, `segment` UPerNet with its auxiliary head, cross-entropy and Dice, `detect` Faster
and `instances` Mask R-CNN with ten objects in each image. Ours runs in `Loop`, with its gradient
norm, gate, votes and records. Steps in turns; medians and their ratio.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from segmentation_models_pytorch.losses import DiceLoss
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.ratios import summary
from fcmae.data.file_list import FileList
from fcmae.data.sample import Batch, each_target, normalise
from fcmae.data.statistics import Preprocessing, imagenet_mean_std
from fcmae.train.loop import Loop
from fcmae.train.optimizer import make_optimizer
from fcmae.train.plan import make_plan
from fcmae.train.signals import Signals
from fcmae.train.task import Images, Resolved
from finetune.blocks import speed_up
from finetune.config import FinetuneConfig, FinetuneOptimConfig
from finetune.model import Start
from finetune.tasks import TASKS
from finetune.tasks.base import LabelKind
from finetune.train import Finetuning, make_ema

TASKS_HERE = ("classify", "segment", "detect", "instances")
CLASSES = 10
OBJECTS = 10
EPOCHS = 30
MEAN, STD = imagenet_mean_std(3)
CPU = torch.device("cpu")


class Done(Exception):
    """All rounds have been timed."""


def plain_loss(model: nn.Module, images: Tensor, targets: Any, config: FinetuneConfig) -> Tensor:
    """The loss of a typical loop."""
    if isinstance(targets, dict):
        found: Any = model(images, each_target(targets))
        return found
    found = model(images)
    if config.task == "classify":
        return cross_entropy(found, targets, label_smoothing=config.augment.label_smoothing)
    (scores, aux), dice = found, DiceLoss("multiclass", ignore_index=255)
    one = cross_entropy(scores, targets, ignore_index=255)
    other = cross_entropy(aux, targets, ignore_index=255)
    return one + config.aux_weight * other + config.dice_weight * dice(scores, targets)


def plain_step(
    model: nn.Module, kind: LabelKind, config: FinetuneConfig
) -> Callable[[Tensor, Any], None]:
    """A typical training step."""
    optimizer = make_optimizer(model, config.optim, kind.layer_depths(model, "single"))
    ema = ModelEmaV3(model, decay=config.ema_decay or 0.0, foreach=True)
    model.train()

    def step(images: Tensor, targets: Any) -> None:
        plain_loss(model, normalise(images, MEAN, STD, CPU), targets, config).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)

    return step


def random_targets(task: str, batch: int, side: int) -> Any:
    """Random labels of a batch of images of SIDE × SIDE pixels."""
    if task in ("classify", "segment"):
        return torch.randint(CLASSES, (batch,) if task == "classify" else (batch, side, side))
    corners = torch.rand(batch * OBJECTS, 2) * side / 2
    boxes = torch.cat([corners, corners + side / 4], 1)
    labels = torch.randint(1, CLASSES + 1, (len(boxes),))
    targets = {"counts": torch.full((batch,), OBJECTS), "boxes": boxes, "labels": labels}
    if task == "instances":
        masks = torch.zeros(len(boxes), side, side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets["masks"] = masks
    return targets


def make_loop(model: nn.Module, kind: LabelKind, config: FinetuneConfig, steps: int) -> Loop:
    """Our loop, without a run folder or validation images."""
    task = Finetuning(config)
    task.images = Images(FileList((), *np.empty((3, 0), np.uint8)), {})
    images = Preprocessing((0, 0), tuple(MEAN), tuple(STD))
    task.resolved = Resolved(images, make_plan(config, steps * config.batch_size, EPOCHS))
    task.model, task.kind = model, kind
    task.optimizer = make_optimizer(model, config.optim, kind.layer_depths(model, "single"))
    task.ema = make_ema(model, config.ema_decay or 0.0)
    model.train()
    return Loop(task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS_HERE, default="classify")
    parser.add_argument("--model", default="convnextv2_atto")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    config = FinetuneConfig(
        data="-", out="-", task=options.task, batch_size=options.batch_size, anchor_size=32,
        optim=FinetuneOptimConfig(layer_decay=0.75),
    )  # fmt: skip
    shape = (options.batch_size, 3, options.img_size, options.img_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    targets = random_targets(options.task, options.batch_size, options.img_size)
    kind = TASKS[options.task]([str(number) for number in range(CLASSES)])
    kind.prepare(config, np.zeros(0), CPU)
    start = Start(options.model, {}, origin="-")
    ours, _ = kind.build_model(start, 3, shape[2:], config.drop_path)
    theirs = plain_step(copy.deepcopy(ours), kind, config)
    speed_up(ours)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}

    def batches() -> Iterator[Batch]:
        """Our loop asks for a batch when it is done with the last; the plain step runs then."""
        asked = 0.0
        for round_number in range(options.rounds + 2):  # the first of each is a warm-up
            if round_number:
                seconds["ours"].append(time.perf_counter() - asked)
            began = time.perf_counter()
            theirs(images, targets)
            seconds["plain"].append(time.perf_counter() - began)
            asked = time.perf_counter()
            yield Batch(images, targets, targets=targets)
        raise Done

    with contextlib.suppress(Done):
        make_loop(ours, kind, config, options.rounds + 3).run(batches(), Signals())
    plain, own = seconds["plain"][1:-1], seconds["ours"][1:]
    console = Console(highlight=False)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.model}")
    console.print(
        f"{options.task}: plain loop {statistics.median(plain):.3f} s, ours "
        f"{statistics.median(own):.3f} s, ratio "
        f"{summary([a / b for a, b in zip(own, plain, strict=True)])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
