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


class _GeluGRN(torch.autograd.Function):
    """GRN(GELU(h)) that saves only h and the channel norms.

    With a = GELU(h), G the L2 norm of each channel over the visible sites of one image, and
    n = G / (mean over channels of G + eps):  out = a · (1 + weight · n) + bias.
    """

    @staticmethod
    def forward(ctx, h_NC, weight, bias, images, visible_N1):  # type: ignore[no-untyped-def]
        a = F.gelu(h_NC)
        if visible_N1 is not None:
            a.mul_(visible_N1)
        a = images.split(a)
        norm_BC = _channel_norm(a, images)
        scale_BC = 1 + weight * _relative(norm_BC)
        ctx.save_for_backward(h_NC, weight, norm_BC, visible_N1)
        ctx.images = images
        out = torch.addcmul(bias.to(a.dtype), a, images.expand(scale_BC.to(a.dtype)))
        return out.view_as(h_NC)

    @staticmethod
    def backward(ctx, grad_NC):  # type: ignore[no-untyped-def]
        h_NC, weight, norm_BC, visible_N1 = ctx.saved_tensors
        images: ImageRows = ctx.images
        a = F.gelu(h_NC)
        if visible_N1 is not None:
            a.mul_(visible_N1)
        a, grad = images.split(a), images.split(grad_NC)
        dscale_BC = images.sum(a * grad).to(norm_BC.dtype)
        mean_B1 = norm_BC.mean(1, keepdim=True) + GRN_EPS
        drel_BC = dscale_BC * weight
        dnorm_BC = drel_BC / mean_B1 - (drel_BC * norm_BC).mean(1, keepdim=True) / mean_B1**2
        # A channel that is zero everywhere has norm 0; its gradient is defined as 0.
        pull_BC = torch.where(norm_BC > 0, dnorm_BC / norm_BC, 0.0)
        scale_BC = 1 + weight * _relative(norm_BC)
        da = a.mul_(images.expand(pull_BC.to(a.dtype)))
        da.addcmul_(grad, images.expand(scale_BC.to(a.dtype)))
        if visible_N1 is not None:
            da.view_as(h_NC).mul_(visible_N1)
        dh_NC = torch.ops.aten.gelu_backward(da.view_as(h_NC), h_NC)
        dweight = (dscale_BC * _relative(norm_BC)).sum(0).to(weight.dtype)
        return dh_NC, dweight, grad_NC.sum(0), None, None


def _channel_norm(a: Tensor, images: ImageRows) -> Tensor:
    """L2 norm of each channel over each image's rows, in float32 or wider → (B, C)."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return images.sum(a.to(dtype).square()).sqrt()  # vector_norm is six times slower on the CPU


def _relative(norm_BC: Tensor) -> Tensor:
    return norm_BC / (norm_BC.mean(1, keepdim=True) + GRN_EPS)


def gelu_grn(h_NC: Tensor, grn: GlobalResponseNorm, sites: Sites) -> Tensor:
    """GELU, then global response normalisation with statistics per image over visible sites."""
    return _GeluGRN.apply(h_NC, grn.weight, grn.bias, sites.images, sites.visible_N1)


class SparseMlp(nn.Module):
    """C → 4C → GELU → GRN → C. Without `use_grn`, the MLP of ConvNeXt V1."""

    def __init__(self, dim: int, use_grn: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GlobalResponseNorm(4 * dim) if use_grn else None
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_NC: Tensor, sites: Sites) -> Tensor:
        h_NC = self.fc1(x_NC)
        h_NC = F.gelu(h_NC) if self.grn is None else gelu_grn(h_NC, self.grn, sites)
        return self.fc2(h_NC)


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


def weight_and_bias(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Parameters of a convolution that has a bias, as all of ours have."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    return conv.weight, conv.bias


def drop_images(y_NC: Tensor, rate: float, images: ImageRows) -> Tensor:
    """Stochastic depth: zero the branch of each image with probability `rate`, rescale the rest."""
    keep_B1 = y_NC.new_empty(images.batch, 1).bernoulli_(1 - rate) / (1 - rate)
    return (images.split(y_NC) * images.expand(keep_B1)).view_as(y_NC)
