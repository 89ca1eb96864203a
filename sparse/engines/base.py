"""The interface and the code that all engines share.

Legend of shape suffixes used in this package: B images, N visible sites of a whole batch ("rows"),
C channels, H and W a map's height and width in sites. A *site* is one position of a stage's map; a
stage at stride s has H = height/s by W = width/s of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse.devices import to_device
from sparse.ops.windows import Windows, window_table, windowed_depthwise
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


@dataclass(frozen=True)
class Stage:
    """One stage of packed sites for one batch of masks, without its index tables.

    Attributes:
        shape: (B, H, W) of the stage's map.
        side: sites along a patch's side.
        per_image: rows of each image, where all have the same number, else 0.
        lengths: of each table by its name: `index`, the position of each row on the flattened map;
            `windows`, of `window_table`; and `image`, the image of each row, where the numbers
            differ.
    """

    shape: tuple[int, int, int]
    side: int
    per_image: int
    lengths: dict[str, int]

    @classmethod
    def of(
        cls,
        index_N: Tensor,
        shape: tuple[int, int, int],
        side: int,
        patches_B: Tensor,
        near: Tensor,
    ) -> tuple["Stage", dict[str, Tensor]]:
        """Lay out a stage, and return its tables too: int32, on the CPU.

        Args:
            index_N: int64 position of each row on the flattened map, patch after patch.
            shape, side: see `Stage`.
            patches_B: visible patches of each image.
            near: of `sparse.ops.windows.neighbours`.
        """
        tables = {"index": index_N.int(), "windows": window_table(index_N, shape, side, near)}
        per_image = int(patches_B[0]) * side**2
        if (patches_B != patches_B[0]).any():
            tables["image"], per_image = torch.repeat_interleave(patches_B * side**2).int(), 0
        lengths = {name: len(table) for name, table in tables.items()}
        return cls(shape, side, per_image, lengths), tables


@dataclass
class Layout:
    """All stages of packed sites, with their index tables in one tensor: one copy moves them.

    Attributes:
        stages: in order.
        tables: int32, on the CPU; may be pinned, and in memory that processes share.
    """

    stages: list[Stage]
    tables: Tensor

    def on(self, device: torch.device) -> Iterator[tuple[Stage, dict[str, Tensor]]]:
        """Yield each stage with its tables on a device; the copy waits only where it has to."""
        lengths = [length for stage in self.stages for length in stage.lengths.values()]
        parts = iter(to_device(self.tables, device).split(lengths))
        for stage in self.stages:
            yield stage, {name: next(parts) for name in stage.lengths}


class PackedSites:
    """Rows packed without gaps, with their positions on the map: shared by patch and minkowski.

    Rows are ordered patch by patch (images in batch order, patches and the sites within a patch in
    raster order), so a patch is a square block of rows.

    Args:
        stage: what is known of the stage.
        tables: its index tables, on the device of the rows.
    """

    visible_N1: Tensor | None = None

    def __init__(self, stage: Stage, tables: Mapping[str, Tensor]) -> None:
        self.shape, self.side, self.index_N = stage.shape, stage.side, tables["index"]
        self.windows = Windows.of(stage.shape, stage.side, tables["windows"], self.index_N)
        device, image = self.index_N.device, tables.get("image")
        self.images = ImageRows(self.shape[0], stage.per_image, device, image)

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
        canvas = x_NC.new_zeros(b * h * w, channels).index_copy(0, self.index_N.long(), x_NC)
        return canvas.view(b, h, w, channels).permute(0, 3, 1, 2)
