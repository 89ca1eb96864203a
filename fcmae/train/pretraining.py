"""`fcmae pretrain`: from a folder of images to a pretrained encoder."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fcmae import rng
from fcmae.config.pretraining import RUNTIME_KEYS, PretrainConfig
from fcmae.config.values import height_width, to_dict
from fcmae.console import show_logs
from fcmae.data.files import FEWEST_TO_HOLD_OUT, FileList, find_images
from fcmae.data.labelled import LabelledData, find_labelled
from fcmae.data.loader import (
    PretrainDataset,
    StepSampler,
    check_parts,
    make_loader,
    measure_mean_std,
    steps_per_epoch,
    warn_if_far_off,
)
from fcmae.data.statistics import MeanStd, imagenet_mean_std, resolve_mean_std
from fcmae.inspect.watch import make_watchers
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import check_mask_ratio, grid_of, keep_count
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.loop import Loop
from fcmae.train.machine import (
    autocast_dtype,
    check_disk,
    checkpoint_bytes,
    cpu_multiplies_bf16,
    disk_line,
    resolve_precision,
    resolve_workers,
)
from fcmae.train.optimizer import decay_groups
from fcmae.train.plan import (
    FEWEST_EPOCHS,
    IMAGES_SEEN,
    MOST_EPOCHS,
    Plan,
    Signals,
    make_plan,
    pretraining_epochs,
)
from fcmae.train.processes import World, join_world, resolve_device
from fcmae.train.resume import facts, find_start, stored_files
from fcmae.train.run_folder import open_run
from fcmae.train.task import PretrainTask, Settings
from fcmae.weights.export import export_folder
from fcmae.weights.read import init_encoder
from sparse import SparseConvNeXtV2
from sparse.convert import infer_architecture
from sparse.encoder import init_fan_in
from sparse.engines import get_engine
from sparse.errors import InputError
from sparse.sizes import resolve_size

FILE_LIST = "files.bin"
FEW_IMAGES = 10_000

_log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> int:
    """Pretrain, or go on with the run in `config.out`.

    Returns:
        0 when done, 130 after Ctrl-C and 143 after SIGTERM, both with the state saved.

    Raises:
        InputError: the config, the data or the folder is wrong; nothing was changed then.
        RunError: the run could not go on; the last checkpoint is good.
    """
    show_logs()
    img_size = height_width(config.img_size)
    check_mask_ratio(config.mask_ratio, grid_of(img_size))
    resolve_size(config.model, config.depths, config.dims)
    device = resolve_device(config.device)
    get_engine(config.engine, device.type, compiled=config.compile)
    with join_world(device) as world, Signals() as signals:
        check_parts(config.batch_size, world.size, config.accumulate)
        start = find_start(config, "pretrain", RUNTIME_KEYS)
        files, train, held = _find_files(config, start)
        labelled = _find_labelled(config)
        settings = _resolve(config, img_size, train, world, start)
        per_epoch = steps_per_epoch(len(train), config.batch_size)
        epochs = pretraining_epochs(config.epochs, len(train))
        plan = make_plan(config, per_epoch, epochs, autocast_dtype(settings.precision))
        sampler = StepSampler(
            len(train), config.batch_size, config.seed, start.state["step"] if start else 0,
            plan.total_steps, world.rank, world.size, config.accumulate,
        )  # fmt: skip
        # A run that goes on needs no more what it started from.
        fresh = config if start is None else replace(config, init_from=None)
        model = build_model(fresh).to(device)
        if sampler.start_step < plan.total_steps:
            check_disk(config, checkpoint_bytes(model))
        probed = [] if labelled is None else [labelled.train.files, labelled.val.files]
        # Nobody writes before everybody has checked.
        world.check_same(facts(config, sampler.start_step, files, *probed))
        folder = open_run(config, "pretrain", start) if world.is_main else None
        try:
            if folder is not None:
                files.save(folder.path / FILE_LIST)
            watchers = make_watchers(config, settings, held, labelled, world, folder)
            task = PretrainTask(
                model, _optimizer(config, model), settings, watchers, len(files), epochs
            )
            loop = Loop(
                task,
                plan,
                config,
                _as_json(config, settings, plan, model, device),
                train.name,
                world,
                folder,
            )
            if start is not None:
                loop.restore(start)
            if world.is_main:
                _announce(config, settings, plan, model, len(train), len(held), world, loop.step)
            dataset = PretrainDataset(
                train, img_size, config.in_chans, config.mask_ratio, config.augment.crop_scale,
                config.augment.crop_ratio, config.augment.hflip, config.augment.vflip, config.seed,
                config.max_pixels, config.augment.fast_decode,
            )  # fmt: skip
            batches = make_loader(dataset, sampler, settings.workers, device.type == "cuda")
            code = loop.run(iter(batches), signals)
            if code == 0 and folder is not None:
                _export(folder.path, model, settings)
            return code
        finally:
            if folder is not None:
                folder.close()


def _find_files(
    config: PretrainConfig, start: SavedCheckpoint | None
) -> tuple[FileList, FileList, FileList]:
    """All files, those to train on and those held out: as stored where a run goes on."""
    began = time.perf_counter()
    files = find_images(config.data, exclude=config.out)
    if start is not None:
        files = stored_files(files, start, FILE_LIST)
    train, held = files.split_holdout(config.holdout)
    if config.holdout >= len(files) >= FEWEST_TO_HOLD_OUT:
        raise InputError(
            f"holdout {config.holdout} leaves none of the {len(files)} images to train on: take "
            "fewer, such as 32"
        )
    _log.info(
        "found %d images in %.1f s: %d to train on, %d held out",
        len(files), time.perf_counter() - began, len(train), len(held),
    )  # fmt: skip
    if len(train) < config.batch_size:
        _log.warning(
            "%d images are fewer than batch_size %d: each step sees some of them more than once",
            len(train), config.batch_size,
        )  # fmt: skip
    return files, files.select(train), files.select(held)


def _resolve(
    config: PretrainConfig,
    img_size: tuple[int, int],
    train: FileList,
    world: World,
    start: SavedCheckpoint | None,
) -> Settings:
    mean, std = _mean_std(config, img_size, train, start)
    if start is None and world.is_main:
        warn_if_far_off(train, img_size, config.in_chans, mean, std, config.seed, config.max_pixels)
    return Settings(
        img_size=img_size,
        mean=mean,
        std=std,
        precision=resolve_precision(config.precision, world.device),
        workers=resolve_workers(config.workers, world.device),
    )


def _mean_std(
    config: PretrainConfig,
    img_size: tuple[int, int],
    train: FileList,
    start: SavedCheckpoint | None,
) -> MeanStd:
    if start is not None:
        return start.state["settings"]["mean"], start.state["settings"]["std"]

    def measure() -> MeanStd:
        measured = measure_mean_std(
            train, img_size, config.in_chans, seed=config.seed, max_pixels=config.max_pixels
        )
        _log.info("measured mean %s and std %s", *([round(v, 4) for v in m] for m in measured))
        return measured

    sources = {"imagenet": lambda: imagenet_mean_std(config.in_chans), "data": measure}
    return resolve_mean_std(config.augment.mean, config.augment.std, sources)


def _find_labelled(config: PretrainConfig) -> LabelledData | None:
    """What `probe.data` names to measure features on."""
    if config.probe.data is None:
        return None
    return find_labelled(config.probe.data, config.probe.val_fraction, exclude=config.out)


def build_model(config: PretrainConfig) -> FCMAE:
    """The model with its initial weights: a function of the seed, the same on every process."""
    torch.manual_seed(rng.seed_for(config.seed, rng.MODEL, 0, 0))
    encoder = SparseConvNeXtV2.from_size(
        config.model, config.depths, config.dims, in_chans=config.in_chans, engine=config.engine,
        drop_path=config.drop_path, use_grn=config.use_grn, layer_scale=config.layer_scale,
        recompute=config.recompute,
    )  # fmt: skip
    if config.init == "fan_in":
        init_fan_in(encoder)
    if config.init_from is not None:
        init_encoder(encoder, config.init_from)
    if config.compile:
        encoder.compile_encode()
    return FCMAE(
        encoder, config.decoder.dim, config.decoder.depth, config.mask_ratio, config.norm_pix_loss
    )


def _optimizer(config: PretrainConfig, model: FCMAE) -> torch.optim.Optimizer:
    groups = decay_groups(model.named_parameters(), config.optim.weight_decay)
    betas = (config.optim.betas[0], config.optim.betas[1])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def _as_json(
    config: PretrainConfig, settings: Settings, plan: Plan, model: FCMAE, device: torch.device
) -> dict[str, Any]:
    return {
        **to_dict(config),
        "epochs": plan.epochs,
        "img_size": list(settings.img_size),
        "mean": settings.mean,
        "std": settings.std,
        "depths": list(model.encoder.depths),
        "dims": list(model.encoder.dims),
        "engine": model.encoder.engine_on(device).name,
        "precision": settings.precision,
        "workers": settings.workers,
    }


def _announce(
    config: PretrainConfig, settings: Settings, plan: Plan, model: FCMAE, images: int, held: int,
    world: World, step: int,
) -> None:  # fmt: skip
    """Say what the run will do."""
    if step == plan.total_steps:
        _log.info("the run is finished: nothing is left to do")
        return
    named = config.depths is None and config.dims is None
    encoder = model.encoder
    name = config.model if named else f"of depths {encoder.depths} and dims {encoder.dims}"
    h, w = grid_of(settings.img_size)
    visible = keep_count(h * w, config.mask_ratio)
    millions = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    lines = [
        f"encoder {name}: {millions:.3g} M weights, engine "
        f"{encoder.engine_on(world.device).name} on {world.device}, {settings.precision}, "
        f"{torch.get_num_threads()} threads, {settings.workers} workers, "
        f"{world.size} process{'es' if world.size > 1 else ''}",
        f"images {settings.img_size[0]}×{settings.img_size[1]}: {visible} of {h * w} patches "
        "visible, the others to reconstruct",
        f"{plan.total_steps} steps of {config.batch_size} images: {plan.epochs} epochs over "
        f"{images}; learning rate {plan.peak:.3g} after {plan.warmup} steps",
        disk_line(config, checkpoint_bytes(model)),
    ]
    if settings.precision == "fp32" and world.device.type == "cpu" and cpu_multiplies_bf16():
        lines.append("this CPU multiplies bfloat16: --precision bf16 is faster, see `fcmae bench`")
    if config.epochs == "auto":
        lines.append(
            f"epochs auto: {plan.epochs}, since few images want many passes and many want few "
            f"({FEWEST_EPOCHS} to {MOST_EPOCHS}, about {IMAGES_SEEN / 1e6:g} million crops in all)"
        )
    if (
        images < FEW_IMAGES
        and config.init_from is None
        and config.in_chans == 3
        and named
        and not step
    ):
        lines.append(
            f"under {FEW_IMAGES:,} images, an official release is most likely the better start: "
            "--init_from FILE (CC-BY-NC 4.0: no commercial use), see docs/recipes.md"
        )
    if config.norm_pix_loss:
        lines.append("a loss of 1.0 means that only each patch's mean is predicted")
    if not held:
        lines.append(
            "no images are held out (holdout 0, or under 500 in all): no held-out loss, no pictures"
        )
    if step:
        lines.append(f"going on from step {step}")
    for line in lines:
        _log.info("%s", line)


def _export(out: Path, model: FCMAE, settings: Settings) -> None:
    state = {name: tensor.detach().cpu() for name, tensor in model.encoder.state_dict().items()}
    folder = export_folder(
        state, infer_architecture(state), out / "exported", settings.img_size, settings.mean,
        settings.std,
    )  # fmt: skip
    _log.info("the model for timm is in %s", folder)
