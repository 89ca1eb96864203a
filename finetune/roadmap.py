"""From ResNet to ConvNeXt, one design decision at a time (arXiv 2201.03545, section 2, Figure 2).

One model with switches. Each step of the road is a model that timm's `create_model` and
`fcmae finetune --model` build: `roadmap_resnet` is timm's `resnet50` and
`roadmap_separate_downsampling` its `convnext_tiny`. The `roadmap200_` models are the same steps at
the size of ResNet-200 and ConvNeXt-B.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.models import register_model
from torch import Tensor, nn

LAYER_SCALE = 1e-6
IMAGENET = {"input_size": (3, 224, 224), "classifier": "head.fc", "first_conv": "stem.0"}


@dataclass(frozen=True)
class Design:
    """A point on the road; the defaults are ResNet-50.

    Attributes:
        depths: blocks of each stage.
        width: channels of the first stage's bottleneck, or of the first stage itself if `inverted`;
            they double from stage to stage.
        patchify: a 4×4 convolution of stride 4 as stem, instead of 7×7 and pooling.
        depthwise: the spatial convolution of a block sees one channel at a time.
        inverted: a block is wide inside, four times its width, instead of outside.
        conv_first: the depthwise convolution comes first in a block, where it is narrow.
        kernel: side of the spatial convolution.
        act: activation.
        few_acts: one activation in a block, between the 1×1 convolutions, and none after the sum.
        few_norms: one norm in a block, after the depthwise convolution.
        norm: norm over channels (C) of a map.
        separate: norm and a 2×2 convolution between stages, instead of strides inside of blocks;
            a norm, and no activation, after the stem; a norm before the classifier; LayerScale.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    patchify: bool = False
    depthwise: bool = False
    inverted: bool = False
    conv_first: bool = False
    kernel: int = 3
    act: Callable[[], nn.Module] = nn.ReLU
    few_acts: bool = False
    few_norms: bool = False
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    separate: bool = False


class Block(nn.Module):
    """A residual block: three convolutions, of which one is spatial.

    Args:
        dim_in: channels of the input.
        width: of the stage, see `Design`.
        stride: of the spatial convolution.
        design: what to build.
        drop_path: probability of skipping the block for an image.
    """

    def __init__(
        self, dim_in: int, width: int, stride: int, design: Design, drop_path: float
    ) -> None:
        super().__init__()
        d = design
        inner, dim = (4 * width, width) if d.inverted else (width, 4 * width)
        self.scale = nn.Parameter(LAYER_SCALE * torch.ones(dim)) if d.separate else None
        seen = dim_in if d.conv_first else inner
        spatial = nn.Conv2d(
            seen, seen, d.kernel, stride, d.kernel // 2,
            groups=seen if d.depthwise else 1, bias=d.few_norms,
        )  # fmt: skip
        widen = nn.Conv2d(dim_in, inner, 1, bias=d.few_norms)
        narrow = nn.Conv2d(inner, dim, 1, bias=d.few_norms)
        body: list[nn.Module] = []
        for place, conv in enumerate([spatial, widen] if d.conv_first else [widen, spatial]):
            body += [conv]
            body += [] if d.few_norms and place else [d.norm(conv.out_channels)]
            body += [] if d.few_acts and not place else [d.act()]
        self.body = nn.Sequential(*body, narrow)
        if not d.few_norms:
            last: Any = d.norm(dim)
            nn.init.zeros_(last.weight)  # the block starts as its shortcut, as in timm
            self.body.append(last)
        self.shortcut = nn.Sequential()
        if stride > 1 or dim_in != dim:
            projection = nn.Conv2d(dim_in, dim, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, d.norm(dim))
        self.drop_path = DropPath(drop_path)
        self.act = nn.Identity() if d.few_acts else d.act()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        found = self.body(x_BCHW)
        if self.scale is not None:
            found = self.scale.view(-1, 1, 1) * found
        return self.act(self.shortcut(x_BCHW) + self.drop_path(found))


