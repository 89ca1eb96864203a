"""Which patches are hidden: sizes, ratios, and the only code that draws random masks."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fcmae import rng
from sparse.errors import InputError
from sparse.sizes import PATCH

MIN_VALID = 0.5
"""Share of the pixels of a patch that have to count for it to be visible or a target."""


def grid_of(img_size: tuple[int, int], patch: int = PATCH) -> tuple[int, int]:
    """Return the number of patches (h, w) down and across an image of (H, W) pixels."""
    return img_size[0] // patch, img_size[1] // patch


def keep_count(patches: int, mask_ratio: float) -> int:
    """Return the number of an image's patches that stay visible: 19 of 49 at a ratio of 0.6.

    The expression, including its rounding, is the official one: int(L * (1 - mask_ratio)).
    """
    return int(patches * (1 - mask_ratio))


def check_mask_ratio(mask_ratio: float, grid: tuple[int, int], patch: int = PATCH) -> None:
    """Make sure that the ratio leaves at least one patch visible and one hidden on this grid.

    Args:
        mask_ratio: share of the patches to hide.
        grid: patches down and across.
        patch: side of a patch in pixels, for messages.

    Raises:
        InputError: the ratio is outside (0, 1), or too close to 0 or 1 for so few patches.
    """
    patches = grid[0] * grid[1]
    if patches < 2:
        raise InputError(f"img_size {patch} gives a single patch: use at least {2 * patch}")
    if not (0 < mask_ratio < 1 and 0 < keep_count(patches, mask_ratio) < patches):
        most = math.floor((1 - 1 / patches) * 1000) / 1000
        raise InputError(
            f"mask_ratio {mask_ratio:g} must be above 0 and at most {most:g} to leave a patch "
            f"visible and one hidden of {grid[0]}x{grid[1]}: try {0.6 if patches > 2 else 0.5}"
        )


def random_mask(
    seed: int,
    epoch: int,
    index: int,
    grid: tuple[int, int],
    mask_ratio: float,
    stream: int = rng.MASK,
    usable: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Return the mask (h, w) of one image, True = hidden, with `keep_count` patches visible.

    The patches with the smallest hashes stay visible: every choice of them is equally likely. Only
    those that are `usable` (h, w) count and may be visible.
    """
    patches = grid[0] * grid[1]
    order = np.argsort(rng.bits(seed, stream, epoch, index, np.arange(patches)), kind="stable")
    if usable is not None:
        order = order[usable.reshape(-1)[order]]
    hidden = np.ones(patches, dtype=np.bool_)
    hidden[order[: keep_count(len(order), mask_ratio)]] = False
    return hidden.reshape(grid)


def usable_patches(
    valid_HW: npt.NDArray[np.bool_], patch: int, min_valid: float
) -> npt.NDArray[np.bool_]:
    """Return which patches (h, w) of an image have at least the share `min_valid` of valid pixels,
    and one."""
    h, w = grid_of((len(valid_HW), len(valid_HW[0])), patch)
    counts = valid_HW.reshape(h, patch, w, patch).sum((1, 3))
    usable: npt.NDArray[np.bool_] = counts >= max(1, min_valid * patch * patch)
    return usable


def pixels_of(patches_HW: npt.NDArray[np.bool_], patch: int) -> npt.NDArray[np.bool_]:
    """Return which pixels (P·h, P·w) are in one of the patches (h, w)."""
    return patches_HW.repeat(patch, 0).repeat(patch, 1)


def random_masks(
    batch: int, grid: tuple[int, int], mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return random masks (B, h, w) bool on the CPU, True = hidden, seeded by a CPU generator.

    Raises:
        InputError: the ratio leaves nothing visible, or nothing hidden.
    """
    check_mask_ratio(mask_ratio, grid)
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    masks = [random_mask(seed, 0, index, grid, mask_ratio) for index in range(batch)]
    return torch.from_numpy(np.stack(masks))
