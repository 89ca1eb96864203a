"""`fcmae export`: write a model for other programs."""

from dataclasses import dataclass
from typing import Literal

from fcmae.config.fields import WEIGHTS, ImageSizeConfig, setting


@dataclass
class ExportConfig(ImageSizeConfig):
    """Write a pretrained or fine-tuned model for other programs, and compare it with the source."""

    source: str = setting(path=WEIGHTS, positional=True)
    """Run (its best weights), folder of weights or weight file."""

    to: Literal["onnx", "pt2", "transformers"] = setting()
    """onnx for onnxruntime and TensorRT; pt2 for torch.export.load; transformers for Hugging Face's
    AutoModel, which has backbones and classifiers only."""

    out: str = setting()
    """File to write, ending in .onnx or .pt2; with transformers, a folder."""

    half: bool = False
    """Compute in float16, except the norms of GRN, which would overflow. Inputs and outputs stay
    float32. Only with onnx."""

    opset: int = setting(20, at_least=18, at_most=23)
    """Version of ONNX's operators."""


CONFIG = ExportConfig
RUN = "finetune.exporting:export"
