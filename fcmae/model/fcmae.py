"""FCMAE (arXiv 2301.00808, section 3): mask, encode the visible patches, decode, compare."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.model.decoder import Decoder
from fcmae.model.graph import Graph
from fcmae.model.loss import reconstruction_loss
from fcmae.model.mask import grid_of, random_masks
from sparse import SparseConvNeXtV2
from sparse.devices import to_device
from sparse.engines.base import Layout

GRAPH_DEVICES = ("cuda",)
"""Where passes can be recorded."""


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

    Attributes:
        cuda_graph: whether training passes on a GPU whose masks are laid out ahead replay one CUDA
            graph. The encoder must use no random numbers then (no stochastic depth), and the
            prediction that `forward` returns is overwritten by the next pass.
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
        self.cuda_graph = False
        self._graph: tuple[Any, Graph] | None = None

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
        valid: Tensor | None = None,
    ) -> FCMAEOutput:
        """Reconstruct the hidden patches of normalised images.

        Args:
            images_BCHW: height and width multiples of P.
            mask: (B, H/P, W/P) bool, True = hidden, preferably on the CPU; None draws a random
                mask with `mask_ratio`.
            generator: CPU generator for a random mask.
            layout: of the mask, if it is made ahead; see `SparseConvNeXtV2.forward`.
            valid: (B, H, W) bool, which pixels count; None if all do. The others are read as 0, the
                mean, and take no part in the loss and its targets.

        Raises:
            InputError: the shapes do not match, or the ratio leaves nothing visible or nothing
                hidden.
        """
        if mask is None:
            batch, _, height, width = images_BCHW.shape
            grid = grid_of((height, width), self.encoder.patch_size)
            mask = random_masks(batch, grid, self.mask_ratio, generator)
        device, graph = images_BCHW.device, None
        if valid is not None:
            valid = to_device(valid, device)
            images_BCHW = images_BCHW.masked_fill(~valid[:, None], 0)
        elif layout is not None:
            graph = self._graph_for(images_BCHW, layout)
        if graph is not None and layout is not None:
            loss, pred = graph(images_BCHW, mask, layout.tables)
        else:
            loss, pred = self._reconstruct(
                images_BCHW, mask, to_device(mask, device), layout, valid
            )
        return FCMAEOutput(loss, pred, mask)

    def _reconstruct(
        self,
        images_BCHW: Tensor,
        mask: Tensor,
        hidden: Tensor,
        layout: Layout | None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the prediction; `hidden` is the mask on the device of the images."""
        pred = self.decoder(self.encoder(images_BCHW, mask, layout), hidden)
        return reconstruction_loss(pred, images_BCHW, hidden, self.norm_pix_loss, valid), pred

    def _graph_for(self, images_BCHW: Tensor, layout: Layout) -> Graph | None:
        """The graph of passes like this one, recorded at the first; None if it must be eager."""
        device, stages = images_BCHW.device, layout.stages
        if not self.cuda_graph or device.type not in GRAPH_DEVICES or not torch.is_grad_enabled():
            return None
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        weights = self.decoder.mask_token.data_ptr()  # another one if they were moved
        key = images_BCHW.shape, images_BCHW.dtype, device, stages, autocast, weights
        if self._graph is None and all(stage.per_image for stage in stages):

            def run(images: Tensor, hidden: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
                return self._reconstruct(images, hidden, hidden, Layout(stages, tables))

            batch, (_, h, w) = len(images_BCHW), stages[-1].shape
            hidden = torch.zeros(batch, h, w, dtype=torch.bool, device=device)
            example = images_BCHW, hidden, to_device(layout.tables, device)
            self._graph = key, Graph(run, self.parameters(), example)
        return self._graph[1] if self._graph is not None and self._graph[0] == key else None