class Head(nn.Module):
    """Mean over the map, norm, classifier: (B, C, H, W) → (B, K)."""

    def __init__(self, dim: int, norm: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(self.norm(x_BCHW.mean((2, 3), keepdim=True)).flatten(1))


class Roadmap(nn.Module):
    """A network of four stages, strides 4 to 32.

    Args:
        design: what to build.
        num_classes: 0 for none.
        in_chans: channels of the images.
        drop_path_rate: of the last block; it rises linearly from 0 at the first.
    """

    def __init__(
        self,
        design: Design,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        d, self.num_classes = design, num_classes
        if d.patchify:
            self.stem = nn.Sequential(nn.Conv2d(in_chans, d.width, 4, 4, bias=d.separate))
        else:
            self.stem = nn.Sequential(nn.Conv2d(in_chans, d.width, 7, 2, 3, bias=False))
        self.stem.append(d.norm(d.width))
        if not d.separate:
            self.stem.append(d.act())
        if not d.patchify:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        count = sum(d.depths)
        rates = iter(drop_path_rate * place / max(1, count - 1) for place in range(count))
        self.stages, dim = nn.ModuleList(), d.width
        for stage, depth in enumerate(d.depths):
            width = d.width << stage
            blocks: list[nn.Module] = []
            if d.separate and stage:
                blocks += [nn.Sequential(d.norm(dim), nn.Conv2d(dim, width, 2, 2))]
                dim = width
            for place in range(depth):
                stride = 2 if stage and not place and not d.separate else 1
                blocks += [Block(dim, width, stride, d, next(rates))]
                dim = width if d.inverted else 4 * width
            self.stages.append(nn.Sequential(*blocks))
        self.num_features = self.head_hidden_size = dim
        self.head = Head(dim, d.norm(dim) if d.separate else nn.Identity(), num_classes)
        self.apply(_init_convnext if d.separate else _init_resnet)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, C, H/32, W/32)."""
        x_BCHW = self.stem(x_BCHW)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        return x_BCHW

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, num_classes)."""
        return self.head(self.forward_features(x_BCHW))


def _init_resnet(part: nn.Module) -> None:
    if isinstance(part, nn.Conv2d):
        nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def _init_convnext(part: nn.Module) -> None:
    if isinstance(part, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resnet": ({}, {"depths": (3, 24, 36, 3)}),
    "stage_ratio": ({"depths": (3, 3, 9, 3)}, {"depths": (3, 3, 27, 3), "width": 84}),
    "patchify_stem": ({"patchify": True},) * 2,
    "depthwise": ({"depthwise": True},) * 2,
    "width": ({"width": 96}, {"width": 128}),
    "inverted_bottleneck": ({"inverted": True},) * 2,
    "depthwise_first": ({"conv_first": True},) * 2,
    "kernel_7": ({"kernel": 7},) * 2,
    "gelu": ({"act": nn.GELU},) * 2,
    "fewer_activations": ({"few_acts": True},) * 2,
    "fewer_norms": ({"few_norms": True},) * 2,
    "layer_norm": ({"norm": LayerNorm2d},) * 2,
    "separate_downsampling": ({"separate": True},) * 2,
}
"""Steps: what each changes at the size of ResNet-50, and of ResNet-200 (the paper's appendix C)."""

PREFIXES = ("roadmap", "roadmap200")


def designs(size: int) -> dict[str, Design]:
    """The designs of all steps by name; `size` 0 ends at ConvNeXt-T, 1 at ConvNeXt-B."""
    found, design = {}, Design()
    for name, changes in CHANGES.items():
        design = replace(design, **changes[size])
        found[name] = design
    return found


def _register(name: str, design: Design) -> None:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> Roadmap:
        model: Any = Roadmap(design, **options)
        model.pretrained_cfg = model.default_cfg = IMAGENET
        return model

    build.__name__ = build.__qualname__ = name
    register_model(build)


for _size, _prefix in enumerate(PREFIXES):
    for _name, _design in designs(_size).items():
        _register(f"{_prefix}_{_name}", _design)
