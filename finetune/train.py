"""`fcmae finetune`: from labelled images and pretrained weights to a classifier."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fcmae import rng
from fcmae.config.values import height_width
from fcmae.console import show_logs
from fcmae.data.duplicates import report_duplicates, write_duplicates
from fcmae.data.evaluation import EvalDataset, batches_of, collate_labelled
from fcmae.data.labelled import LabelledData, Split, find_labelled, labels_of
from fcmae.data.loader import StepSampler, check_parts, make_loader
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.loop import Loop
from fcmae.train.machine import autocast_dtype, check_disk, checkpoint_bytes, disk_line
from fcmae.train.plan import Plan, Signals, make_plan
from fcmae.train.processes import World, join_world, resolve_device
from fcmae.train.resume import facts, find_start, stored_files
from fcmae.train.run_folder import open_run
from fcmae.weights.read import BEST
from finetune.augment import TrainDataset, recolouring
from finetune.blocks import speed_up
from finetune.config import RUNTIME_KEYS, FinetuneConfig
from finetune.model import (
    Start,
    build_model,
    check_part,
    find_model,
    freeze_backbone,
    init_convnext,
    scale_classifier,
)
from finetune.optim import make_optimizer
from finetune.settings import (
    CROPS,
    FEWEST_EPOCHS,
    MOST_EPOCHS,
    TRAIN_LIST,
    VAL_LIST,
    Settings,
    exported_config,
    head_scale,
    make_mixup,
    resolve_settings,
    settings_json,
)
from finetune.task import FinetuneTask
from sparse.encoder import check_compiler
from sparse.errors import InputError

_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig) -> int:
    """Train a classifier, or go on with the run in `config.out`.

    Returns:
        0 when done, 130 after Ctrl-C and 143 after SIGTERM, both with the state saved.

    Raises:
        InputError: the config, the data, the weights or the folder is wrong; nothing was changed
            then.
        RunError: the run could not go on; the last checkpoint is good.
    """
    show_logs()
    img_size = height_width(config.img_size, multiple=1)
    recolouring(config.augment, img_size, [0.5])
    with join_world(resolve_device(config.device)) as world, Signals() as signals:
        check_parts(config.batch_size, world.size, config.accumulate)
        if config.compile:
            check_compiler()
        start = find_start(config, "finetune", RUNTIME_KEYS)
        origin = _find_model(config, start)
        data = _find_data(config, start)
        settings = resolve_settings(config, img_size, data, origin, world, start)
        plan = make_plan(
            config, settings.steps_per_epoch, settings.epochs, autocast_dtype(settings.precision)
        )
        sampler = StepSampler(
            len(data.train.files), config.batch_size, config.seed,
            start.state["step"] if start else 0, plan.total_steps,
            world.rank, world.size, config.accumulate,
        )  # fmt: skip
        mixup = make_mixup(config, len(data.names), world)
        model, args = _build(config, origin, len(data.names), img_size)
        model = model.to(world.device)
        speed_up(model, config.compile)
        check_part(model, config.batch_size // (config.accumulate * world.size))
        size = checkpoint_bytes(model, copies=1 + (config.ema_decay is not None))
        if sampler.start_step < plan.total_steps:
            check_disk(config, size)
        duplicates = None
        if config.near_duplicates is not None:
            duplicates = report_duplicates(config.near_duplicates, data, config.workers, world)
        optimizer = make_optimizer(model, config.optim)
        # Nobody writes before everybody has checked.
        lists = data.train.files, data.val.files
        world.check_same(facts(config, sampler.start_step, *lists))
        folder = open_run(config, "finetune", start) if world.is_main else None
        try:
            exported = exported_config(config, settings, origin.name, args, model, data.names)
            validation = _validation(config, settings, data, world)
            task = FinetuneTask(
                model, optimizer, config.freeze == "backbone", config.ema_decay,
                settings.mean, settings.std,
                config.augment.label_smoothing, mixup, settings.epochs, settings.val_epochs,
                validation, autocast_dtype(settings.precision),
                len(data.train.files) + len(data.val.files), config.max_bad, exported, world,
                folder,
            )  # fmt: skip
            if config.compile:
                model.compile()  # in place: the average was copied before, and stays as it is
            if folder is not None:
                data.train.files.save(folder.path / TRAIN_LIST)
                data.val.files.save(folder.path / VAL_LIST)
                if duplicates is not None:
                    write_duplicates(duplicates, folder.path / "near_duplicates.jsonl")
            if folder is not None and start is None:
                task.write_best(folder.path / BEST)  # takes away what a run never saved has left
            loop = Loop(
                task, plan, config,
                settings_json(config, settings, origin.name, args, data.names),
                data.train.files.name, world, folder,
            )  # fmt: skip
            if start is not None:
                loop.restore(start)
            if world.is_main:
                _announce(config, settings, plan, data, origin, model, size, world, loop.step)
            code = loop.run(iter(_training(config, settings, data, sampler, world)), signals)
            if code == 0 and folder is not None:
                _finish(task, folder.path)
            return code
        finally:
            if folder is not None:
                folder.close()


def _find_data(config: FinetuneConfig, start: SavedCheckpoint | None) -> LabelledData:
    """The pictures and classes: as stored where a run goes on, whatever is there now."""
    found = None
    try:
        found = find_labelled(config.data, config.val_fraction, exclude=config.out)
    except InputError as error:
        if start is None or not os.path.isdir(os.path.expanduser(config.data)):
            raise
        _log.warning("the run goes on with the pictures that it began with: %s", error)
    data = found if start is None else _stored_data(config, start, found)
    assert data is not None
    train, val = data.train.files, data.val.files
    _log.info(
        "found %d images of %d classes to train on, %d to validate on",
        len(train), len(data.names), len(val),
    )  # fmt: skip
    if len(train) < config.batch_size:
        _log.warning(
            "%d images are fewer than batch_size %d: each step sees some of them more than once",
            len(train), config.batch_size,
        )  # fmt: skip
    return data


def _stored_data(
    config: FinetuneConfig, start: SavedCheckpoint, found: LabelledData | None
) -> LabelledData:
    def stored(name: str, there: Split | None) -> Split:
        files = stored_files(None if there is None else there.files, start, name)
        (root,) = files.roots
        whole = root == os.path.abspath(os.path.expanduser(config.data))
        return Split(files, "" if whole else f"{os.path.basename(root)}/")

    return LabelledData(
        stored(TRAIN_LIST, found and found.train),
        stored(VAL_LIST, found and found.val),
        tuple(start.state["settings"]["label_names"]),
    )


def _find_model(config: FinetuneConfig, start: SavedCheckpoint | None) -> Start:
    """The model and its weights; a run that goes on needs the weights no more."""
    if start is None:
        return find_model(config.model, config.weights, config.in_chans)
    settings = start.state["settings"]
    return Start(settings["model"], settings["model_args"], origin=str(start.path))


def _build(
    config: FinetuneConfig, origin: Start, num_classes: int, img_size: tuple[int, int]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its initial weights: a function of the seed, the same on every process."""
    torch.manual_seed(rng.seed_for(config.seed, rng.FINETUNE, 0, 0))
    model, args = build_model(origin, num_classes, config.in_chans, img_size, config.drop_path)
    if config.weights == "none" and config.init == "fan_in":
        init_convnext(model)
    scale_classifier(model, head_scale(config))
    if config.freeze == "backbone":
        freeze_backbone(model)
    return model, args


