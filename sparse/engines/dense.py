"""The dense engine: masked dense convolution (arXiv 2301.00808, appendix A.2), the reference.

Rows are all sites of the map, hidden ones included, in raster order; they are zeroed before every
depthwise convolution and in GRN's statistics.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse.devices import to_device
from sparse.engines.base import hide
from sparse.rows import ImageRows
from sparse.sizes import SIDES


class DenseSites:
    """All sites of one stage: rows are a channels-last (B, H, W, C) map, flattened.

    Args:
        mask_BHW: bool on the CPU, one entry per patch, True = hidden.
        side: sites along a patch's side at this stage.
        device: device of the rows.
    """

    def __init__(self, mask_BHW: Tensor, side: int, device: torch.device) -> None:
        hidden = mask_BHW.repeat_interleave(side, 1).repeat_interleave(side, 2)
        self.shape = batch, height, width = hidden.shape
        self.visible_N1: Tensor | None = None
        if hidden.any():
            self.visible_N1 = to_device((~hidden).reshape(-1, 1), device, torch.float32)
        self.images = ImageRows(batch, height * width, device)

    def map_of(self, x_NC: Tensor) -> Tensor:
        """Rows → (B, C, H, W), channels last in memory."""
        return x_NC.view(*self.shape, x_NC.shape[1]).permute(0, 3, 1, 2)

    def stem(self, images_BCHW: Tensor, weight_OIKK: Tensor, bias_O: Tensor) -> Tensor:
        images = images_BCHW.contiguous(memory_format=torch.channels_last)
        return rows_of(F.conv2d(images, weight_OIKK, bias_O, stride=weight_OIKK.shape[-1]))

    def depthwise(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        pad = weight_C1KK.shape[-1] // 2
        x_BCHW = self.map_of(x_NC)
        return rows_of(F.conv2d(x_BCHW, weight_C1KK, bias_C, padding=pad, groups=len(bias_C)))

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        return rows_of(F.conv2d(self.map_of(x_NC), weight_OI22, bias_O, stride=2))

    def densify(self, x_NC: Tensor) -> Tensor:
        return self.map_of(hide(self, x_NC))


def rows_of(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) → rows (B·H·W, C), a view of maps that have channels last in memory."""
    return x_BCHW.permute(0, 2, 3, 1).reshape(-1, x_BCHW.shape[1])


def dense_sites(mask_BHW: Tensor, device: torch.device) -> list[DenseSites]:
    """Every site, hidden or not, masked. See `sparse.engines.Engine`."""
    return [DenseSites(mask_BHW, side, device) for side in SIDES]
