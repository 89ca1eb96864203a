"""The pointwise layers of ConvNeXt V2, over rows of visible sites (N, C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse.engines.base import ImageRows, Sites, hide

GRN_EPS = 1e-6
LAYER_NORM_EPS = 1e-6


class GlobalResponseNorm(nn.Module):
    """Parameters of GRN (arXiv 2301.00808, section 4.1, equations 1-3), zero at the start.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class _GeluGRNLinear(torch.autograd.Function):
    """fc2(GRN(GELU(h))) that saves only h and the channel norms.

    With a = GELU(h), G the L2 norm of each channel over the visible sites of one image,
    n = G / (mean over channels of G + eps) and s = 1 + weight · n:

        out = (a · s + bias) Wᵀ + b = (a · s) Wᵀ + (W bias + b)
    """

    @staticmethod
    def forward(ctx, h_NK, weight_K, bias_K, w_OK, b_O, images, visible_N1):  # type: ignore[no-untyped-def]
        a_NK = _gelu(h_NK, visible_N1)
        norm_BK = _channel_norm(images.split(a_NK), images)
        s_BK = (1 + weight_K * _relative(norm_BK)).to(a_NK.dtype)
        ctx.save_for_backward(h_NK, weight_K, bias_K, w_OK, norm_BK, visible_N1)
        ctx.images = images
        shift_O = torch.mv(w_OK, bias_K.to(w_OK.dtype)) + b_O
        images.split(a_NK).mul_(images.expand(s_BK))
        return torch.addmm(shift_O.to(a_NK.dtype), a_NK, w_OK.t())

    @staticmethod
    def backward(ctx, grad_NO):  # type: ignore[no-untyped-def]
        h_NK, weight_K, bias_K, w_OK, norm_BK, visible_N1 = ctx.saved_tensors
        images: ImageRows = ctx.images
        relative_BK = _relative(norm_BK)
        s_BK = (1 + weight_K * relative_BK).to(h_NK.dtype)
        a_NK = _gelu(h_NK, visible_N1)
        a = images.split(a_NK)
        da = images.split(grad_NO @ w_OK)
        ds_BK = images.sum(a * da).to(norm_BK.dtype)
        s = images.expand(s_BK)
        db_O = grad_NO.sum(0)
        dw_OK = grad_NO.t() @ (a * s).view_as(a_NK)
        dw_OK.addr_(db_O, bias_K.to(db_O.dtype))
        da.mul_(s)

        dn_BK = ds_BK * weight_K
        mean_B1 = norm_BK.mean(1, keepdim=True) + GRN_EPS
        dnorm_BK = dn_BK / mean_B1 - (dn_BK * norm_BK).mean(1, keepdim=True) / mean_B1**2
        # A channel that is zero everywhere has norm 0; its gradient is defined as 0.
        pull_BK = torch.where(norm_BK > 0, dnorm_BK / norm_BK, 0.0)
        da.addcmul_(a, images.expand(pull_BK.to(a.dtype)))
        da_NK = da.view_as(h_NK)
        if visible_N1 is not None:
            da_NK.mul_(visible_N1)
        dh_NK = torch.ops.aten.gelu_backward(da_NK, h_NK)
        dweight_K = (ds_BK * relative_BK).sum(0).to(weight_K.dtype)
        dbias_K = torch.mv(w_OK.t(), db_O).to(bias_K.dtype)
        return dh_NK, dweight_K, dbias_K, dw_OK, db_O, None, None


def _gelu(h_NK: Tensor, visible_N1: Tensor | None) -> Tensor:
    a_NK = F.gelu(h_NK)
    return a_NK if visible_N1 is None else a_NK.mul_(visible_N1)


def _channel_norm(a: Tensor, images: ImageRows) -> Tensor:
    """L2 norm of each channel over each image's rows, in float32 or wider → (B, C)."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return images.sum(a.to(dtype).square()).sqrt()  # vector_norm is six times slower on the CPU


def _relative(norm_BC: Tensor) -> Tensor:
    return norm_BC / (norm_BC.mean(1, keepdim=True) + GRN_EPS)


def gelu_grn_linear(
    h_NK: Tensor, grn: GlobalResponseNorm, linear: nn.Linear, sites: Sites
) -> Tensor:
    """GELU, GRN with statistics per image over visible sites, linear layer: (N, K) → (N, O)."""
    weight, bias = weight_and_bias(linear)
    if torch.is_autocast_enabled(h_NK.device.type):
        dtype = torch.get_autocast_dtype(h_NK.device.type)
        h_NK, weight, bias = h_NK.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.autocast(h_NK.device.type, enabled=False):
        return _GeluGRNLinear.apply(
            h_NK, grn.weight, grn.bias, weight, bias, sites.images, sites.visible_N1
        )


class SparseMlp(nn.Module):
    """C → 4C → GELU → GRN → C. Without `use_grn`, the MLP of ConvNeXt V1."""

    def __init__(self, dim: int, use_grn: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GlobalResponseNorm(4 * dim) if use_grn else None
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_NC: Tensor, sites: Sites) -> Tensor:
        h_NK = self.fc1(x_NC)
        if self.grn is None:
            return self.fc2(F.gelu(h_NK))
        return gelu_grn_linear(h_NK, self.grn, self.fc2, sites)


class SparseBlock(nn.Module):
    """A ConvNeXt V2 block (section 4.1, figure 5): depthwise 7×7, LayerNorm, MLP, residual.

    Args:
        dim: channels C.
        drop_path: probability of dropping the branch, drawn once per image.
        use_grn: GRN in the MLP (V2).
        layer_scale: initial value of a learned per-channel scale of the branch (V1), None for none.
    """

    def __init__(
        self, dim: int, drop_path: float, use_grn: bool, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = SparseMlp(dim, use_grn)
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x_NC: Tensor, sites: Sites) -> Tensor:
        y_NC = sites.depthwise(x_NC, *weight_and_bias(self.conv_dw))
        y_NC = self.mlp(self.norm(y_NC), sites)
        if self.gamma is not None:
            y_NC = y_NC * self.gamma
        if self.drop_path and self.training:
            y_NC = drop_images(y_NC, self.drop_path, sites.images)
        return x_NC + hide(sites, y_NC)


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Parameters of a layer that has a bias, as all of ours have."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    return layer.weight, layer.bias


def drop_images(y_NC: Tensor, rate: float, images: ImageRows) -> Tensor:
    """Stochastic depth: zero the branch of each image with probability `rate`, rescale the rest."""
    keep_B1 = y_NC.new_empty(images.batch, 1).bernoulli_(1 - rate) / (1 - rate)
    return (images.split(y_NC) * images.expand(keep_B1)).view_as(y_NC)
