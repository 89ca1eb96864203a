"""What kinds of label share whose model is built on a timm backbone's features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fcmae.train.run_paths import WHOLE_MODEL
from fcmae.weights.export import write_timm_folder
from finetune.backbone import backbone_state, feature_depths
from finetune.config import FinetuneConfig
from finetune.tasks.base import LabelKind
from sparse.errors import InputError

OF_THE_WHOLE = ("label_names", "task", "task_state")
"""Keys of a timm folder's config.json that the folder of a backbone does not have."""


class OnFeatures(LabelKind):
    """A kind of label whose model has a timm model as its `backbone`.

    Attributes:
        inside: what precedes the names of the backbone's parameters in the model.
    """

    inside: ClassVar[str]

    def prepare(self, config: FinetuneConfig, train: Any, device: torch.device) -> None:
        super().prepare(config, train, device)
        if config.augment.randaugment:
            what = "augment.randaugment moves pixels, but neither masks nor boxes"
            raise InputError(f"{what}: use --augment.color_jitter 0.4")

    def write(self, state: Mapping[str, Tensor], config: Mapping[str, Any], out: Path) -> None:
        """Write the backbone as timm's folder, and the whole model in `task` inside it."""
        write_timm_folder(state, config, out / WHOLE_MODEL)
        backbone = {key: value for key, value in config.items() if key not in OF_THE_WHOLE}
        backbone["num_classes"] = backbone["pretrained_cfg"]["num_classes"] = 0
        name, args = config["architecture"], config.get("model_args", {})
        channels = len(config["pretrained_cfg"]["mean"])
        own = backbone_state(state, self.inside, name, channels, args)
        write_timm_folder(own, backbone, out)

    def scale_head(self, model: nn.Module, scale: float) -> None:
        """Keep the head's own initial weights."""

    def freeze(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.inside))

    def layer_depths(self, model: Any, layer_group: str) -> dict[str, int]:
        return feature_depths(model, layer_group)
