"""Figures of a run: its scores, and predictions beside the truth."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcmae.atomic import atomic_write
from fcmae.data.statistics import Preprocessing
from fcmae.train.run_folder import RunFolder
from finetune.tasks.base import LabelKind

SHOWN = 12
"""Largest number of images in a figure."""

ACROSS = 4
WIDTH = 12.0
"""Of the figure, in inches."""

Shown = tuple[Tensor, Tensor, Tensor]
"""A normalised image (C, H, W), the model's output for it and its target, on the CPU."""

_log = logging.getLogger(__name__)


def draw_predictions(kind: LabelKind, shown: Sequence[Shown], how: Preprocessing) -> Any:
    """Draw images with their true and their predicted labels.

    Args:
        kind: of the labels.
        shown: what to draw. One channel is shown as grey; of more than three, the first three are
            shown.
        how: how the images were normalised, to undo it.

    Returns:
        A figure of matplotlib; None without images.
    """
    from matplotlib.figure import Figure

    if not shown:
        return None
    std, mean = (torch.tensor(values).view(-1, 1, 1) for values in (how.std, how.mean))
    figure, down = Figure(layout="constrained"), math.ceil(len(shown) / ACROSS)
    for place, (image_CHW, output, target) in enumerate(shown, 1):
        pixels = (image_CHW * std + mean).mul(255).round().clamp(0, 255).byte()
        pixels_HWC = pixels[[0, 0, 0] if len(pixels) < 3 else [0, 1, 2]].permute(1, 2, 0).numpy()
        panels, truth, guess = kind.show(Image.fromarray(pixels_HWC), output, target.numpy())
        joined = np.concatenate([np.asarray(panel) for panel in panels], axis=1)
        axes = figure.add_subplot(down, ACROSS, place)
        axes.imshow(joined)
        axes.set_axis_off()
        lines = [f"{who}: {_short(text)}" for who, text in (("true", truth), ("model", guess))]
        axes.set_title("\n".join(lines).replace("$", r"\$"), fontsize=8, loc="left")
    height = WIDTH / ACROSS * joined.shape[0] / joined.shape[1]
    figure.set_size_inches(WIDTH, down * (height + 0.45))
    return figure


def write_figures(figures: Mapping[str, Any], folder: RunFolder, step: int) -> None:
    """Write figures, by name, to a run's folder and its trackers; None is skipped."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name, figure in figures.items():
        if figure is None:
            continue
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        folder.trackers.image(name, pixels, step)
        try:
            folder.paths.figures.mkdir(exist_ok=True)
            with atomic_write(folder.paths.figures / f"{name}.png") as path:
                Image.fromarray(pixels).save(path, format="png")
        except OSError as error:
            _log.warning("could not write the figure %s: %s", name, error)


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
