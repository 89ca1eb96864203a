"""FCMAE (arXiv 2301.00808, section 3): mask, encode the visible patches, decode, compare."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcmae.model.decoder import Decoder
from fcmae.model.loss import reconstruction_loss
from fcmae.model.mask import grid_of, random_masks
from sparse import SparseConvNeXtV2
from sparse.devices import to_device
from sparse.engines.base import Layout


@dataclass
class FCMAEOutput:
    """The result of a forward pass.

    Attributes:
        loss: scalar, float32: mean squared error over the hidden patches.
        pred: (B, C·P², H/P, W/P), P the side of a patch in pixels; the channel axis in the order
            (row, column, channel).
        mask: (B, H/P, W/P) bool, True = hidden.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor


class FCMAE(nn.Module):
    """A fully convolutional masked autoencoder around a sparse ConvNeXt V2 encoder.

    Args:
        encoder: the sparse encoder.
        decoder_dim, decoder_depth: see `Decoder`.
        mask_ratio: share of patches hidden when `forward` draws the mask.
        norm_pix_loss: normalise each patch of the target.
    """

    def __init__(
        self,
        encoder: SparseConvNeXtV2,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        mask_ratio: float = 0.6,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        chans, patch = encoder.in_chans, encoder.patch_size
        self.decoder = Decoder(encoder.dims[-1], decoder_dim, decoder_depth, chans, patch)
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss

    @classmethod
    def from_size(
        cls,
        model: str,
        depths: list[int] | None = None,
        dims: list[int] | None = None,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        mask_ratio: float = 0.6,
        norm_pix_loss: bool = True,
        **encoder_options: object,
    ) -> "FCMAE":
        """Build around a published encoder size; `encoder_options` as for `SparseConvNeXtV2`.

        Raises:
            InputError: unknown size or engine.
        """
        encoder = SparseConvNeXtV2.from_size(model, depths, dims, **encoder_options)
        return cls(encoder, decoder_dim, decoder_depth, mask_ratio, norm_pix_loss)

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms without weight decay; timm's models have this too."""
        return {"decoder.mask_token"}

    def forward(
        self,
        images_BCHW: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        layout: Layout | None = None,
    ) -> FCMAEOutput:
        """Reconstruct the hidden patches of normalised images.

        Args:
            images_BCHW: height and width multiples of P.
            mask: (B, H/P, W/P) bool, True = hidden, preferably on the CPU; None draws a random
                mask with `mask_ratio`.
            generator: CPU generator for a random mask.
            layout: of the mask, if it is made ahead; see `SparseConvNeXtV2.forward`.

        Raises:
            InputError: the shapes do not match, or the ratio leaves nothing visible or nothing
                hidden.
        """
        if mask is None:
            batch, _, height, width = images_BCHW.shape
            grid = grid_of((height, width), self.encoder.patch_size)
            mask = random_masks(batch, grid, self.mask_ratio, generator)
        features_BCHW = self.encoder(images_BCHW, mask, layout)
        hidden = to_device(mask, images_BCHW.device)
        pred = self.decoder(features_BCHW, hidden)
        loss = reconstruction_loss(pred, images_BCHW, hidden, self.norm_pix_loss)
        return FCMAEOutput(loss, pred, mask)
