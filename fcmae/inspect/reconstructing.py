"""Reconstructions beside what is given; `fcmae reconstruct`."""

import logging
import math
from collections.abc import Mapping
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
from fcmae.data.evaluation import EvalDataset, each_batch, held_out, report_skipped
from fcmae.data.labelled import Split
from fcmae.data.statistics import Preprocessing
from fcmae.data.windows import random_windows
from fcmae.inspect.prologue import set_up
from fcmae.model.fcmae import FCMAE
from fcmae.model.loss import to_pixels
from fcmae.weights.load import load_pretrained
from sparse.errors import InputError

MEANS = "patch means"
"""Heading of the column of what a model that has learned nothing would show."""

GREY = 0.5
"""Of hidden patches."""

LIGHT = 0.85
"""Of pixels without a value."""

COLOURLESS = 1 / 512
"""Largest difference of the channels of a grey image: half a step of 8-bit values."""

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
    model: FCMAE,
    images_BCHW: Tensor,
    mask_BHW: Tensor,
    preprocessing: Preprocessing,
    valid_BHW: Tensor | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Reconstruct normalised images.

    Visible patches are shown as they are: the decoder is not trained on them, and its output there
    is noise. With patch-normalised targets a prediction gets its patch's own mean and deviation,
    which are not predicted. A column shows the means alone: what the reconstruction adds to it is
    learned. The mean is one number for all channels, so it has a colour where they differ in mean
    or deviation; of images without colour, the reconstruction is shown without it too. Images that
    use a small part of the range from 0 to 1, as 16-bit ones often do, or that exceed it, are all
    stretched to it in the same way.

    Args:
        model: in either mode, which is restored.
        images_BCHW: on the model's device.
        mask_BHW: on the CPU, True = hidden.
        preprocessing: how the images were normalised, to undo it.
        valid_BHW: which pixels count (B, H, W); the others are light grey. None if all do.

    Returns:
        Pixels (B, C, H, W) from 0 to 1 on the CPU by column: "original", "masked", with
        patch-normalised targets `MEANS`, and "reconstruction"; and the loss.
    """
    was_training = model.training
    model.eval()
    out = model(images_BCHW, mask_BHW, valid=valid_BHW)
    model.train(was_training)
    scale = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
    shift = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    original = images_BCHW.float().cpu() * scale + shift
    predictions = {"reconstruction": out.pred}
    if model.norm_pix_loss:
        predictions = {MEANS: torch.zeros_like(out.pred), **predictions}
    colourless = original.amax(1, keepdim=True) - original.amin(1, keepdim=True) < COLOURLESS
    colourless = colourless.all(dim=(1, 2, 3), keepdim=True)
    p = model.encoder.patch_size
    hidden = mask_BHW.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
    low, high = shown_range(original)
    columns = {"original": original, "masked": original}
    for name, pred in predictions.items():
        pixels = to_pixels(pred, images_BCHW, model.norm_pix_loss, valid_BHW).cpu() * scale + shift
        pixels = torch.where(colourless, pixels.mean(1, keepdim=True), pixels)
        columns[name] = torch.where(hidden, pixels, original)
    columns = {name: ((c - low) / (high - low)).clamp(0, 1) for name, c in columns.items()}
    columns["masked"] = torch.where(hidden, GREY, columns["masked"])
    if valid_BHW is not None:
        counts = valid_BHW.cpu()[:, None]
        columns = {name: torch.where(counts, c, LIGHT) for name, c in columns.items()}
    return columns, float(out.loss)


def shown_range(original: Tensor) -> tuple[float, float]:
    """0 and 1, or for dim or wide images the percentiles 1 and 99 of their values."""
    values = original.flatten()
    sampled = values[:: max(1, len(values) // MOST_VALUES)]
    low, high = sampled.quantile(0.01), sampled.quantile(0.99)
    if high - low >= DIM and low > -DIM and high < 1 + DIM:
        return 0.0, 1.0
    return float(low), max(float(high), float(low) + 1e-6)


def grid(columns: Mapping[str, Tensor]) -> npt.NDArray[np.uint8]:
    """Lay out columns by heading, one image per row → (H, W, 3) uint8.

    One channel is shown as grey; of more than three, the first three are shown.
    """
    times = math.ceil(NARROWEST / next(iter(columns.values())).shape[3])
    large = [c.repeat_interleave(times, 2).repeat_interleave(times, 3) for c in columns.values()]
    cells = [F.pad(column, (0, GAP, 0, GAP), value=1.0) for column in large]
    rows_CHW = torch.cat(cells, 3).transpose(0, 1).flatten(1, 2)[:, :-GAP, :-GAP]
    whole_CHW = F.pad(rows_CHW, (0, 0, HEAD, 0), value=1.0)
    shown = whole_CHW[:3] if len(whole_CHW) >= 3 else whole_CHW[:1].expand(3, -1, -1)
    image = Image.fromarray((shown.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for place, name in enumerate(columns):
        draw.text((place * cells[0].shape[3] + 2, 2), name, fill="black", font=font)
    return np.asarray(image)


def reconstruct(config: ReconstructConfig) -> float:
    """Write original · masked · patch means · reconstruction of the first images as one PNG.

    Images are cropped at their centre to the size of pretraining, or windows of them. If the run
    predicts normalised patches, each hidden one gets its own mean and deviation: see
    `reconstruct_batch`.

    Returns:
        The mean loss over the images drawn; 1.0 means that each patch's mean is predicted.

    Raises:
        InputError: no pretraining run, no readable image, or `out` is not a PNG file.
        RunError: `out` could not be written.
    """
    setting = set_up(config, config.run, load_pretrained, ".png")
    model, how, step, min_valid, window = setting.model
    found = setting.find_images().source
    files, whole = found.select(range(min(config.count, len(found)))), replace(how, crop_pct=1.0)
    if window is not None:
        files = random_windows(files, config.seed, window)
    dataset = EvalDataset(Split(files), whole)
    ((batch, images),) = each_batch(dataset, setting.device, len(files), workers=0)
    report_skipped(batch.bad)
    if not len(batch):
        raise InputError(f"images {config.images!r}: none of the first {config.count} can be read")
    p = model.encoder.patch_size
    images, masks, valid = held_out(
        files, batch, images, model.mask_ratio, config.seed, p, min_valid
    )
    if not len(images):
        raise InputError(f"images {config.images!r}: no pixels have a value, see --nodata")
    columns, loss = reconstruct_batch(model, images, masks, how, valid)
    with out_file(Path(config.out)) as path:
        Image.fromarray(grid(columns)).save(path, format="PNG")
    _log.info(f"{config.out}: {len(batch)} images after {step} steps, loss {loss:.4f}")
    if model.norm_pix_loss:
        _log.info(
            "hidden patches are drawn with their own mean and deviation: a loss of 1.0, nothing "
            f"learned, would look like {MEANS!r}"
        )
    return loss
