"""The patch engine: plain PyTorch over the visible patches only, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse.engines.base import PackedSites
from sparse.rows import ImageRows
from sparse.sizes import SIDES


class PatchSites(PackedSites):
    """Visible sites of one stage. A 2×2 stride-2 convolution never crosses a patch."""

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        rows, channels = x_NC.shape
        half = self.side // 2
        blocks = x_NC.view(rows // self.side**2, half, 2, half, 2, channels)
        joined = blocks.transpose(2, 3).reshape(rows // 4, 4 * channels)
        return F.linear(joined, weight_OI22.permute(0, 2, 3, 1).flatten(1), bias_O)


def patch_sites(mask_BHW: Tensor, device: torch.device) -> list[PatchSites]:
    """Build index tables from the mask. See `sparse.engines.Engine`."""
    batch, rows, cols = mask_BHW.shape
    image, row, col = (~mask_BHW).nonzero().unbind(1)
    counts = (~mask_BHW).flatten(1).sum(1)
    stages = []
    for side in SIDES:
        h, w = rows * side, cols * side
        corner_P = (image * h + row * side) * w + col * side
        step = torch.arange(side)
        index_N = (corner_P[:, None, None] + step[:, None] * w + step).flatten()
        images = ImageRows.of(counts * side * side, device)
        stages.append(PatchSites(index_N, (batch, h, w), side, images))
    return stages
