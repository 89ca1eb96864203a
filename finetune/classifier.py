"""A trained classifier back from its folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.train.run_paths import RunPaths
from fcmae.weights.load import read_preprocessing
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
    name: Any = config.get("architecture")
    args = config.get("model_args", {})
    names: Any = config.get("label_names", config.get("pretrained_cfg", {}).get("label_names"))
    described = isinstance(name, str) and isinstance(args, dict) and isinstance(names, list)
    if not described or len(names) != config["num_classes"]:
        raise InputError(
            f"{folder / CONFIG_FILE} must name timm's model as its architecture and its "
            f"{config['num_classes']} classes as label_names: give a folder that `fcmae finetune` "
            "exported"
        )
    images = read_preprocessing(folder / WEIGHTS_FILE) or default_preprocessing(3)
    images = replace(images, img_size=img_size or images.img_size)
    state, _ = read_state(folder / WEIGHTS_FILE)
    start = Start(timm_name(name), args, state, str(folder), whole=True)
    model, _ = build_model(start, len(names), len(images.mean), images.img_size)
    model = model.to(device).eval()
    speed_up(model)
    return Classifier(model, tuple(map(str, names)), images, folder)


def weights_folder(source: str) -> Path:
    """Return the timm folder with a classifier that `source` stands for.

    A run stands for its best weights, a folder or its model.safetensors for itself.

    Raises:
        InputError: nothing there, or nothing with a classifier.
    """
    path = Path(source)
    path = path.parent if path.name == WEIGHTS_FILE else path
    run = RunPaths(path)
    for folder in (run.best, run.exported, path):
        config = read_json(folder / CONFIG_FILE)
        if config.get("num_classes") and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise InputError(
        f"{source!r} holds no classifier: give a run of `fcmae finetune` after its first epoch, "
        f"its exported folder, or a {WEIGHTS_FILE} with its {CONFIG_FILE} beside it"
    )
