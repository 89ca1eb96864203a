"""UPerNet over a timm backbone: a class for each pixel."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.backbone import start_on_features
from finetune.model import Start
from sparse.errors import InputError
from sparse.sizes import PATCH

AUX_CHANNELS = 256
DROPOUT = 0.1


class FcnHead(nn.Sequential):
    """The auxiliary head of the papers' recipes: a 3×3 convolution, then a class for each site.

    Args:
        in_channels: of the features.
        classes: their number.
    """

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, AUX_CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(AUX_CHANNELS),
            nn.ReLU(),
            nn.Dropout2d(DROPOUT),
            nn.Conv2d(AUX_CHANNELS, classes, 1),
        )


class Segmenter(nn.Module):
    """UPerNet of segmentation_models_pytorch (arXiv 1807.10221), with dropout before its last layer
    and in training an FCN head on the features of stride 16, as in the papers' recipes for ADE20K.

    Args:
        name: timm's name of the backbone.
        args: its arguments that differ from timm's defaults.
        in_chans: channels of the images.
        classes: their number.
        width: channels of the decoder; None takes twice the first stage's, at most 512.
        with_aux: whether to have the FCN head.

    Attributes:
        inside: what precedes the names of the backbone's parameters.
        num_features, pretrained_cfg: those of the backbone, for its timm folder.

    Raises:
        InputError: the library is not installed.
    """

    inside = "net.encoder.model."

    def __init__(
        self,
        name: str,
        args: Mapping[str, Any],
        in_chans: int,
        classes: int,
        width: int | None,
        with_aux: bool,
    ) -> None:
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise InputError(
                "task segment needs segmentation_models_pytorch: pip install 'fcmae[segment]'"
            ) from error
        with torch.device("meta"):
            whole: Any = timm.create_model(name, num_classes=0, in_chans=in_chans, **args)
        width = width or min(2 * whole.feature_info[-4]["num_chs"], 512)
        self.net = smp.UPerNet(
            f"tu-{name}", encoder_weights=None, decoder_channels=width, in_channels=in_chans,
            classes=classes, **args,
        )  # fmt: skip
        self.aux = FcnHead(self.net.encoder.out_channels[-2], classes) if with_aux else None
        self.dropout = nn.Dropout2d(DROPOUT)
        self.num_features, self.pretrained_cfg = whole.num_features, whole.pretrained_cfg

    @property
    def backbone(self) -> nn.Module:
        """The timm model that gives features."""
        return self.net.encoder.model

    def forward(self, images_BCHW: Tensor) -> Any:
        """Return scores (B, K, H, W); in training also those of the auxiliary head or None.

        Sides that are not multiples of 32 are padded with zeros, and the scores cropped.
        """
        h, w = images_BCHW.shape[2:]
        padded = F.pad(images_BCHW, (0, -w % PATCH, 0, -h % PATCH))
        features = self.net.encoder(padded)
        stride_16 = features[-2]
        decoded = self.net.decoder(features)
        scores = self.net.segmentation_head(self.dropout(decoded))[..., :h, :w]
        if not self.training:
            return scores
        if self.aux is None:
            return scores, None
        aux = F.interpolate(self.aux(stride_16), size=padded.shape[2:], mode="bilinear")
        return scores, aux[..., :h, :w]


def start_segmenter(
    start: Start, in_chans: int, classes: int, width: int | None, with_aux: bool, drop_path: float
) -> tuple[Segmenter, dict[str, Any]]:
    """Build a segmenter with its initial weights; see `start_on_features`."""

    def build(name: str, args: Mapping[str, Any]) -> Segmenter:
        return Segmenter(name, args, in_chans, classes, width, with_aux)

    return start_on_features(start, in_chans, drop_path, build, "UPerNet")
