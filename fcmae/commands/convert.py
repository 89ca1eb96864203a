"""`fcmae convert`: from a sparse checkpoint to a dense model."""

from dataclasses import dataclass
from typing import Literal

from fcmae.config.fields import WEIGHTS, Config, setting


@dataclass
class ConvertConfig(Config):
    """Turn a pretrained sparse model into a dense one that timm loads."""

    source: str = setting(path=WEIGHTS, positional=True)
    """Run folder, checkpoint folder or weight file: ours, the official dense releases or those of
    the official pretraining script."""

    out: str = setting()
    """Folder to write: model.safetensors and config.json. With layout minkowski, a .pth or
    .safetensors file."""

    layout: Literal["timm", "minkowski"] = "timm"
    """timm writes a folder that timm loads; minkowski one file as the official pretraining script
    stores it, decoder included."""


CONFIG = ConvertConfig
RUN = "fcmae.weights.export:convert"
