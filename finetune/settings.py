"""Fine-tuning's settings: what a config leaves open, decided from the data, weights and machine."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from timm.data.mixup import Mixup
from torch import nn

from fcmae.config.values import to_dict
from fcmae.data.labelled import LabelledData, Split
from fcmae.data.loader import measure_mean_std, steps_per_epoch, warn_if_far_off
from fcmae.data.statistics import MeanStd, imagenet_mean_std, resolve_mean_std
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.machine import resolve_precision, resolve_workers
from fcmae.train.processes import World
from fcmae.weights.export import timm_config
from fcmae.weights.read import Preprocessing
from finetune.config import FinetuneConfig
from finetune.model import Start, classifier_names
from sparse.errors import InputError

TRAIN_LIST, VAL_LIST = "files-train.bin", "files-val.bin"
"""Where a run keeps which pictures it trains on and which it validates on."""

HEAD_SCALE = 0.001
"""What `head_init_scale: null` takes with pretrained weights (P Tables 9 to 11)."""

FEWEST_EPOCHS, MOST_EPOCHS = 20, 200
"""What `epochs: auto` stays within."""

CROPS = 60_000
"""Training crops that `epochs: auto` makes up, between these."""

MEASUREMENTS = 30
"""On the validation images, with `val_epochs: auto`."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The config with everything that was left open resolved."""

    img_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    precision: str
    workers: int
    steps_per_epoch: int
    epochs: int
    val_epochs: int


def resolve_settings(
    config: FinetuneConfig,
    img_size: tuple[int, int],
    data: LabelledData,
    origin: Start,
    world: World,
    start: SavedCheckpoint | None,
) -> Settings:
    """Resolve a config; where a run goes on, mean and std are as it began."""
    per_epoch = steps_per_epoch(len(data.train.files), config.batch_size)
    mean, std = _mean_std(config, img_size, data.train, origin, start)
    if start is None and world.is_main:
        warn_if_far_off(
            data.train.files, img_size, config.in_chans, mean, std, config.seed, config.max_pixels
        )
    epochs, val_epochs = resolve_epochs(config, len(data.train.files))
    return Settings(
        img_size=img_size,
        mean=mean,
        std=std,
        precision=resolve_precision(config.precision, world.device),
        workers=resolve_workers(config.workers, world.device),
        steps_per_epoch=per_epoch,
        epochs=epochs,
        val_epochs=val_epochs,
    )


def resolve_epochs(config: FinetuneConfig, images: int) -> tuple[int, int]:
    """Epochs, and those between two measurements, where they are `auto`."""
    suits = min(max(math.ceil(CROPS / images), FEWEST_EPOCHS), MOST_EPOCHS)
    epochs = suits if config.epochs == "auto" else int(config.epochs)
    seldom = math.ceil(epochs / MEASUREMENTS)
    val_epochs = seldom if config.val_epochs == "auto" else int(config.val_epochs)
    return epochs, val_epochs


def _mean_std(
    config: FinetuneConfig,
    img_size: tuple[int, int],
    train: Split,
    origin: Start,
    start: SavedCheckpoint | None,
) -> MeanStd:
    if start is not None:
        return start.state["settings"]["mean"], start.state["settings"]["std"]

    def of_weights() -> MeanStd:
        images = origin.images
        if images is None or len(images.mean) != config.in_chans:
            return imagenet_mean_std(config.in_chans)
        return list(images.mean), list(images.std)

    def measure() -> MeanStd:
        measured = measure_mean_std(
            train.files, img_size, config.in_chans, seed=config.seed, max_pixels=config.max_pixels
        )
        _log.info("measured mean %s and std %s", *([round(v, 4) for v in m] for m in measured))
        return measured

    sources = {
        "weights": of_weights,
        "imagenet": lambda: imagenet_mean_std(config.in_chans),
        "data": measure,
    }
    return resolve_mean_std(config.augment.mean, config.augment.std, sources)


def make_mixup(config: FinetuneConfig, num_classes: int, world: World) -> Mixup | None:
    """timm's mixup and cutmix, or None where both are off.

    Raises:
        InputError: a part of a batch is odd, so that its images don't make pairs.
    """
    augment = config.augment
    if not augment.mixup and not augment.cutmix:
        return None
    part = config.batch_size // (config.accumulate * world.size)
    if part % 2:
        raise InputError(
            f"batch_size {config.batch_size} makes parts of {part} images, but mixup and cutmix "
            f"pair them: take {(part + 1) * config.accumulate * world.size}"
        )
    return Mixup(
        augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )  # fmt: skip


def head_scale(config: FinetuneConfig) -> float:
    """The factor on the head's initial weights."""
    if config.head_init_scale is not None:
        return config.head_init_scale
    return 1.0 if config.weights == "none" else HEAD_SCALE


def settings_json(
    config: FinetuneConfig,
    settings: Settings,
    name: str,
    args: dict[str, Any],
    label_names: tuple[str, ...],
) -> dict[str, Any]:
    """The resolved settings as checkpoints record them."""
    return {
        **to_dict(config),
        "img_size": list(settings.img_size),
        "mean": settings.mean,
        "std": settings.std,
        "model": name,
        "model_args": args,
        "label_names": list(label_names),
        "epochs": settings.epochs,
        "precision": settings.precision,
        "workers": settings.workers,
    }


def exported_config(
    config: FinetuneConfig,
    settings: Settings,
    name: str,
    args: dict[str, Any],
    model: nn.Module,
    label_names: tuple[str, ...],
) -> dict[str, Any]:
    """The config.json of the model that the run exports."""
    own: Any = model.pretrained_cfg
    classifier = classifier_names(model)
    features: Any = model.num_features
    return timm_config(
        name,
        args,
        int(features),
        Preprocessing(settings.img_size, tuple(settings.mean), tuple(settings.std)),
        label_names,
        classifier[0] if len(classifier) == 1 else list(classifier),
        own.get("first_conv"),
        config.augment.crop_pct,
        config.augment.interpolation,
    )
