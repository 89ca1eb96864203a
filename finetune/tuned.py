"""Models that fine-tuning trained, with the kind of label that they predict."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.train.run_paths import WHOLE_MODEL
from fcmae.weights.load import find_weights, read_preprocessing
from fcmae.weights.read import CONFIG_FILE, read_json, read_state
from finetune.blocks import speed_up
from finetune.model import Start, timm_name
from finetune.tasks import TASKS
from finetune.tasks.base import LabelKind
from sparse.errors import InputError

TASK, STATE = "task", "task_state"
"""Keys of a timm folder's config.json: the name of the kind of label, and its state."""


@dataclass(frozen=True)
class Tuned:
    """A model in evaluation mode, the kind of label that it predicts, its preprocessing, and the
    folder that fine-tuning wrote."""

    model: nn.Module
    kind: LabelKind
    images: Preprocessing
    folder: Path


def load_tuned(
    source: str,
    device: torch.device,
    img_size: tuple[int, int] | None = None,
    fast: bool = True,
) -> Tuned:
    """Load a model that fine-tuning trained.

    Args:
        source: see `find_weights`.
        device: where the model will be.
        img_size: (height, width); None takes what the model was trained with.
        fast: whether its blocks may be computed by `finetune.blocks`, else as timm does.

    Raises:
        InputError: missing, damaged, or unable to take images of this size.
    """
    file = find_weights(source)
    folder, whole = file.parent, file.parent / WHOLE_MODEL / file.name
    file = whole if whole.is_file() else file
    config = read_json(file.with_name(CONFIG_FILE))
    name: Any = config.get("architecture")
    args, state = config.get("model_args", {}), config.get(STATE, {})
    names: Any = config.get("label_names", config.get("pretrained_cfg", {}).get("label_names"))
    described = isinstance(name, str) and isinstance(args, dict) and isinstance(names, list)
    if not described or not 0 < len(names) == config.get("num_classes"):
        raise InputError(
            f"{file} is not a fine-tuned model: its {CONFIG_FILE} must name timm's model as its "
            "architecture and all outputs as label_names: give a run of `fcmae finetune` after its "
            "first epoch, or its exported folder"
        )
    task = config.get(TASK, "classify")
    if task not in TASKS or not isinstance(state, dict):
        raise InputError(f"{file} is of task {task!r}, which is none of {', '.join(TASKS)}")
    kind = TASKS[task](tuple(map(str, names)), state)
    images = read_preprocessing(file) or default_preprocessing(3)
    images = replace(images, img_size=img_size or images.img_size)
    weights, _ = read_state(file)
    start = Start(timm_name(name), args, weights, str(file.parent), whole=True)
    model, _ = kind.build_model(start, len(images.mean), images.img_size)
    model = model.to(device).eval()
    if fast:
        speed_up(model)
    return Tuned(model, kind, images, folder)
