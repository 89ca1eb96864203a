"""Depthwise convolution of packed rows, in windows cut from the map with a halo.

In the first two stages a window is a visible patch, so nothing hidden is computed. In later stages
a patch has few sites, and a window is an image or a large part of one. One `index_select` gathers
the sites of all windows, through a table built once per batch of masks.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse.devices import to_device
from sparse.ops.depthwise import correlate

HALO = 3
"""Sites around a window that a 7×7 kernel reaches."""

SMALLEST_PATCH = 4
"""A patch with at least this many sites per side is a window of its own."""

LARGEST = 16
"""Longest side of other windows, in sites."""


Shape = tuple[int, int, int]
"""(B, H, W) of a stage's map."""


class Windows:
    """Index tables of one stage for one batch of masks.

    G windows of h×w sites have a halo of 3 on each side. Tables hold row numbers, and N where
    there is no visible site.

    Args:
        index_N: int64 position of each row on the flattened (B, H, W) map, on the CPU.
        shape: (B, H, W) of the map.
        side: sites along a patch's side; rows are ordered patch by patch.
        device: device of the rows.
    """

    def __init__(self, index_N: Tensor, shape: Shape, side: int, device: torch.device) -> None:
        batch, *lengths = shape
        patches = side >= SMALLEST_PATCH
        counts = [length // side if patches else -(-length // LARGEST) for length in lengths]
        self.size = tuple(-(-length // n) for length, n in zip(lengths, counts, strict=True))
        (h, w), rows = self.size, len(index_N)

        padded = torch.full((batch, counts[0] * h + 2 * HALO, counts[1] * w + 2 * HALO), rows,
                            dtype=torch.int32)  # fmt: skip
        image, y, x = torch.unravel_index(index_N, shape)
        padded[image, y + HALO, x + HALO] = torch.arange(rows, dtype=torch.int32)
        halo = padded.unfold(1, h + 2 * HALO, h).unfold(2, w + 2 * HALO, w).flatten(0, 2)
        core = halo[:, HALO:-HALO, HALO:-HALO]
        used = (core < rows).flatten(1).any(1)
        halo, core = halo[used], core[used]

        self.count = len(core)
        self.halo = to_device(halo.flatten(), device)
        self.core = to_device(core.flatten(), device)
        # The same with the window index fastest, for weight gradients.
        self.halo_last = to_device(halo.permute(1, 2, 0).flatten(), device)
        self.core_last = to_device(core.permute(1, 2, 0).flatten(), device)
        self.rows: Tensor | None = None
        if not patches:
            self.rows = (core.flatten() < rows).nonzero().flatten()
            self.rows = to_device(self.rows[core.flatten()[self.rows].argsort()], device)

    def with_halo(self, rows_NC: Tensor) -> Tensor:
        """Rows → windows (G, C, h+6, w+6), channels last in memory, zeros where no row is."""
        h, w = self.size
        cut = _with_zero(rows_NC).index_select(0, self.halo)
        return cut.view(self.count, h + 2 * HALO, w + 2 * HALO, rows_NC.shape[1]).permute(
            0, 3, 1, 2
        )

    def to_rows(self, windows_GCHW: Tensor) -> Tensor:
        """Windows without halo (G, C, h, w) → rows (N, C)."""
        sites = windows_GCHW.permute(0, 2, 3, 1).reshape(-1, windows_GCHW.shape[1])
        return sites if self.rows is None else sites.index_select(0, self.rows)

    def weight_gradient(self, x_NC: Tensor, grad_NC: Tensor) -> Tensor:
        """Gradient of a depthwise kernel (C, 1, 7, 7): see `correlate`."""
        (h, w), shape = self.size, (self.count, x_NC.shape[1])
        x = _with_zero(x_NC).index_select(0, self.halo_last)
        grad = _with_zero(grad_NC).index_select(0, self.core_last)
        return correlate(x.view(h + 2 * HALO, w + 2 * HALO, *shape), grad.view(h, w, *shape))


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
        if not windows.count:
            return torch.zeros_like(x_NC)
        return windows.to_rows(F.conv2d(windows.with_halo(x_NC), weight, bias, groups=len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NC):  # type: ignore[no-untyped-def]
        x_NC, weight = ctx.saved_tensors
        windows: Windows = ctx.windows
        if not windows.count:
            return grad_NC, torch.zeros_like(weight), grad_NC.sum(0), None
        cut = windows.with_halo(grad_NC)
        # With an odd kernel and stride 1, the input gradient is a convolution with it flipped.
        dx_NC = windows.to_rows(F.conv2d(cut, weight.flip(2, 3), groups=len(weight)))
        if grad_NC.device.type == "cpu":
            dweight = windows.weight_gradient(x_NC, grad_NC).to(weight.dtype)
        else:
            _, dweight, _ = torch.ops.aten.convolution_backward(
                cut[:, :, HALO:-HALO, HALO:-HALO], windows.with_halo(x_NC), weight, None,
                [1, 1], [0, 0], [1, 1], False, [0, 0], len(weight), [False, True, False],
            )  # fmt: skip
        return dx_NC, dweight, grad_NC.sum(0), None
