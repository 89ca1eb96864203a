"""The script that every kind of training runs, from a config to an exported model.

The kinds differ in their `Task`: the images, the model, the loss, what is measured between epochs,
and what is exported at the end.
"""

import logging
import signal
from contextlib import closing, nullcontext

import torch

from fcmae.atomic import atomic_write
from fcmae.config.files import save_yaml
from fcmae.console import show_logs, step_progress
from fcmae.data.loader import make_loader
from fcmae.data.order import StepSampler, check_parts
from fcmae.data.remote import use_cache
from fcmae.data.statistics import (
    Preprocessing,
    resolve_preprocessing,
    stored_reading,
)
from fcmae.data.survey import survey
from fcmae.train import machine
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.loop import Loop
from fcmae.train.optimizer import make_optimizer
from fcmae.train.plan import asked_rate, make_plan
from fcmae.train.processes import World, join_world, resolve_device
from fcmae.train.resume import agree_on_start, shared_values
from fcmae.train.run_folder import RunFolder
from fcmae.train.signals import Signals
from fcmae.train.task import Resolved, Task
from fcmae.train.trackers import check_trackers

_log = logging.getLogger(__name__)


def train(task: Task) -> int:
    """Train, or resume the run in `config.out`.

    Returns:
        0 when done, 130 after Ctrl-C and 143 after SIGTERM, both with the state saved.

    Raises:
        InputError: the config, the data, the weights or the folder is wrong; nothing was changed.
        RunError: the run could not continue; the last checkpoint is good.
    """
    show_logs()
    config = task.config
    device = resolve_device(config.device)
    img_size = task.check(device)
    check_trackers(config.trackers)
    use_cache(config.cache, config.cache_gb)
    stop_signals = Signals().catch(signal.SIGTERM, signal.SIGUSR1)
    with join_world(device) as world, stop_signals as signals:
        check_parts(config.batch_size, world.size, config.accumulate)
        start = agree_on_start(config, task.command, world)
        found = world.prepare(lambda: _prepare(task, img_size, start, world))
        images, resolved = task.images, task.resolved
        plan, step = resolved.plan, start.state["step"] if start else 0
        # No process writes, or waits for the others, before all have checked.
        world.check_same(shared_values(config, *images.lists.values(), *images.others))
        sampler = StepSampler(
            len(images.train), config.batch_size, config.seed, step, plan.total_steps,
            world.rank, world.size, config.accumulate,
        )  # fmt: skip
        opened = RunFolder(config, start) if world.is_main else None
        with closing(opened) if opened else nullcontext() as folder:
            task.folder = folder
            if folder is not None:
                save_yaml(config, folder.paths.config)
                for part, source in images.lists.items():
                    with atomic_write(folder.paths.images(part)) as path:
                        source.save(path)
            task.begin()
            loop = Loop(task)
            if start is not None:
                loop.restore(start)
            if world.is_main:
                _announce(task, found, loop.step)
            batches = make_loader(
                task.dataset(), sampler, resolved.workers, device.type == "cuda", task.lay_out()
            )
            with step_progress(plan.total_steps, step, plan.epochs, folder is None) as progress:
                code = loop.run(iter(batches), signals, progress)
            if code == 0 and folder is not None:
                task.export(folder)
            return code


def _prepare(
    task: Task, img_size: tuple[int, int], start: SavedCheckpoint | None, world: World
) -> list[str]:
    """Find the images and build the model; return lines on the images and on the disk space of
    checkpoints."""
    task.images = task.find_images(start)
    task.resolved = _resolve(task, img_size, start, world)
    found, config = list[str](), task.config
    if start is None and world.is_main:
        images = task.resolved.images
        sample = survey(task.images.looked_at, images, config.seed, config.max_pixels)
        sample.warn_if_far_off(images)
        found += sample.lines()
    task.model = task.build_model()
    if start is None or start.state["step"] < task.resolved.plan.total_steps:
        found.append(machine.check_disk(config, task.model, task.weight_copies))
    task.optimizer = make_optimizer(task.model, config.optim, task.layer_depths())
    return found


def _resolve(
    task: Task, img_size: tuple[int, int], start: SavedCheckpoint | None, world: World
) -> Resolved:
    config, train_images = task.config, task.images.train
    if start is None:
        looked_at, named = task.images.looked_at, task.named_mean_std()
        images = resolve_preprocessing(config, img_size, looked_at, named)
    else:
        known = start.state["settings"]
        mean, std = tuple(known["mean"]), tuple(known["std"])
        images = Preprocessing(img_size, mean, std, **stored_reading(known))
    epochs = task.auto_epochs.resolve(config.epochs, len(train_images))
    return Resolved(
        images=images,
        plan=make_plan(config, len(train_images), epochs, task.least_warmup),
        precision=machine.resolve_precision(config.precision, world.device),
        workers=machine.resolve_workers(config.workers, world.device),
        part=config.batch_size // (config.accumulate * world.size),
        start=start,
        world=world,
    )


def _announce(task: Task, found: list[str], step: int) -> None:
    """Log what the run will do.

    Args:
        task: ready to be trained.
        found: lines on the images and on the disk space of checkpoints.
        step: completed steps.
    """
    config, resolved, count = task.config, task.resolved, len(task.images.train)
    plan, world, precision = resolved.plan, resolved.world, resolved.precision
    if step == plan.total_steps:
        _log.info("the run is finished: nothing to do")
        return
    h, w = resolved.images.img_size
    model, *others = task.announcement()
    lines = [
        f"{model}, on {world.device}, {precision}, {torch.get_num_threads()} threads, "
        f"{resolved.workers} workers, {world.size} process{'es' if world.size > 1 else ''}",
        f"{plan.total_steps} steps of {config.batch_size} images of {h}×{w}: {plan.epochs} "
        f"epochs over {count}; learning rate {plan.peak:.3g} after {plan.warmup} steps of warm-up",
        *found,
        *others,
    ]
    if (precision, world.device.type) == ("fp32", "cpu") and machine.cpu_multiplies_bf16():
        lines.append("this CPU multiplies bfloat16: --precision bf16 is faster, see `fcmae bench`")
    if plan.peak < asked_rate(config):
        lines.append(
            f"the learning rate peaks at {plan.peak:.3g}, not {asked_rate(config):.3g}, as the run "
            "is too short to warm up; setting --optim.warmup_epochs keeps the rate"
        )
    if config.epochs == "auto":
        lines.append(task.auto_epochs.explain(plan.epochs))
    if count < config.batch_size:
        _log.warning(f"{count} images are fewer than batch_size {config.batch_size}: some repeat")
    if step:
        lines.append(f"resuming from step {step}")
    for line in lines:
        _log.info("%s", line)
