"""Seeing what was learned: original, masked, reconstruction and pasted, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fcmae.data.statistics import Preprocessing
from fcmae.model.fcmae import FCMAE
from fcmae.model.loss import to_pixels
from sparse.sizes import PATCH

COLUMNS = ("original", "masked", "reconstruction", "pasted")
GREY = 0.5
GAP = 4
NARROWEST = 96
"""Columns of fewer pixels are enlarged: their headings want as much."""

DIM = 0.25
"""Range of pixels under which nothing could be seen."""

MOST_VALUES = 1_000_000


@torch.no_grad()
def reconstruct_batch(
    model: FCMAE, images_BCHW: Tensor, mask_BHW: Tensor, preprocessing: Preprocessing
) -> tuple[list[Tensor], float]:
    """Reconstruct normalised images.

    Args:
        model: what reconstructs.
        images_BCHW: on the model's device.
        mask_BHW: on the CPU, True = hidden.
        preprocessing: how the images were normalised, to undo it.

    Returns:
        Four tensors (B, C, H, W) on the CPU with pixels from 0 to 1, in the order of `COLUMNS`, and
        the loss. The reconstruction shows the hidden patches: for visible ones nothing is learned,
        and what the decoder gives there is noise. With patch-normalised targets a prediction is
        given back its patch's own mean and deviation, so contrast and tone of hidden patches are
        the original's, not predicted. Images that use a small part of the range from 0 to 1, as
        16-bit ones often do, or that exceed it, are stretched to it, all alike.
    """
    was_training = model.training
    model.eval()
    out = model(images_BCHW, mask_BHW)
    model.train(was_training)
    scale = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
    shift = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    original = images_BCHW.float().cpu() * scale + shift
    predicted = to_pixels(out.pred, images_BCHW, model.norm_pix_loss).cpu() * scale + shift
    original, predicted = _stretched(original, predicted)
    hidden = mask_BHW.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    masked = torch.where(hidden, GREY, original)
    reconstruction = torch.where(hidden, predicted, GREY)
    pasted = torch.where(hidden, predicted, original)
    columns = [column.clamp(0, 1) for column in (original, masked, reconstruction, pasted)]
    return columns, float(out.loss)


def _stretched(original: Tensor, *others: Tensor) -> list[Tensor]:
    """Spread what lies between the original's percentiles 1 and 99 over 0 to 1, where needed."""
    values = original.flatten()
    some = values[:: max(1, len(values) // MOST_VALUES)]
    low, high = some.quantile(0.01), some.quantile(0.99)
    if high - low >= DIM and low > -DIM and high < 1 + DIM:
        return [original, *others]
    return [(tensor - low) / (high - low).clamp_min(1e-6) for tensor in (original, *others)]


def grid(columns: Sequence[Tensor]) -> npt.NDArray[np.uint8]:
    """Lay out the result of `reconstruct_batch`, an image a row under headings → (H, W, 3) uint8.

    One channel is shown as grey; of more than three the first three are shown.
    """
    times = math.ceil(NARROWEST / columns[0].shape[3])
    columns = [c.repeat_interleave(times, 2).repeat_interleave(times, 3) for c in columns]
    batch, _, height, width = columns[0].shape
    head = 18
    canvas = Image.new(
        "RGB",
        (len(columns) * (width + GAP) - GAP, head + batch * (height + GAP) - GAP),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12)
    for x, (name, column) in enumerate(zip(COLUMNS, columns, strict=True)):
        draw.text((x * (width + GAP) + 2, 2), name, fill="black", font=font)
        for y, image_CHW in enumerate(column):
            shown = image_CHW[:3] if len(image_CHW) >= 3 else image_CHW[:1].expand(3, -1, -1)
            pixels = (shown.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            canvas.paste(Image.fromarray(pixels), (x * (width + GAP), head + y * (height + GAP)))
    return np.asarray(canvas)