def _training(
    config: FinetuneConfig,
    settings: Settings,
    data: LabelledData,
    sampler: StepSampler,
    world: World,
) -> DataLoader[Any]:
    train = data.train
    dataset = TrainDataset(
        train.files, labels_of(train.files, data.names), settings.img_size, config.in_chans,
        config.augment, settings.mean, settings.std, config.seed, config.max_pixels, train.prefix,
    )  # fmt: skip
    pin = world.device.type == "cuda"
    return make_loader(dataset, sampler, settings.workers, pin, collate_labelled)


def _validation(
    config: FinetuneConfig, settings: Settings, data: LabelledData, world: World
) -> DataLoader[Any]:
    val = data.val
    dataset = EvalDataset(
        val.files, labels_of(val.files, data.names), settings.img_size, config.in_chans,
        config.augment.crop_pct, config.augment.interpolation, config.max_pixels, val.prefix,
    )  # fmt: skip
    part = config.batch_size // (config.accumulate * world.size)
    batches = batches_of(len(val.files), part, world.rank, world.size)
    pin = world.device.type == "cuda"
    return make_loader(dataset, batches, settings.workers, pin, collate_labelled)


def _announce(
    config: FinetuneConfig,
    settings: Settings,
    plan: Plan,
    data: LabelledData,
    origin: Start,
    model: nn.Module,
    size: int,
    world: World,
    step: int,
) -> None:
    """Say what the run will do."""
    if step == plan.total_steps:
        _log.info("the run is finished: nothing is left to do")
        return
    everything = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    share = "" if config.freeze == "none" else f", of which the head is trained ({trained:.3g} M)"
    lines = [
        f"{origin.name} from {origin.origin}: {everything:.1f} M weights{share}, on "
        f"{world.device}, {settings.precision}, {torch.get_num_threads()} threads, "
        f"{settings.workers} workers, {world.size} process{'es' if world.size > 1 else ''}",
        f"{plan.total_steps} steps of {config.batch_size} images of {settings.img_size[0]}×"
        f"{settings.img_size[1]}: {settings.epochs} epochs over {len(data.train.files)}; learning "
        f"rate {plan.peak:.3g} after {plan.warmup} steps, layer decay "
        f"{config.optim.layer_decay:g}",
        disk_line(config, size),
    ]
    if config.epochs == "auto":
        lines.append(
            f"epochs auto: {settings.epochs}, the more the fewer images there are "
            f"({FEWEST_EPOCHS} to {MOST_EPOCHS}, about {CROPS:,} crops in all)"
        )
    recoloured = config.augment.color_jitter or config.augment.randaugment
    if recoloured and config.in_chans not in (1, 3):
        lines.append("randaugment and color_jitter need 1 or 3 channels and are not used")
    if origin.images is not None and origin.images.img_size != settings.img_size:
        height, width = origin.images.img_size
        lines.append(
            f"the weights saw images of {height}×{width}: --img_size '[{height},{width}]' is theirs"
        )
    if step:
        lines.append(f"going on from step {step}")
    for line in lines:
        _log.info("%s", line)


def _finish(task: FinetuneTask, out: Path) -> None:
    task.write_best(out / "exported")
    best = task.best_score
    if best is not None:
        _log.info(
            "best after epoch %d: top-1 %.1f %%, top-5 %.1f %%; the model for timm is in %s",
            best["epoch"], best["top1"], best["top5"], out / "exported",
        )  # fmt: skip
