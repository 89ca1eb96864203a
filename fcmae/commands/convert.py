"""`fcmae convert`: convert a sparse checkpoint to a dense model."""

from dataclasses import dataclass
from typing import Literal

from fcmae.config.fields import WEIGHTS, Config, setting


@dataclass
class ConvertConfig(Config):
    """Convert a pretrained sparse model to a dense one that timm loads."""

    source: str = setting(path=WEIGHTS, positional=True)
    """Run folder, checkpoint folder or weight file: ours, an official dense release or one written
    by the official pretraining script."""

    out: str = setting()
    """Folder to write model.safetensors and config.json to. With layout minkowski, a .pth or
    .safetensors file."""

    layout: Literal["timm", "minkowski"] = "timm"
    """timm writes a folder that timm loads; minkowski writes one file in the layout of the official
    pretraining script, including the decoder."""


CONFIG = ConvertConfig
RUN = "fcmae.weights.export:convert"
