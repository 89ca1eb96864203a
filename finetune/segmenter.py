"""UPerNet over a timm backbone: a class for each pixel."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcmae.train.checkpoint import first_difference
from fcmae.weights.read import first_line
from finetune.model import Start
from finetune.optim import BLOCKS_A_GROUP, convnext_layer
from sparse.errors import InputError
from sparse.sizes import PATCH

BACKBONE = "net.encoder.model."
AUX_CHANNELS = 256
DROPOUT = 0.1

TRIED = (64, 96)
"""Size of an image that a new model is tried with: unlike the one that a backbone is made for."""

_log = logging.getLogger(__name__)


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
        InputError: the library is not installed.
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


def load_backbone(model: Segmenter, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the weights of a timm model into the backbone; its head is not part of that.

    Raises:
        InputError: names or shapes differ; prints both sides of the first difference.
    """
    own = model.backbone.state_dict()
    given = {_flat(name): tensor for name, tensor in state.items()}
    loaded = {name: given[_flat(name)] for name in own if _flat(name) in given}
    if difference := first_difference(loaded, own):
        raise InputError(f"{origin}: {difference}: give weights of the same --model and --in_chans")
    model.backbone.load_state_dict(loaded)


def backbone_state(
    state: Mapping[str, Tensor], name: str, in_chans: int, args: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return a segmenter's backbone in the names of timm's model without a classifier.

    Layers that the segmenter does not have get initial values: in a ConvNeXt the last norm, weight
    1 and bias 0; in others perhaps layers after the features.
    """
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0, in_chans=in_chans, **args)
    own = {
        _flat(key.removeprefix(BACKBONE)): tensor
        for key, tensor in state.items()
        if key.startswith(BACKBONE)
    }
    missing = {key.rpartition(".")[0] for key in whole.state_dict() if _flat(key) not in own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the bytes depend on the weights alone
        for part in map(whole.get_submodule, sorted(missing)):
            part.to_empty(device="cpu", recurse=False)
            part.reset_parameters()  # type: ignore[operator]
    return {key: own.get(_flat(key), tensor) for key, tensor in whole.state_dict().items()}


def _flat(name: str) -> str:
    """timm joins the first two parts of some names where it returns features."""
    return name.replace(".", "_")


def start_segmenter(
    start: Start, in_chans: int, classes: int, width: int | None, with_aux: bool, drop_path: float
) -> tuple[Segmenter, dict[str, Any]]:
    """Build a segmenter with its initial weights, the backbone's those of `start`, if any; return
    it with the backbone's arguments for timm.

    Raises:
        InputError: the library is not installed, the backbone has no features of strides 4 to 32
            for images of any size, or the weights are of another model.
    """
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    any_size = {"strict_img_size": False}  # of timm's Swin
    for optional in (rate, {}, rate | any_size, any_size):
        args = start.args | optional
        try:
            model = Segmenter(start.name, args, in_chans, classes, width, with_aux)
            with torch.no_grad():
                model.eval()(torch.zeros(1, in_chans, *TRIED))
            break
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError,
                AssertionError) as error:  # fmt: skip
            refused = error
    else:
        raise InputError(
            f"model {start.name!r} has no features for UPerNet ({first_line(refused)}): use a "
            "ConvNeXt or ResNet"
        ) from refused
    if drop_path and "drop_path_rate" not in optional:
        _log.warning("%s has no stochastic depth: drop_path is not used", start.name)
    if start.state is not None and start.whole:
        if difference := first_difference(start.state, model.state_dict()):
            raise InputError(f"{start.origin}: {difference}: the folder is damaged, restore it")
        model.load_state_dict(start.state)
    elif start.state is not None:
        load_backbone(model, start.state, start.origin)
    return model, args


def segmenter_depths(model: Any, layer_group: str) -> dict[str, int]:
    """How many layers before the head each parameter is; see `finetune.optim.layer_depths`.

    Raises:
        InputError: the backbone is not a ConvNeXt.
    """
    backbone = model.backbone
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
