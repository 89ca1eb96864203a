"""UPerNet over a timm backbone: a class for each pixel."""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn import functional as F

from fcmae.train.checkpoint import first_difference
from finetune.model import Start
from finetune.optim import BLOCKS_A_GROUP, convnext_layer
from sparse.encoder import init_fan_in
from sparse.errors import InputError
from sparse.sizes import PATCH

BACKBONE = "net.encoder.model."
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
        num_features, pretrained_cfg: those of the backbone, for its timm folder.

    Raises:
        InputError: the library is not installed, or the backbone has no such features.
    """

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
        try:
            with torch.device("meta"):
                whole = timm.create_model(name, num_classes=0, in_chans=in_chans, **args)
                features: Any = timm.create_model(name, features_only=True, **args)
                channels = features.feature_info.channels()
            width = width or min(2 * channels[-4], 512)
            self.net = smp.UPerNet(
                f"tu-{name}", encoder_weights=None, decoder_channels=width, in_channels=in_chans,
                classes=classes, **args,
            )  # fmt: skip
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"model {name!r} has no features for UPerNet ({reason}): use a ConvNeXt or ResNet"
            ) from error
        self.aux = FcnHead(self.net.encoder.out_channels[-2], classes) if with_aux else None
        self.dropout = nn.Dropout2d(DROPOUT)
        self.num_features, self.pretrained_cfg = whole.num_features, whole.pretrained_cfg

    def forward(self, images_BCHW: Tensor) -> Any:
        """Return scores (B, K, H, W); in training also those of the auxiliary head or None.

        Sides that are not multiples of 32 are padded with zeros, and the scores cropped.
        """
        h, w = images_BCHW.shape[2:]
        padded = F.pad(images_BCHW, (0, -w % PATCH, 0, -h % PATCH))
        features = self.net.encoder(padded)
        stride_16 = features[-2]
        decoded = self.net.decoder(features)  # replaces the entries of the list
        scores = self.net.segmentation_head(self.dropout(decoded))[..., :h, :w]
        if not self.training:
            return scores
        if self.aux is None:
            return scores, None
        aux = F.interpolate(self.aux(stride_16), size=padded.shape[2:], mode="bilinear")
        return scores, aux[..., :h, :w]


def load_backbone(model: Segmenter, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the weights of a timm model into the backbone; its head is not part of that.

    Raises:
        InputError: names or shapes differ; prints both sides of the first difference.
    """
    own = model.net.encoder.model.state_dict()
    given = {_flat(name): tensor for name, tensor in state.items()}
    loaded = {name: given[_flat(name)] for name in own if _flat(name) in given}
    if difference := first_difference(loaded, own):
        raise InputError(f"{origin}: {difference}: give weights of the same --model and --in_chans")
    model.net.encoder.model.load_state_dict(loaded)


def backbone_state(
    state: Mapping[str, Tensor], name: str, in_chans: int, args: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return a segmenter's backbone in the names of timm's model without a classifier.

    What the segmenter does not have, a norm after the last stage, becomes the identity.
    """
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0, in_chans=in_chans, **args).state_dict()
    own = {
        _flat(key.removeprefix(BACKBONE)): tensor
        for key, tensor in state.items()
        if key.startswith(BACKBONE)
    }
    identity = {"weight": torch.ones, "bias": torch.zeros}
    return {
        key: own[_flat(key)] if _flat(key) in own else identity[key.split(".")[-1]](like.shape)
        for key, like in whole.items()
    }


def _flat(name: str) -> str:
    """timm joins the first two parts of some names where it returns features."""
    return name.replace(".", "_")


def init_backbone(model: Segmenter) -> None:
    """Give a ConvNeXt backbone weights of standard deviation 1/√fan_in; others keep theirs."""
    if any(isinstance(part, ConvNeXtBlock) for part in model.modules()):
        init_fan_in(model.net.encoder.model)


def start_segmenter(
    start: Start, in_chans: int, classes: int, width: int | None, with_aux: bool, drop_path: float
) -> Segmenter:
    """Build a segmenter with its initial weights; the backbone's are those of `start`, if any.

    Raises:
        InputError: see `Segmenter`, or the weights are of another model.
    """
    args = dict(start.args) | ({"drop_path_rate": drop_path} if drop_path else {})
    model = Segmenter(start.name, args, in_chans, classes, width, with_aux)
    if start.state is not None and start.whole:
        if difference := first_difference(start.state, model.state_dict()):
            raise InputError(f"{start.origin}: {difference}: the folder is damaged, restore it")
        model.load_state_dict(start.state)
    elif start.state is not None:
        load_backbone(model, start.state, start.origin)
    return model


def segmenter_depths(model: Any, layer_group: str) -> dict[str, int]:
    """How many layers before the head each parameter is; see `finetune.optim.layer_depths`.

    Raises:
        InputError: the backbone is not a ConvNeXt.
    """
    backbone = model.net.encoder.model
    stages: list[Any] = [getattr(backbone, f"stages_{stage}", None) for stage in range(4)]
    blocks = [len(getattr(stage, "blocks", ())) for stage in stages]
    if not all(blocks):
        raise InputError("the layers of this backbone are not known: use --optim.layer_decay 1")
    per_layer = BLOCKS_A_GROUP if layer_group == "group" else 1
    last, depths = convnext_layer("head", blocks, per_layer), {}
    for name, _ in model.named_parameters():
        inside = re.sub(r"^(stem|stages)_(\d+)", r"\1.\2", name.removeprefix(BACKBONE))
        part = inside if name.startswith(BACKBONE) else "head"
        depths[name] = last - convnext_layer(part, blocks, per_layer)
    return depths
