"""The one script that training of every kind runs, from a config to an exported model.

What differs between pretraining and fine-tuning is a `Job`: which images there are, the model, the
task that the loop trains, and what is exported at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Dataset

from fcmae.config.values import to_dict
from fcmae.console import show_logs
from fcmae.data.file_list import FileList
from fcmae.data.loader import make_loader
from fcmae.data.order import StepSampler, check_parts
from fcmae.data.sources import Source
from fcmae.data.statistics import MeanStd, Preprocessing, resolve_mean_std, warn_if_far_off
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.loop import Loop
from fcmae.train.machine import (
    check_disk,
    checkpoint_bytes,
    cpu_multiplies_bf16,
    disk_line,
    resolve_precision,
    resolve_workers,
)
from fcmae.train.plan import AutoEpochs, Plan, asked_rate, make_plan
from fcmae.train.processes import World, join_world, resolve_device
from fcmae.train.resume import facts, find_start
from fcmae.train.run_folder import RunFolder, open_run
from fcmae.train.signals import Signals
from fcmae.train.task import Task

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
        train: what is trained on.
        lists: every list of images that the run keeps in its folder, by its part.
        others: further images that all processes must have in common.
    """

    train: Source
    lists: Mapping[str, FileList]
    others: Sequence[Source] = ()


@dataclass(frozen=True)
class Resolved:
    """What a config leaves open, decided from the data, the weights and the machine.

    Attributes:
        images: how images become numbers.
        precision: `fp32` or `bf16`.
        workers: processes that read images.
        start: the checkpoint that the run resumes from, if any.
        world: the processes.
        part: images of one process in one part of a step.
    """

    images: Preprocessing
    precision: str
    workers: int
    start: SavedCheckpoint | None
    world: World
    part: int


