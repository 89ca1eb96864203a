"""Maps of a block's channels side by side (arXiv 2301.00808, Figure 3): `fcmae diversity --maps`.

As in the paper, the widest activations of a block: after GELU and, in V2, GRN. Collapsed channels
show as maps that are dark everywhere, bright everywhere, or all alike.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fcmae.inspect.embedding import pooled
from sparse import SparseConvNeXtV2
from sparse.block import SparseBlock
from sparse.engines.base import Sites
from sparse.errors import InputError

SHOWN = 64
"""Channels of each image, evenly spaced, in a square of 8×8."""

RANGE = (0.01, 0.99)
"""Quantiles of an image's activations that are drawn dark and bright."""

GAP = 1


def blocks_of(encoder: SparseConvNeXtV2) -> dict[str, SparseBlock]:
    """The encoder's blocks by name, in order."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, SparseBlock)}


def find_block(encoder: SparseConvNeXtV2, name: str | None) -> tuple[str, SparseBlock]:
    """The block of a name as `diversity` prints it; None takes the last one of the third stage.

    Raises:
        InputError: there is no such block.
    """
    blocks = blocks_of(encoder)
    if name is None:
        name = [key for key in blocks if key.startswith("stages.2.")][-1]
    if name not in blocks:
        raise InputError(f"block {name!r} is not one of {next(iter(blocks))} … {[*blocks][-1]}")
    return name, blocks[name]


@torch.no_grad()
def channel_maps(encoder: SparseConvNeXtV2, images_BCHW: Tensor, block: SparseBlock) -> Tensor:
    """Activations of `SHOWN` channels of a block, nothing hidden → (B, `SHOWN`, H, W) on the CPU.

    Args:
        encoder: in evaluation mode.
        images_BCHW: normalised.
        block: one of the encoder's.
    """
    found: list[Tensor] = []

    def record(block: Any, arguments: tuple[Tensor, Sites]) -> None:
        hidden_NC, sites = block.hidden(*arguments), arguments[1]
        chosen = np.linspace(0, hidden_NC.shape[1] - 1, SHOWN).round().astype(int)
        found.append(sites.densify(hidden_NC[:, chosen]).float().cpu())

    hook = block.register_forward_pre_hook(record)
    try:
        pooled(encoder, images_BCHW)
    finally:
        hook.remove()
    return found[0]


def draw(pixels_BHWC: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """An image a row: its pixels, and a square of maps of each encoder.

    Args:
        pixels_BHWC: from 0 to 1.
        maps: of `channel_maps` by the encoder's name.
    """
    rows = len(pixels_BHWC)
    size = (2.4 * (1 + len(maps)), 2.4 * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(rows, 1 + len(maps), squeeze=False)
    for row, pixels in zip(cells, pixels_BHWC, strict=True):
        row[0].imshow(pixels.numpy())
    for place, (name, maps_BCHW) in enumerate(maps.items(), start=1):
        cells[0, place].set_title(name, fontsize="small")
        for row, maps_CHW in zip(cells, maps_BCHW, strict=True):
            row[place].imshow(_square(maps_CHW), cmap="viridis", interpolation="nearest")
    for axes in cells.flat:
        axes.set_axis_off()
    return figure


def _square(maps_CHW: Tensor) -> Any:
    """The maps in a square, all on the same scale from 0 to 1, with gaps between them."""
    low, high = (maps_CHW.flatten().quantile(share) for share in RANGE)
    unit = ((maps_CHW - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    unit = torch.nn.functional.pad(unit, (0, GAP, 0, GAP), value=float("nan"))
    side, (_, height, width) = int(SHOWN**0.5), unit.shape
    whole = unit.view(side, side, height, width).permute(0, 2, 1, 3)
    return whole.reshape(side * height, side * width)[:-GAP, :-GAP].numpy()
