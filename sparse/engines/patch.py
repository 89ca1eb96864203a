"""The patch engine: plain PyTorch that computes only the visible patches. Any device, no compiler.

Within a patch, rows follow the Z-order curve: the four sites that a 2×2 stride-2 convolution joins
are then neighbours in memory at every stage, and downsampling is one matrix product on a view.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse.engines.base import CanvasSites, ImageRows
from sparse.sizes import PATCH, STRIDES


@cache
def _z_order(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of the side² sites of a patch along the Z-order curve (side = 2^k)."""
    rank = torch.arange(side * side)
    y = torch.zeros_like(rank)
    x = torch.zeros_like(rank)
    for bit in range(side.bit_length() - 1):
        x |= (rank >> (2 * bit) & 1) << bit
        y |= (rank >> (2 * bit + 1) & 1) << bit
    return y, x


class PatchSites(CanvasSites):
    """Visible sites of one stage, patch after patch."""

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        rows, channels = x_NC.shape
        joined = x_NC.view(rows // 4, 4 * channels)  # (M, 2·2·C), rows before columns
        return F.linear(joined, weight_OI22.permute(0, 2, 3, 1).flatten(1), bias_O)


class PatchEngine:
    """Packed rows for all that is pointwise, a canvas for the depthwise convolution."""

    name = "patch"

    def sites(self, mask_BHW: Tensor, device: torch.device) -> list[PatchSites]:
        batch, rows, cols = mask_BHW.shape
        b, row, col = (~mask_BHW).nonzero().unbind(1)
        counts = (~mask_BHW).flatten(1).sum(1)
        stages = []
        for stride in STRIDES:
            side = PATCH // stride
            h, w = rows * side, cols * side
            y, x = _z_order(side)
            corner = (b * h + row * side) * w + col * side
            index = (corner[:, None] + y * w + x).flatten().to(device, non_blocking=True)
            images = ImageRows(counts * side * side, device)
            stages.append(PatchSites(index, (batch, h, w), images))
        return stages
