"""Depthwise convolution of packed rows, in windows cut from the map with a halo.

In the first two stages a window is a visible patch, so nothing hidden is computed. In later stages
a patch has few sites, and a window is an image or a large part of one. One `index_select` gathers
the sites of all windows, through a table built once per batch of masks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse.ops.depthwise import correlate

HALO = 3
"""Sites around a window that a 7×7 kernel reaches."""

SMALLEST_PATCH = 4
"""A patch with at least this many sites per side is a window of its own."""

LARGEST = 16
"""Longest side of other windows, in sites."""


Shape = tuple[int, int, int]
"""(B, H, W) of a stage's map."""


@dataclass(frozen=True)
class Windows:
    """The windows of one stage for a batch of masks: G of h×w sites, with a halo of 3 a side.

    Attributes:
        size: (h, w).
        count: G.
        tables: index tables (see `cut_windows`), on the device of the rows.
    """

    size: tuple[int, int]
    count: int
    tables: Mapping[str, Tensor]

    def with_halo(self, rows_NC: Tensor) -> Tensor:
        """Rows → windows (G, C, h+6, w+6), channels last in memory, zeros where no row is."""
        h, w = self.size
        cut = _with_zero(rows_NC).index_select(0, self.tables["halo"])
        return cut.view(self.count, h + 2 * HALO, w + 2 * HALO, -1).permute(0, 3, 1, 2)

    def to_rows(self, windows_GCHW: Tensor) -> Tensor:
        """Windows without halo (G, C, h, w) → rows (N, C)."""
        sites = windows_GCHW.permute(0, 2, 3, 1).reshape(-1, windows_GCHW.shape[1])
        rows = self.tables.get("rows")
        return sites if rows is None else sites.index_select(0, rows)

    def weight_gradient(self, x_NC: Tensor, grad_NC: Tensor) -> Tensor:
        """Gradient of a depthwise kernel (C, 1, 7, 7): see `correlate`."""
        (h, w), shape = self.size, (self.count, x_NC.shape[1])
        x = _with_zero(x_NC).index_select(0, self.tables["halo_last"])
        grad = _with_zero(grad_NC).index_select(0, self.tables["core_last"])
        return correlate(x.view(h + 2 * HALO, w + 2 * HALO, *shape), grad.view(h, w, *shape))


def cut_windows(index_N: Tensor, shape: Shape, side: int, on_cpu: bool) -> Windows:
    """Cut one stage's map into windows, with their index tables on the CPU.

    Tables are int32 and hold row numbers, and N where there is no visible site: `halo`, of the
    windows with their halo, and `rows`, the place of each row in the windows, where windows are not
    patches. For computing on a CPU also `halo_last` and `core_last`, with the windows running
    fastest, for weight gradients.

    Args:
        index_N: int64 position of each row on the flattened (B, H, W) map, on the CPU.
        shape: (B, H, W) of the map.
        side: sites along a patch's side; rows stand patch after patch.
        on_cpu: whether a CPU computes.
    """
    batch, *lengths = shape
    patches = side >= SMALLEST_PATCH
    counts = [length // side if patches else -(-length // LARGEST) for length in lengths]
    h, w = (-(-length // n) for length, n in zip(lengths, counts, strict=True))
    rows, size = len(index_N), (batch, counts[0] * h + 2 * HALO, counts[1] * w + 2 * HALO)
    padded = torch.full(size, rows, dtype=torch.int32)
    image, y, x = torch.unravel_index(index_N, shape)
    padded[image, y + HALO, x + HALO] = torch.arange(rows, dtype=torch.int32)
    halo = padded.unfold(1, h + 2 * HALO, h).unfold(2, w + 2 * HALO, w).flatten(0, 2)
    core = halo[:, HALO:-HALO, HALO:-HALO]
    used = (core < rows).flatten(1).any(1)
    halo, core = halo[used], core[used]
    tables = {"halo": halo.flatten()}
    if on_cpu:
        tables["halo_last"] = halo.permute(1, 2, 0).flatten()
        tables["core_last"] = core.permute(1, 2, 0).flatten()
    if not patches:
        places = (core.flatten() < rows).nonzero().flatten()
        tables["rows"] = places[core.flatten()[places].argsort()].int()
    return Windows((h, w), len(core), tables)


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
