"""Small copies of images, and sheets of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from fcmae.data.evaluation import EvalDataset
from fcmae.data.labelled import Split
from fcmae.data.sample import normalise
from fcmae.inspect.prologue import Setting
from fcmae.inspect.reconstructing import shown_range


def thumbnails(
    setting: Setting[Any], split: Split, indices: Sequence[int] | np.ndarray[Any, Any], side: int
) -> Tensor:
    """Return the crops that the model sees of readable images, resized → (N, 3, side, side) uint8.

    One channel is shown as grey; of more than three, the first three are shown. If the first batch
    is too dim to see, all images are stretched as it needs.

    Args:
        setting: of the command.
        split: the images.
        indices: which of them, in the order of the result.
        side: in pixels.
    """
    picked = split._replace(source=split.source.select(indices))
    dataset = EvalDataset(picked, replace(setting.images, img_size=(side, side)))
    parts, shown = [torch.empty(0, 3, side, side, dtype=torch.uint8)], None
    for batch, _ in setting.batches(picked, "thumbnails", dataset):
        channels = batch.images.shape[1]
        pixels = normalise(batch.images, (0.0,) * channels, (1.0,) * channels, "cpu")
        low, high = shown = shown or shown_range(pixels)
        unit = ((pixels - low) / (high - low)).clamp(0, 1)
        colour = unit[:, :3] if channels >= 3 else unit[:, :1].expand(-1, 3, -1, -1)
        parts.append((colour * 255).round().to(torch.uint8))
    return torch.cat(parts)


def sheet(images_NCHW: Tensor, columns: int, gap: int) -> Image.Image:
    """Lay out images row by row, with `gap` white pixels around each."""
    whole = make_grid(images_NCHW, columns, gap, pad_value=255)
    return Image.fromarray(whole.permute(1, 2, 0).numpy())
