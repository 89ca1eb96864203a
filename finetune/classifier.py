"""A trained classifier back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.train.checkpoint import first_difference
from fcmae.train.run_paths import RunPaths
from fcmae.weights.read import CONFIG_FILE, WEIGHTS_FILE, read_json, read_state
from finetune.blocks import speed_up
from finetune.model import Start, build_model, timm_name
from sparse.errors import InputError


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode, its classes in order, how it wants images, and its folder."""

    model: nn.Module
    names: tuple[str, ...]
    images: Preprocessing
    folder: Path


def load_classifier(
    source: str, device: torch.device, img_size: tuple[int, int] | None = None
) -> Classifier:
    """Load the classifier that `source` stands for: see `weights_folder`.

    Args:
        source: a run, a folder or a weight file.
        device: where the model will be.
        img_size: (height, width); None takes what the model was trained with.

    Raises:
        InputError: nothing there, damaged, or it can't take images of this size.
    """
    folder = weights_folder(source)
    config = read_json(folder / CONFIG_FILE)
    given: dict[str, Any] = config.get("pretrained_cfg", config)
    names = config.get("label_names", given.get("label_names"))
    if not isinstance(names, list) or len(names) != config["num_classes"]:
        raise InputError(
            f"{folder / CONFIG_FILE} must name its {config['num_classes']} classes as label_names: "
            "give a folder that `fcmae finetune` exported"
        )
    name, args = config.get("architecture"), config.get("model_args", {})
    if not isinstance(name, str) or not isinstance(args, dict):
        raise InputError(
            f"{folder / CONFIG_FILE} must name timm's model as its architecture: give a folder "
            "that `fcmae finetune` exported"
        )
    channels, height, width = given.get("input_size", (3, 224, 224))
    defaults = default_preprocessing(channels)
    images = Preprocessing(
        img_size or (height, width),
        tuple(given.get("mean", defaults.mean)),
        tuple(given.get("std", defaults.std)),
        given.get("crop_pct", defaults.crop_pct),
        given.get("interpolation", defaults.interpolation),
    )
    start = Start(timm_name(name), args, origin=str(folder))
    try:
        model, _ = build_model(start, len(names), channels, images.img_size)
    except TypeError as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: model_args {args} do not suit {name} ({error})"
        ) from error
    state, _ = read_state(folder / WEIGHTS_FILE)
    _load_all(model, state, folder)
    model = model.to(device).eval()
    speed_up(model)
    return Classifier(model, tuple(map(str, names)), images, folder)


def _load_all(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    difference = first_difference(state, model.state_dict())
    if difference is not None:
        name, there, here = difference
        raise InputError(
            f"{folder}: {name} is {there} in {WEIGHTS_FILE} and {here} in the model that "
            f"{CONFIG_FILE} describes: take both from one export, and leave img_size out"
        )
    model.load_state_dict(state)


def weights_folder(source: str) -> Path:
    """Return the timm folder with a classifier that `source` stands for.

    A run stands for its best weights, a folder or its model.safetensors for itself.

    Raises:
        InputError: nothing there, or nothing with a classifier.
    """
    path = Path(source)
    if path.is_file() and path.name != WEIGHTS_FILE:
        raise InputError(
            f"{source!r} is not a {WEIGHTS_FILE} with its {CONFIG_FILE} beside it: give the folder "
            "of both"
        )
    path = path.parent if path.is_file() else path
    run = RunPaths(path)
    for folder in (run.best, run.exported, path):
        config = read_json(folder / CONFIG_FILE)
        if config.get("num_classes") and (folder / WEIGHTS_FILE).is_file():
            return folder
    if run.config.exists() or (path / CONFIG_FILE).exists():
        raise InputError(
            f"{source!r} has no weights with a classifier: give a run of `fcmae finetune` after "
            "its first epoch, or its exported folder"
        )
    raise InputError(f"{source!r} holds no run and no weights: give a run of `fcmae finetune`")
