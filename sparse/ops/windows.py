"""Depthwise convolution of packed rows, over windows cut from the map.

In the first two stages a window is a visible patch with a halo of sites around it, so nothing
hidden is computed. In the last two, where a patch has four sites or one, a halo would be larger
than the patch, and a window is the whole map of an image. One `index_select` gathers the sites of
all windows, through a table built once per batch of masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse.ops.depthwise import correlate

HALO = 3
"""Sites around a window that a 7×7 kernel reaches."""

SMALLEST_WINDOW = 4
"""A patch with at least this many sites per side is a window of its own."""


def neighbours(visible_BHW: Tensor) -> Tensor:
    """Rank of each visible patch and its eight neighbours among all P visible patches → (P, 3, 3).

    P stands for a neighbour that is hidden or outside the image. int32.
    """
    (b, h, w), count = visible_BHW.shape, int(visible_BHW.sum())
    ranks = torch.full((b, h + 2, w + 2), count, dtype=torch.int32)
    ranks[:, 1:-1, 1:-1][visible_BHW] = torch.arange(count, dtype=torch.int32)
    return ranks.unfold(1, 3, 1).unfold(2, 3, 1)[visible_BHW]


def window_table(index_N: Tensor, shape: tuple[int, int, int], side: int, near: Tensor) -> Tensor:
    """Row number of each site of all windows, N where there is no visible site → int32, flat.

    Args:
        index_N: int64 position of each row on the flattened (B, H, W) map, patch after patch.
        shape: (B, H, W) of the map.
        side: sites along a patch's side.
        near: of `neighbours`.
    """
    rows = len(index_N)
    if side >= SMALLEST_WINDOW:
        place = torch.arange(side - HALO, 2 * side + HALO, dtype=torch.int32)  # on 3×3 patches
        patch, site = place // side, place % side
        first = near[:, patch[:, None], patch] * side**2
        return (first + (site[:, None] * side + site)).clamp_(max=rows).flatten()
    b, h, w = shape
    table = torch.full((b * h * w,), rows, dtype=torch.int32)
    table[index_N] = torch.arange(rows, dtype=torch.int32)
    return table


@dataclass(frozen=True)
class Windows:
    """The windows of one stage for a batch of masks: G of h×w sites.

    Attributes:
        size: (h, w), without the halo.
        halo: sites around a window that are gathered with it; the convolution adds zeros for the
            rest of the kernel's reach.
        table: of `window_table`, on the device of the rows.
        index_N: the place of each row among the sites of all windows, where these are not patches.
    """

    size: tuple[int, int]
    halo: int
    table: Tensor
    index_N: Tensor | None

    @classmethod
    def of(
        cls, shape: tuple[int, int, int], side: int, table: Tensor, index_N: Tensor
    ) -> "Windows":
        """Build from the arguments and the result of `window_table`."""
        if side >= SMALLEST_WINDOW:
            return cls((side, side), HALO, table, None)
        return cls(shape[1:], 0, table, index_N)

    def convolve(self, x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor | None = None) -> Tensor:
        """K×K depthwise convolution → (N, C)."""
        channels = len(weight_C1KK)
        y_GCHW = F.conv2d(
            self._cut(x_NC), weight_C1KK, bias_C, padding=HALO - self.halo, groups=channels
        )
        sites = y_GCHW.permute(0, 2, 3, 1).reshape(-1, channels)
        return sites if self.index_N is None else sites.index_select(0, self.index_N)

    def weight_gradient(self, x_NC: Tensor, grad_NC: Tensor, weight_C1KK: Tensor) -> Tensor:
        """Gradient of the kernel of `convolve` (C, 1, K, K)."""
        if x_NC.device.type == "cpu":
            return self.correlation(x_NC, grad_NC).to(weight_C1KK.dtype)
        grad_GCHW, pad, groups = self._inner(self._cut(grad_NC)), HALO - self.halo, x_NC.shape[1]
        _, dweight, _ = torch.ops.aten.convolution_backward(
            grad_GCHW, self._cut(x_NC), weight_C1KK, None,
            [1, 1], [pad, pad], [1, 1], False, [0, 0], groups, [False, True, False],
        )  # fmt: skip
        return dweight

    def correlation(self, x_NC: Tensor, grad_NC: Tensor) -> Tensor:
        """The same on a CPU: see `correlate`."""
        pad, (h, w) = HALO - self.halo, self.size
        inputs_GHW = F.pad(self._view(self.table), (pad,) * 4, value=len(x_NC))
        outputs_GHW = inputs_GHW[:, HALO : HALO + h, HALO : HALO + w]
        x_NC, grad_NC = _with_zero(x_NC), _with_zero(grad_NC)

        def cut(some: slice) -> tuple[Tensor, Tensor]:
            return _gather(x_NC, inputs_GHW[some]), _gather(grad_NC, outputs_GHW[some])

        window_bytes = inputs_GHW[0].numel() * x_NC[0].nbytes
        return correlate(cut, len(inputs_GHW), window_bytes)

    def _cut(self, rows_NC: Tensor) -> Tensor:
        """Rows → windows with their halo (G, C, …), channels last; zeros where no row is."""
        cut = _with_zero(rows_NC).index_select(0, self.table)
        return self._view(cut).permute(0, 3, 1, 2)

    def _view(self, sites: Tensor) -> Tensor:
        """View the sites of all windows as (G, h, w) and what follows."""
        h, w = (length + 2 * self.halo for length in self.size)
        return sites.view(len(sites) // (h * w), h, w, *sites.shape[1:])

    def _inner(self, windows: Tensor) -> Tensor:
        """Without the halo."""
        h, w = self.size
        return windows[..., self.halo : self.halo + h, self.halo : self.halo + w]


def _gather(rows_NC: Tensor, table_GHW: Tensor) -> Tensor:
    """Rows → (H, W, G, C)."""
    table_HWG = table_GHW.permute(1, 2, 0)
    return rows_NC.index_select(0, table_HWG.flatten()).view(*table_HWG.shape, -1)


def _with_zero(rows_NC: Tensor) -> Tensor:
    """Append a row of zeros, at index N."""
    return torch.cat([rows_NC, rows_NC.new_zeros(1, rows_NC.shape[1])])


def windowed_depthwise(
    x_NC: Tensor, weight_C1KK: Tensor, bias_C: Tensor, windows: Windows
) -> Tensor:
    """7×7 depthwise convolution of rows, zeros at hidden sites and outside the image → (N, C)."""
    if torch.is_autocast_enabled(x_NC.device.type):
        dtype = torch.get_autocast_dtype(x_NC.device.type)
        x_NC, weight_C1KK, bias_C = x_NC.to(dtype), weight_C1KK.to(dtype), bias_C.to(dtype)
    return _WindowedDepthwise.apply(x_NC, weight_C1KK, bias_C, windows)


class _WindowedDepthwise(torch.autograd.Function):
    """Saves only the rows; the backward pass cuts the windows again."""

    @staticmethod
    def forward(ctx, x_NC, weight, bias, windows):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_NC, weight)
        ctx.windows = windows
        return windows.convolve(x_NC, weight, bias) if len(x_NC) else torch.zeros_like(x_NC)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NC):  # type: ignore[no-untyped-def]
        x_NC, weight = ctx.saved_tensors
        if not len(x_NC):
            return grad_NC, torch.zeros_like(weight), grad_NC.sum(0), None
        # With an odd kernel and stride 1, the input gradient is a convolution with it flipped.
        dx_NC = ctx.windows.convolve(grad_NC, weight.flip(2, 3))
        dweight = ctx.windows.weight_gradient(x_NC, grad_NC, weight)
        return dx_NC, dweight, grad_NC.sum(0), None
