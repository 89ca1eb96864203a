"""The interface and the code that all engines share.

Legend of shape suffixes used in this package: B images, N visible sites of a whole batch ("rows"),
C channels, H and W a map's height and width in sites. A *site* is one position of a stage's map; a
stage at stride s has H = height/s by W = width/s of them.
"""

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from sparse.devices import to_device
from sparse.ops.windows import Shape, Windows, windowed_depthwise
from sparse.rows import ImageRows


class Sites(Protocol):
    """The visible sites of one stage for one batch of masks, and the spatial operations on them.

    Everything pointwise (norms, linear layers, activations) is written once, over the rows that
    these methods take and return, so an engine cannot change what the network computes.
    """

    images: ImageRows

    visible_N1: Tensor | None
    """1 for a visible row, 0 for a hidden one, for engines that carry hidden rows."""

    def stem(self, images_BCHW: Tensor, weight_OIKK: Tensor, bias_O: Tensor) -> Tensor:
        """K×K stride-K convolution of the images at the visible sites → (N, O). First stage."""

    def depthwise(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        """K×K depthwise convolution, zeros at hidden sites and outside the image → (N, C)."""

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        """2×2 stride-2 convolution → rows of the next stage (M, O)."""

    def densify(self, x_NC: Tensor) -> Tensor:
        """Rows → the full map (B, C, H, W), zeros at hidden sites."""


def hide(sites: Sites, x_NC: Tensor) -> Tensor:
    """Zero the hidden rows, for engines that carry them."""
    return x_NC if sites.visible_N1 is None else x_NC * sites.visible_N1


class PackedSites:
    """Rows packed without gaps, with their positions on the map: shared by patch and minkowski.

    Rows are ordered patch by patch (images in batch order, patches and the sites within a patch in
    raster order), so a patch is a square block of rows.

    Args:
        index_N: int64 position of each row on the flattened (B, H, W) map, on the CPU.
        shape: (B, H, W) of this stage's map.
        side: sites along a patch's side.
        images: which image each row belongs to, and the device of the rows.
    """

    visible_N1: Tensor | None = None

    def __init__(self, index_N: Tensor, shape: Shape, side: int, images: ImageRows) -> None:
        self.shape, self.side, self.images = shape, side, images
        self.index_N = to_device(index_N, images.device)
        self.windows = Windows(index_N, shape, side, images.device)

    def stem(self, images_BCHW: Tensor, weight_OIKK: Tensor, bias_O: Tensor) -> Tensor:
        (b, h, w), k = self.shape, weight_OIKK.shape[-1]
        blocks = images_BCHW.reshape(b, -1, h, k, w, k).permute(0, 2, 4, 1, 3, 5)
        pixels = blocks.reshape(b * h * w, -1).index_select(0, self.index_N)
        return F.linear(pixels, weight_OIKK.flatten(1), bias_O)

    def depthwise(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        return windowed_depthwise(x_NC, weight_C1KK, bias_C, self.windows)

    def densify(self, x_NC: Tensor) -> Tensor:
        b, h, w = self.shape
        channels = x_NC.shape[1]
        canvas = x_NC.new_zeros(b * h * w, channels).index_copy(0, self.index_N, x_NC)
        return canvas.view(b, h, w, channels).permute(0, 3, 1, 2)
