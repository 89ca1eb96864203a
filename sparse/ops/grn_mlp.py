"""The MLP of a ConvNeXt V2 block as one function: LayerNorm, fc1, GELU, GRN, fc2."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse.rows import ImageRows

GRN_EPS = 1e-6
LAYER_NORM_EPS = 1e-6


class _GrnMlp(torch.autograd.Function):
    """fc2(GRN(GELU(fc1(LayerNorm(x))))), a few images at a time.

    A piece of the 4C-wide tensors stays in the processor's cache from one operation to the next.
    Only fc1's output h exists for the whole batch, and with `recompute` not even that.

    With a = GELU(h), G the L2 norm of each channel over the visible sites of one image,
    n = G / (mean over channels of G + eps) and s = 1 + weight · n:

        out = (a · s + bias) W2ᵀ + b2 = (a · s) W2ᵀ + (W2 bias + b2)
    """

    @staticmethod
    def forward(ctx, images, visible_N1, recompute, x_NC, *weights):  # type: ignore[no-untyped-def]
        grn_w_K, grn_b_K, norm_w_C, norm_b_C, w1_KC, b1_K, w2_CK, b2_C = weights
        width = len(w1_KC)
        out_NC = torch.empty_like(x_NC)
        h_NK = None if recompute else x_NC.new_empty(len(x_NC), width)
        norm_BK = x_NC.new_empty(images.batch, width, dtype=wide(x_NC.dtype))
        shift_C = torch.mv(w2_CK, grn_b_K.to(w2_CK.dtype)) + b2_C
        for rows, some in images.pieces(width * x_NC.element_size()):
            y_NC = F.layer_norm(x_NC[rows], x_NC.shape[1:], norm_w_C, norm_b_C, LAYER_NORM_EPS)
            h = torch.addmm(b1_K, y_NC, w1_KC.t(), out=None if h_NK is None else h_NK[rows])
            a_NK = _gelu(h, visible_N1, rows)
            a = images.split(a_NK)
            # `vector_norm` is six times slower on the CPU.
            norm_BK[some] = images.sum(a.to(norm_BK.dtype).square()).sqrt()
            a.mul_(images.expand(grn_scale(norm_BK[some], grn_w_K).to(a.dtype)))
            torch.addmm(shift_C, a_NK, w2_CK.t(), out=out_NC[rows])
        ctx.save_for_backward(visible_N1, h_NK, norm_BK, x_NC, *weights)
        ctx.images = images
        return out_NC

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NC):  # type: ignore[no-untyped-def]
        visible_N1, h_NK, norm_BK, x_NC, *weights = ctx.saved_tensors
        grn_w_K, grn_b_K, norm_w_C, norm_b_C, w1_KC, b1_K, w2_CK, _ = weights
        images: ImageRows = ctx.images
        dx_NC = torch.empty_like(x_NC)
        ds_BK = torch.empty_like(norm_BK)
        sums: list[Tensor] = []
        for rows, some in images.pieces(len(w1_KC) * x_NC.element_size()):
            x, grad = x_NC[rows], grad_NC[rows]
            y_NC, mean, rstd = torch.ops.aten.native_layer_norm(
                x, x.shape[1:], norm_w_C, norm_b_C, LAYER_NORM_EPS
            )
            h = torch.addmm(b1_K, y_NC, w1_KC.t()) if h_NK is None else h_NK[rows]
            a_NK = _gelu(h, visible_N1, rows)
            da_NK = grad @ w2_CK
            a, da = images.split(a_NK), images.split(da_NK)
            s = images.expand(grn_scale(norm_BK[some], grn_w_K).to(a.dtype))
            ds_BK[some] = images.sum(a * da).to(norm_BK.dtype)
            dw2_CK = grad.t() @ (a * s).view_as(a_NK)
            pull_BK = _norm_gradient(ds_BK[some] * grn_w_K, norm_BK[some])
            da.mul_(s).addcmul_(a, images.expand(pull_BK.to(a.dtype)))
            if visible_N1 is not None:
                da_NK.mul_(visible_N1[rows])
            dh_NK = torch.ops.aten.gelu_backward(da_NK, h)
            dx_NC[rows], dnorm_w_C, dnorm_b_C = torch.ops.aten.native_layer_norm_backward(
                dh_NK @ w1_KC, x, x.shape[1:], mean, rstd, norm_w_C, norm_b_C, [True] * 3
            )
            parts = [dnorm_w_C, dnorm_b_C, dh_NK.t() @ y_NC, dh_NK.sum(0), dw2_CK]
            # In at least float32: a long sum stops growing in bfloat16. The parts of the later
            # pieces are added to those of the first.
            parts = [part.to(norm_BK.dtype) for part in parts]
            sums = [t.add_(p) for t, p in zip(sums, parts, strict=True)] if sums else parts
        dw2_CK = sums[-1]
        db2_C = grad_NC.sum(0)
        dw2_CK.addr_(db2_C.to(dw2_CK.dtype), grn_b_K.to(dw2_CK.dtype))
        dgrn_w_K = (ds_BK * _relative(norm_BK)).sum(0).to(grn_w_K.dtype)
        dgrn_b_K = torch.mv(w2_CK.t(), db2_C).to(grn_b_K.dtype)
        sums = [total.to(x_NC.dtype) for total in sums]
        return None, None, None, dx_NC, dgrn_w_K, dgrn_b_K, *sums, db2_C


def _gelu(h_NK: Tensor, visible_N1: Tensor | None, rows: slice) -> Tensor:
    """GELU, zero at hidden sites."""
    a_NK = F.gelu(h_NK)
    return a_NK if visible_N1 is None else a_NK.mul_(visible_N1[rows])


def grn_scale(norm_BK: Tensor, weight_K: Tensor) -> Tensor:
    return 1 + weight_K * _relative(norm_BK)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _norm_gradient(dn_BK: Tensor, norm_BK: Tensor) -> Tensor:
    mean_B1 = norm_BK.mean(1, keepdim=True) + GRN_EPS
    dnorm_BK = dn_BK / mean_B1 - (dn_BK * norm_BK).mean(1, keepdim=True) / mean_B1**2
    # A channel that is zero everywhere has norm 0; its gradient is defined as 0.
    return torch.where(norm_BK > 0, dnorm_BK / norm_BK, 0.0)


def _relative(norm_BC: Tensor) -> Tensor:
    return norm_BC / (norm_BC.mean(1, keepdim=True) + GRN_EPS)


def grn_mlp(
    x_NC: Tensor,
    norm: nn.LayerNorm,
    mlp: Any,
    images: ImageRows,
    visible_N1: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """LayerNorm, then fc1, GELU, GRN with statistics per image over visible sites, fc2 → (N, C).

    Args:
        norm: the LayerNorm.
        mlp: the layers `fc1`, `grn` and `fc2`, each with weight and bias; fc1 and fc2 may be 1×1
            convolutions.
        images: which image each row belongs to.
        visible_N1: 1 for a visible row, 0 for a hidden one; None if all are visible.
        recompute: recompute fc1 in the backward pass instead of keeping its output.
    """
    fc1, fc2 = mlp.fc1, mlp.fc2
    inputs = [x_NC, norm.weight, norm.bias]
    inputs += [fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias]
    if torch.is_autocast_enabled(x_NC.device.type):
        dtype = torch.get_autocast_dtype(x_NC.device.type)
        inputs = [tensor.to(dtype) for tensor in inputs]
    x_NC, *weights = inputs
    with torch.autocast(x_NC.device.type, enabled=False):
        return _GrnMlp.apply(
            images, visible_N1, recompute, x_NC, mlp.grn.weight, mlp.grn.bias, *weights
        )
