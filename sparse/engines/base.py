"""What an engine is, and what all engines share.

Legend of shape suffixes used in this package: B images, N visible sites of a whole batch ("rows"),
C channels, H and W a map's height and width in sites. A *site* is one position of a stage's map; a
stage at stride s has H = height/s by W = width/s of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class ImageRows:
    """Which image each row belongs to; rows of one image stand together, images in batch order.

    A batch whose images all show equally many sites, as in pretraining, is handled as a
    (B, n, C) view; any other through an index. Both give the same numbers.

    Args:
        counts_B: visible sites of each image, int64, on the CPU.
        device: where the rows will be.
    """

    def __init__(self, counts_B: Tensor, device: torch.device) -> None:
        self.batch = len(counts_B)
        self.uniform = bool((counts_B == counts_B[0]).all())
        self.per_image = int(counts_B[0])
        self.index: Tensor | None = None
        if not self.uniform:
            self.index = torch.repeat_interleave(counts_B).to(device, non_blocking=True)

    def split(self, x_NC: Tensor) -> Tensor:
        """View rows as (B, n, C) where possible, else leave them (N, C)."""
        shape = (self.batch, self.per_image, x_NC.shape[-1])
        return x_NC.view(shape) if self.uniform else x_NC

    def sum(self, x: Tensor) -> Tensor:
        """Add up the rows of each image: a result of `split` → (B, C)."""
        if self.index is None:
            return x.sum(1)
        # A product with the membership matrix: index_add_ is many times slower on the CPU.
        member_BN = self.index == torch.arange(self.batch, device=x.device)[:, None]
        return member_BN.to(x.dtype) @ x

    def expand(self, s_BC: Tensor) -> Tensor:
        """Repeat per-image values so that they broadcast against a result of `split`."""
        return s_BC[:, None] if self.index is None else s_BC.index_select(0, self.index)


class Sites(Protocol):
    """The visible sites of one stage for one batch of masks, and the spatial operations on them.

    Everything pointwise (norms, linear layers, activations) is written once, over the rows that
    these methods take and return, so an engine cannot change what the network computes.
    """

    images: ImageRows
    visible_N1: Tensor | None
    """1 for a visible row, 0 for a hidden one, for engines that carry hidden rows; else None."""

    def stem(self, images_BCHW: Tensor, weight_OI44: Tensor, bias_O: Tensor) -> Tensor:
        """4×4 stride-4 convolution of the images at the visible sites → (N, O). First stage."""
        ...

    def depthwise(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        """K×K depthwise convolution, zeros at hidden sites and outside the image → (N, C)."""
        ...

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        """2×2 stride-2 convolution → rows of the next stage (M, O)."""
        ...

    def densify(self, x_NC: Tensor) -> Tensor:
        """Rows → the full map (B, C, H, W), zeros at hidden sites."""
        ...


class Engine(Protocol):
    """Decides where the visible sites are and how spatial operations run on them. Stateless."""

    name: str

    def sites(self, mask_BHW: Tensor, device: torch.device) -> list[Sites]:
        """Lay out the four stages (strides 4, 8, 16, 32) for a batch of masks.

        Args:
            mask_BHW: bool on the CPU, one entry per 32×32 patch, True = hidden.
            device: where images and parameters are.
        """
        ...


def hide(sites: Sites, x_NC: Tensor) -> Tensor:
    """Zero the hidden rows of engines that carry them; others have none."""
    return x_NC if sites.visible_N1 is None else x_NC * sites.visible_N1


class CanvasSites:
    """Rows packed without gaps, with their positions on the full map: shared by patch and minkowski.

    Args:
        index_N: int64 position of each row on the flattened (B, H, W) map, grouped by image.
        shape: (B, H, W) of this stage's map.
        images: which image each row belongs to.
    """

    visible_N1 = None

    def __init__(self, index_N: Tensor, shape: tuple[int, int, int], images: ImageRows) -> None:
        self.index_N = index_N
        self.shape = shape
        self.images = images

    def stem(self, images_BCHW: Tensor, weight_OI44: Tensor, bias_O: Tensor) -> Tensor:
        b, h, w = self.shape
        blocks = images_BCHW.reshape(b, -1, h, 4, w, 4).permute(0, 2, 4, 1, 3, 5)
        pixels = blocks.reshape(b * h * w, -1).index_select(0, self.index_N)
        return F.linear(pixels, weight_OI44.flatten(1), bias_O)

    def depthwise(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_NC.device.type):
            dtype = torch.get_autocast_dtype(x_NC.device.type)
            x_NC, weight_C1KK, bias_C = x_NC.to(dtype), weight_C1KK.to(dtype), bias_C.to(dtype)
        return _CanvasDepthwise.apply(x_NC, weight_C1KK, bias_C, self.index_N, self.shape)

    def densify(self, x_NC: Tensor) -> Tensor:
        b, h, w = self.shape
        canvas = x_NC.new_zeros(b * h * w, x_NC.shape[1]).index_copy(0, self.index_N, x_NC)
        return canvas.view(b, h, w, x_NC.shape[1]).permute(0, 3, 1, 2)


def _to_canvas(x_NC: Tensor, index_N: Tensor, shape: tuple[int, int, int]) -> Tensor:
    b, h, w = shape
    canvas = x_NC.new_zeros(b * h * w, x_NC.shape[1]).index_copy_(0, index_N, x_NC)
    return canvas.view(b, h, w, x_NC.shape[1]).permute(0, 3, 1, 2)  # channels-last in memory


def _from_canvas(canvas_BCHW: Tensor, index_N: Tensor) -> Tensor:
    rows = canvas_BCHW.permute(0, 2, 3, 1).reshape(-1, canvas_BCHW.shape[1])
    return rows.index_select(0, index_N)


class _CanvasDepthwise(torch.autograd.Function):
    """Depthwise convolution of packed rows by way of a zero-filled canvas.

    Only the rows are saved; the canvas, 2.58 times as large at 60 % hidden, is laid out again in
    the backward pass.
    """

    @staticmethod
    def forward(ctx, x_NC, weight, bias, index_N, shape):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_NC, weight, index_N)
        ctx.shape = shape
        canvas = _to_canvas(x_NC, index_N, shape)
        out = F.conv2d(canvas, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        return _from_canvas(out, index_N)

    @staticmethod
    def backward(ctx, grad_NC):  # type: ignore[no-untyped-def]
        x_NC, weight, index_N = ctx.saved_tensors
        pad = weight.shape[-1] // 2
        need = ctx.needs_input_grad
        dx, dw, _ = torch.ops.aten.convolution_backward(
            _to_canvas(grad_NC, index_N, ctx.shape), _to_canvas(x_NC, index_N, ctx.shape), weight,
            None, [1, 1], [pad, pad], [1, 1], False, [0, 0], len(weight), [need[0], need[1], False],
        )  # fmt: skip
        dx_NC = _from_canvas(dx, index_N) if need[0] else None
        return dx_NC, dw, grad_NC.sum(0) if need[2] else None, None, None
