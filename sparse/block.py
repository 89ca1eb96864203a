"""The ConvNeXt V2 block, over rows of visible sites (N, C)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse.engines.base import Sites, hide
from sparse.ops.grn_mlp import LAYER_NORM_EPS, grn_mlp, grn_scale, wide
from sparse.rows import ImageRows


class GlobalResponseNorm(nn.Module):
    """Parameters of GRN (arXiv 2301.00808, section 4.1, equations 1-3), initially zero.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class SparseMlp(nn.Module):
    """C → 4C → GELU → GRN → C. Without `use_grn`, the MLP of ConvNeXt V1."""

    def __init__(self, dim: int, use_grn: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GlobalResponseNorm(4 * dim) if use_grn else None
        self.fc2 = nn.Linear(4 * dim, dim)


class SparseBlock(nn.Module):
    """A ConvNeXt V2 block (section 4.1, figure 5): depthwise 7×7, LayerNorm, MLP, residual.

    Args:
        dim: channels C.
        drop_path: probability of dropping the branch, drawn once per image.
        use_grn: GRN in the MLP (V2).
        layer_scale: initial value of a learned per-channel scale of the branch (V1), None for none.
        recompute: see `grn_mlp`.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float,
        use_grn: bool,
        layer_scale: float | None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = SparseMlp(dim, use_grn)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path, self.recompute = drop_path, recompute

    def forward(self, x_NC: Tensor, sites: Sites) -> Tensor:
        y_NC = sites.depthwise(x_NC, *weight_and_bias(self.conv_dw))
        if self.mlp.grn is not None:
            images, visible_N1 = sites.images, sites.visible_N1
            y_NC = grn_mlp(y_NC, self.norm, self.mlp, images, visible_N1, self.recompute)
        else:
            y_NC = self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm(y_NC))))
        if self.gamma is not None:
            y_NC = y_NC * self.gamma
        if self.drop_path and self.training:
            y_NC = drop_images(y_NC, self.drop_path, sites.images)
        return x_NC + hide(sites, y_NC)

    def hidden(self, x_NC: Tensor, sites: Sites) -> Tensor:
        """The block's widest activations, those that enter fc2: after GELU and, in V2, GRN.

        For inspection; training never holds them all at once. → (N, 4C)
        """
        y_NC = self.norm(sites.depthwise(x_NC, *weight_and_bias(self.conv_dw)))
        a_NK = hide(sites, F.gelu(self.mlp.fc1(y_NC)))
        if self.mlp.grn is None:
            return a_NK
        a = sites.images.split(a_NK)
        norm_BK = sites.images.sum(a.to(wide(a.dtype)).square()).sqrt()
        scaled = a * sites.images.expand(grn_scale(norm_BK, self.mlp.grn.weight).to(a.dtype))
        return hide(sites, scaled.view_as(a_NK) + self.mlp.grn.bias)


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias; all of our layers have both."""
    return layer.weight, layer.bias


def drop_images(y_NC: Tensor, rate: float, images: ImageRows) -> Tensor:
    """Zero the branch of each image with probability `rate` and rescale the rest."""
    keep_B1 = y_NC.new_empty(images.batch, 1).bernoulli_(1 - rate) / (1 - rate)
    return (images.split(y_NC) * images.expand(keep_B1)).view_as(y_NC)
