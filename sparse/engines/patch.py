"""The patch engine: plain PyTorch over the visible patches only, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse.engines.base import Layout, PackedSites, Stage
from sparse.ops.windows import neighbours
from sparse.sizes import SIDES


class PatchSites(PackedSites):
    """Visible sites of one stage. A 2×2 stride-2 convolution never crosses a patch."""

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        rows, channels = x_NC.shape
        half = self.side // 2
        blocks = x_NC.view(rows // self.side**2, half, 2, half, 2, channels)
        joined = blocks.transpose(2, 3).reshape(rows // 4, 4 * channels)
        return F.linear(joined, weight_OI22.permute(0, 2, 3, 1).flatten(1), bias_O)


def lay_out_patches(mask_BHW: Tensor) -> Layout:
    """Lay out the sites of a mask on the CPU; see `sparse.engines.Engine`."""
    batch, rows, cols = mask_BHW.shape
    visible = ~mask_BHW
    image, row, col = visible.nonzero().unbind(1)
    patches_B, near = visible.flatten(1).sum(1), neighbours(visible)
    stages: list[Stage] = []
    tables: list[Tensor] = []
    for side in SIDES:
        h, w = rows * side, cols * side
        corner_P = (image * h + row * side) * w + col * side
        step = torch.arange(side)
        index_N = (corner_P[:, None, None] + step[:, None] * w + step).flatten()
        stage, own = Stage.of(index_N, (batch, h, w), side, patches_B, near)
        stages.append(stage)
        tables += own.values()
    return Layout(stages, torch.cat(tables))


def patch_sites(mask: Tensor | Layout, device: torch.device) -> list[PatchSites]:
    """Sites of a mask (B, H, W) or of its layout. See `sparse.engines.Engine`."""
    layout = mask if isinstance(mask, Layout) else lay_out_patches(mask)
    return [PatchSites(*part) for part in layout.on(device)]
