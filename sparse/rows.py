"""Which rows of visible sites belong to which image of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.devices import to_device

PIECE = 4 * 2**20
"""Bytes of a batch's widest rows that a CPU processes at a time, so that they fit its caches."""


@dataclass(frozen=True)
class ImageRows:
    """Which image each row belongs to; rows of one image are contiguous, images in batch order.

    If all images of a batch have the same number of visible sites, as in pretraining, the rows are
    a (B, n, C) view; otherwise an index is used. Both give the same numbers.

    Attributes:
        batch: number of images B.
        per_image: rows of each image, if all have the same number.
        device: device of the rows.
        index: the image of each row (N,), if the numbers differ.
    """

    batch: int
    per_image: int
    device: torch.device
    index: Tensor | None = None

    @classmethod
    def of(cls, counts_B: Tensor, device: torch.device) -> "ImageRows":
        """Build from each image's number of rows (B,), int64 on the CPU."""
        batch, first = len(counts_B), int(counts_B[0])
        if (counts_B == first).all():
            return cls(batch, first, device)
        return cls(batch, 0, device, to_device(torch.repeat_interleave(counts_B), device))

    def split(self, x_NC: Tensor) -> Tensor:
        """View rows, all or a piece, as (B, n, C) if possible, else leave them (N, C)."""
        if self.index is not None:
            return x_NC
        images = len(x_NC) // self.per_image if self.per_image else self.batch
        return x_NC.view(images, self.per_image, x_NC.shape[-1])

    def pieces(self, row_bytes: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of rows and images: about `PIECE` bytes each on a CPU, else all at once."""
        size = self.batch
        if self.per_image and self.device.type == "cpu":
            size = max(1, PIECE // (self.per_image * row_bytes))
        if size >= self.batch:
            yield slice(None), slice(None)
            return
        for first in range(0, self.batch, size):
            last = min(first + size, self.batch)
            yield slice(first * self.per_image, last * self.per_image), slice(first, last)

    def sum(self, x: Tensor) -> Tensor:
        """Sum the rows of each image: a result of `split` → (B, C)."""
        if self.index is None:
            return x.sum(1)
        # Multiply by the membership matrix: index_add_ is many times slower on the CPU.
        member_BN = self.index == torch.arange(self.batch, device=x.device)[:, None]
        return member_BN.to(x.dtype) @ x

    def expand(self, s_BC: Tensor) -> Tensor:
        """Repeat per-image values so that they broadcast against a result of `split`."""
        return s_BC[:, None] if self.index is None else s_BC.index_select(0, self.index)
