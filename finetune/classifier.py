"""A trained classifier back from its folder, and what it says about pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.config.values import MAX_PIXELS
from fcmae.data.evaluation import EvalDataset, LabelledBatch, batches_of, each_batch
from fcmae.data.files import FileList
from fcmae.data.labelled import Labels
from fcmae.train.checkpoint import first_difference
from fcmae.train.machine import resolve_workers
from fcmae.weights.export import CROP_PCT, default_preprocessing
from fcmae.weights.read import BEST, CONFIG_FILE, WEIGHTS_FILE, read_json, read_state
from finetune.blocks import speed_up
from finetune.model import Start, build_model, timm_name
from sparse.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode, its classes in order, and how it wants images."""

    model: nn.Module
    names: tuple[str, ...]
    folder: Path
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    device: torch.device

    @torch.no_grad()
    def classify(
        self,
        files: FileList,
        labels: Labels | None,
        batch_size: int,
        workers: str | int,
        prefix: str = "",
    ) -> Iterator[tuple[LabelledBatch, Tensor]]:
        """Yield batches of pictures with their scores before softmax (B, classes), on the CPU.

        Files that can't be read are left out, and named in the batches' `bad`.

        Raises:
            RunError: a process that reads pictures died.
        """
        dataset = EvalDataset(
            files, labels, self.img_size, len(self.mean), self.crop_pct, self.interpolation,
            MAX_PIXELS, prefix,
        )  # fmt: skip
        batches = batches_of(len(files), batch_size)
        processes = resolve_workers(workers, self.device)
        for batch, images in each_batch(
            dataset, batches, processes, self.mean, self.std, self.device
        ):
            scores = self.model(images) if len(batch) else torch.empty(0, len(self.names))
            yield batch, scores.cpu()


def load_classifier(
    source: str, device: torch.device, img_size: tuple[int, int] | None = None
) -> Classifier:
    """Load the classifier that `source` stands for: see `weights_folder`.

    Args:
        img_size: (height, width); None takes what the model was trained with.

    Raises:
        InputError: nothing there, damaged, or it can't take images of this size.
    """
    folder = weights_folder(source)
    config = read_json(folder / CONFIG_FILE)
    images: dict[str, Any] = config.get("pretrained_cfg", config)
    names = config.get("label_names", images.get("label_names"))
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
    channels, height, width = images.get("input_size", (3, 224, 224))
    defaults = default_preprocessing(channels)
    size = img_size or (height, width)
    start = Start(timm_name(name), args, origin=str(folder))
    try:
        model, _ = build_model(start, len(names), channels, size)
    except TypeError as error:
        raise InputError(
            f"{folder / CONFIG_FILE}: model_args {args} do not suit {name} ({error})"
        ) from error
    state, _ = read_state(folder / WEIGHTS_FILE)
    _load_all(model, state, folder)
    model = model.to(device).eval()
    speed_up(model)
    return Classifier(
        model,
        tuple(map(str, names)),
        folder,
        size,
        tuple(images.get("mean", defaults.mean)),
        tuple(images.get("std", defaults.std)),
        images.get("crop_pct", CROP_PCT),
        images.get("interpolation", "bicubic"),
        device,
    )


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
            f"{source!r} is no {WEIGHTS_FILE} with its {CONFIG_FILE} beside it: give the folder "
            "of both"
        )
    path = path.parent if path.is_file() else path
    for folder in (path / BEST, path / "exported", path):
        config = read_json(folder / CONFIG_FILE)
        if config.get("num_classes") and (folder / WEIGHTS_FILE).is_file():
            return folder
    if (path / "config.yaml").exists() or (path / CONFIG_FILE).exists():
        raise InputError(
            f"{source!r} has no weights with a classifier: give a run of `fcmae finetune` after "
            "its first epoch, or its exported folder"
        )
    raise InputError(f"{source!r} holds no run and no weights: give a run of `fcmae finetune`")
