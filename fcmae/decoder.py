"""The FCMAE decoder (arXiv 2301.00808, section 3): projection, mask token, ConvNeXt block, pixels.

It is dense: every patch position takes part, the hidden ones starting from a learned token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse.encoder import init_weights
from sparse.engines.dense import DenseSites
from sparse.layers import SparseBlock
from sparse.sizes import PATCH


class Decoder(nn.Module):
    """Predict the pixels of every patch from the encoder's features.

    Args:
        in_dim: channels of the encoder's last stage.
        dim: width of the decoder; the paper's is 512.
        depth: ConvNeXt V2 blocks; the paper's is 1.
        out_chans: channels of the images.
    """

    def __init__(self, in_dim: int, dim: int, depth: int, out_chans: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.blocks = nn.ModuleList(SparseBlock(dim, 0.0, True, None) for _ in range(depth))
        self.pred = nn.Conv2d(dim, out_chans * PATCH**2, 1)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, features_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
        """Decode.

        Args:
            features_BCHW: (B, in_dim, h, w), zeros where hidden.
            mask_BHW: (B, h, w) bool on the features' device, True = hidden.

        Returns:
            (B, out_chans·32², h, w), the channel axis in the order (row, column, channel).
        """
        x_BDHW = self.proj(features_BCHW)
        x_BDHW = torch.where(mask_BHW[:, None], self.mask_token.to(x_BDHW.dtype), x_BDHW)
        nothing_hidden = torch.zeros(mask_BHW.shape, dtype=torch.bool)
        sites = DenseSites(nothing_hidden, 1, features_BCHW.device)
        x_ND = x_BDHW.permute(0, 2, 3, 1).flatten(0, 2)
        for block in self.blocks:
            x_ND = block(x_ND, sites)
        return self.pred(sites.densify(x_ND))
