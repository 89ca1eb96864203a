"""Reconstructions: original, masked, reconstruction and pasted; `fcmae reconstruct`."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from fcmae.atomic import out_file
from fcmae.commands.reconstruct import ReconstructConfig
from fcmae.data.evaluation import EvalDataset, each_batch, held_out_masks, report_skipped
from fcmae.data.labelled import Split
from fcmae.data.statistics import Preprocessing
from fcmae.inspect.prologue import set_up
from fcmae.model.fcmae import FCMAE
from fcmae.model.loss import to_pixels
from fcmae.weights.load import load_pretrained
from sparse.errors import InputError

COLUMNS = ("original", "masked", "reconstruction", "pasted")
GREY = 0.5
GAP = 4
HEAD = 18
NARROWEST = 96
"""Narrower columns are enlarged, since their headings need this many pixels."""

DIM = 0.25
"""Range of pixels below which an image is too dim to see."""

MOST_VALUES = 1_000_000

_log = logging.getLogger(__name__)


@torch.no_grad()
def reconstruct_batch(
    model: FCMAE, images_BCHW: Tensor, mask_BHW: Tensor, preprocessing: Preprocessing
) -> tuple[list[Tensor], float]:
    """Reconstruct normalised images.

    Args:
        model: in either mode, which is restored.
        images_BCHW: on the model's device.
        mask_BHW: on the CPU, True = hidden.
        preprocessing: how the images were normalised, to undo it.

    Returns:
        Four tensors (B, C, H, W) on the CPU with pixels from 0 to 1, in the order of `COLUMNS`, and
        the loss. The reconstruction shows hidden patches only: the decoder is not trained on
        visible ones, and its output there is noise. With patch-normalised targets a prediction gets
        its patch's own mean and deviation back, so contrast and tone of hidden patches are the
        original's, not predicted. Images that use a small part of the range from 0 to 1, as 16-bit
        ones often do, or that exceed it, are all stretched to it in the same way.
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
    p = model.encoder.patch_size
    hidden = mask_BHW.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
    masked = torch.where(hidden, GREY, original)
    reconstruction = torch.where(hidden, predicted, GREY)
    pasted = torch.where(hidden, predicted, original)
    columns = [column.clamp(0, 1) for column in (original, masked, reconstruction, pasted)]
    return columns, float(out.loss)


def _stretched(original: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Stretch the range between the original's percentiles 1 and 99 to 0 to 1, if needed."""
    values = original.flatten()
    sampled = values[:: max(1, len(values) // MOST_VALUES)]
    low, high = sampled.quantile(0.01), sampled.quantile(0.99)
    if high - low >= DIM and low > -DIM and high < 1 + DIM:
        return original, predicted
    spread = (high - low).clamp_min(1e-6)
    return (original - low) / spread, (predicted - low) / spread


def grid(columns: Sequence[Tensor]) -> npt.NDArray[np.uint8]:
    """Lay out the result of `reconstruct_batch`, one image per row → (H, W, 3) uint8.

    One channel is shown as grey; of more than three, the first three are shown.
    """
    times = math.ceil(NARROWEST / columns[0].shape[3])
    columns = [c.repeat_interleave(times, 2).repeat_interleave(times, 3) for c in columns]
    cells = [F.pad(column, (0, GAP, 0, GAP), value=1.0) for column in columns]
    rows_CHW = torch.cat(cells, 3).transpose(0, 1).flatten(1, 2)[:, :-GAP, :-GAP]
    whole_CHW = F.pad(rows_CHW, (0, 0, HEAD, 0), value=1.0)
    shown = whole_CHW[:3] if len(whole_CHW) >= 3 else whole_CHW[:1].expand(3, -1, -1)
    image = Image.fromarray((shown.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for place, name in enumerate(COLUMNS):
        draw.text((place * cells[0].shape[3] + 2, 2), name, fill="black", font=font)
    return np.asarray(image)


def reconstruct(config: ReconstructConfig) -> float:
    """Write original · masked · reconstruction · pasted of the first images as one PNG.

    Images are cropped at their centre to the size of pretraining. Hidden patches get their own mean
    and deviation back if the run predicts normalised patches.

    Returns:
        The mean loss over the images drawn; 1.0 means that each patch's mean is predicted.

    Raises:
        InputError: no pretraining run, no readable image, or `out` is not a PNG file.
        RunError: `out` could not be written.
    """
    setting = set_up(config, config.run, load_pretrained, ".png")
    model, how, step = setting.model
    found = setting.find_images().source
    files, whole = found.select(range(min(config.count, len(found)))), replace(how, crop_pct=1.0)
    dataset = EvalDataset(Split(files), whole)
    ((batch, images),) = each_batch(dataset, setting.device, len(files), workers=0)
    report_skipped(batch.bad)
    if not len(batch):
        raise InputError(f"images {config.images!r}: none of the first {config.count} can be read")
    masks = held_out_masks(files, batch.indices, how.img_size, model.mask_ratio, config.seed)
    columns, loss = reconstruct_batch(model, images, masks, how)
    with out_file(Path(config.out)) as path:
        Image.fromarray(grid(columns)).save(path, format="PNG")
    scale = "1.0: each patch's mean is predicted"
    _log.info(f"{config.out}: {len(batch)} images after {step} steps, loss {loss:.4f} ({scale})")
    return loss