class Job(Protocol):
    """A kind of training. Its methods are called in the order in which they stand here.

    Attributes:
        command: the command that runs it, by which a run is recognised.
        config: what was asked.
        auto_epochs: what `epochs: auto` stands for.
        least_warmup: steps of warm-up that the learning rate needs at least.
        weight_copies: how often a checkpoint holds the weights besides the model's own.
    """

    command: str
    config: Any
    auto_epochs: AutoEpochs
    least_warmup: int
    weight_copies: int

    def check(self, device: torch.device) -> tuple[int, int]:
        """Return (height, width) of the images, after checking what needs no data.

        Raises:
            InputError: the config can't be run on this device.
        """
        ...

    def find_images(self, start: SavedCheckpoint | None) -> Images:
        """Find the images; those of the stored lists where a run resumes.

        Raises:
            InputError: there are none, or they do not suit the config.
        """
        ...

    def named_mean_std(self) -> Mapping[str, MeanStd]:
        """What `augment.mean` and `std` may name besides `imagenet` and `data`."""
        ...

    def build_model(self, resolved: Resolved) -> nn.Module:
        """Return the model with its initial weights, on the device: a function of the seed."""
        ...

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of what is trained.

        Raises:
            InputError: the config can't be met for this model.
        """
        ...

    def prepare(self, resolved: Resolved) -> None:
        """Do what takes all processes together before anything is written."""
        ...

    def make_task(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        resolved: Resolved,
        plan: Plan,
        folder: RunFolder | None,
    ) -> Task:
        """Return what the loop trains; `folder` is None on processes other than the main one."""
        ...

    def settings(self) -> dict[str, Any]:
        """What checkpoints record besides the config and what the script resolves."""
        ...

    def announcement(self, resolved: Resolved, plan: Plan) -> list[str]:
        """Lines for the log that say what will be done; the first names the model."""
        ...

    def dataset(self, resolved: Resolved) -> Dataset[Any]:
        """Training samples by (epoch, index)."""
        ...

    def export(self, folder: RunFolder) -> None:
        """Write the finished model to `folder.paths.exported`."""
        ...


def train(job: Job) -> int:
    """Train, or resume the run in `config.out`.

    Returns:
        0 when done, 130 after Ctrl-C and 143 after SIGTERM, both with the state saved.

    Raises:
        InputError: the config, the data, the weights or the folder is wrong; nothing was changed
            then.
        RunError: the run could not continue; the last checkpoint is good.
    """
    show_logs()
    config = job.config
    device = resolve_device(config.device)
    img_size = job.check(device)
    with join_world(device) as world, Signals() as signals:
        check_parts(config.batch_size, world.size, config.accumulate)
        start = find_start(config, job.command)
        step = start.state["step"] if start else 0
        images = job.find_images(start)
        count = len(images.train)
        resolved = _resolve(job, img_size, images.train, start, world)
        epochs = job.auto_epochs.resolve(config.epochs, count)
        plan = make_plan(config, count, epochs, job.least_warmup)
        sampler = StepSampler(
            count, config.batch_size, config.seed, step, plan.total_steps, world.rank, world.size,
            config.accumulate,
        )  # fmt: skip
        model = job.build_model(resolved)
        size = checkpoint_bytes(model, job.weight_copies)
        if step < plan.total_steps:
            check_disk(config, size)
        optimizer = job.make_optimizer(model)
        # Nobody writes, or waits for the others, before everybody has checked.
        world.check_same(facts(config, step, *images.lists.values(), *images.others))
        job.prepare(resolved)
        with open_run(config, job.command, start, world.is_main) as folder:
            if folder is not None:
                for part, files in images.lists.items():
                    files.save(folder.paths.images(part))
            task = job.make_task(model, optimizer, resolved, plan, folder)
            settings = _settings(job, resolved, plan)
            loop = Loop(task, plan, config, settings, images.train.name, world, folder)
            if start is not None:
                loop.restore(start)
            if world.is_main:
                _announce(job, resolved, plan, count, size, loop.step)
            batches = make_loader(
                job.dataset(resolved), sampler, resolved.workers, device.type == "cuda"
            )
            code = loop.run(iter(batches), signals)
            if code == 0 and folder is not None:
                job.export(folder)
            return code


def _resolve(
    job: Job,
    img_size: tuple[int, int],
    train_images: Source,
    start: SavedCheckpoint | None,
    world: World,
) -> Resolved:
    config = job.config
    if start is None:
        mean, std = resolve_mean_std(config, img_size, train_images, job.named_mean_std())
        if world.is_main:
            images = Preprocessing(img_size, tuple(mean), tuple(std))
            warn_if_far_off(config, images, train_images)
    else:
        mean, std = start.state["settings"]["mean"], start.state["settings"]["std"]
    return Resolved(
        Preprocessing(img_size, tuple(mean), tuple(std)),
        resolve_precision(config.precision, world.device),
        resolve_workers(config.workers, world.device),
        start,
        world,
        config.batch_size // (config.accumulate * world.size),
    )


def _settings(job: Job, resolved: Resolved, plan: Plan) -> dict[str, Any]:
    """The config with everything resolved, as checkpoints record it."""
    return {
        **to_dict(job.config),
        "epochs": plan.epochs,
        "img_size": list(resolved.images.img_size),
        "mean": list(resolved.images.mean),
        "std": list(resolved.images.std),
        "precision": resolved.precision,
        "workers": resolved.workers,
        **job.settings(),
    }


def _announce(job: Job, resolved: Resolved, plan: Plan, count: int, size: int, step: int) -> None:
    """Log what the run will do.

    Args:
        count: training images.
        size: bytes of a checkpoint.
        step: steps that are done.
    """
    if step == plan.total_steps:
        _log.info("the run is finished: nothing is left to do")
        return
    config, world = job.config, resolved.world
    height, width = resolved.images.img_size
    model, *others = job.announcement(resolved, plan)
    lines = [
        f"{model}, on {world.device}, {resolved.precision}, {torch.get_num_threads()} threads, "
        f"{resolved.workers} workers, {world.size} process{'es' if world.size > 1 else ''}",
        f"{plan.total_steps} steps of {config.batch_size} images of {height}×{width}: "
        f"{plan.epochs} epochs over {count}; learning rate {plan.peak:.3g} after {plan.warmup} "
        "steps",
        disk_line(config, size),
        *others,
    ]
    if resolved.precision == "fp32" and world.device.type == "cpu" and cpu_multiplies_bf16():
        lines.append("this CPU multiplies bfloat16: --precision bf16 is faster, see `fcmae bench`")
    if plan.peak < asked_rate(config):
        lines.append(
            f"the learning rate peaks at {plan.peak:.3g} instead of {asked_rate(config):.3g}, "
            f"since {plan.total_steps} steps are too few to warm up; --optim.warmup_epochs sets "
            "the warm-up and keeps the rate"
        )
    if config.epochs == "auto":
        lines.append(job.auto_epochs.explain(plan.epochs))
    if count < config.batch_size:
        _log.warning(
            "%d images are fewer than batch_size %d: each step sees some of them more than once",
            count, config.batch_size,
        )  # fmt: skip
    if step:
        lines.append(f"resuming from step {step}")
    for line in lines:
        _log.info("%s", line)
