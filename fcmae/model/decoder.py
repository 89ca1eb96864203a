"""The FCMAE decoder (arXiv 2301.00808, section 3): projection, mask token, ConvNeXt block, pixels.

It is dense: it computes every patch position, and hidden ones start from a learned token. Inside, a
map is rows (B·h·w, D), as in the encoder.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse.block import SparseBlock, weight_and_bias
from sparse.encoder import init_weights
from sparse.engines.dense import DenseSites, rows_of
from sparse.ops.depthwise import depthwise
from sparse.rows import ImageRows
from sparse.sizes import PATCH


class Decoder(nn.Module):
    """Predict the pixels of every patch from the encoder's features.

    Args:
        in_dim: channels of the encoder's last stage.
        dim: width of the decoder; the paper's is 512.
        depth: ConvNeXt V2 blocks; the paper's is 1.
        out_chans: channels of the images.
        patch_size: side P of a patch in pixels.
    """

    def __init__(
        self, in_dim: int, dim: int, depth: int, out_chans: int, patch_size: int = PATCH
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.blocks = nn.ModuleList(SparseBlock(dim, 0.0, True, None) for _ in range(depth))
        self.pred = nn.Conv2d(dim, out_chans * patch_size**2, 1)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Decode.

        Args:
            features_BCHW: (B, in_dim, h, w), zeros where hidden.
            mask_BHW: (B, h, w) bool on the features' device, True = hidden.

        Returns:
            (B, out_chans·P², h, w), the channel axis in the order (row, column, channel).
        """
        sites = _AllSites(mask_BHW.shape, features_BCHW.device)
        x_ND = _linear(self.proj, rows_of(features_BCHW))
        token_D = self.mask_token.flatten().to(x_ND.dtype)
        x_ND = torch.where(mask_BHW.reshape(-1, 1), token_D, x_ND)
        for block in self.blocks:
            x_ND = block(x_ND, sites)
        return sites.densify(_linear(self.pred, x_ND))


class _AllSites(DenseSites):
    """Every site of a map (B, h, w), with a depthwise convolution that is fast on CPUs."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        (batch, height, width), self.shape, self.visible_N1 = shape, shape, None
        self.images = ImageRows(batch, height * width, device)

    def depthwise(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        return rows_of(depthwise(self.map_of(x_NC), weight_C1KK, bias_C))


def _linear(conv: nn.Conv2d, x_NC: Tensor) -> Tensor:
    """A 1×1 convolution of rows."""
    weight, bias = weight_and_bias(conv)
    return F.linear(x_NC, weight.flatten(1), bias)
