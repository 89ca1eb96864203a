"""Figures of a run: its scores, and predictions beside the truth."""

import heapq
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fcmae.atomic import atomic_write, out_file
from fcmae.data.file_list import FileList
from fcmae.data.masks import IMAGES, LAYOUTS, stem
from fcmae.data.rasters import placement_of, write_map
from fcmae.data.sample import Batch, each_target, map_tensors
from fcmae.data.sources import Source
from fcmae.data.statistics import Preprocessing
from fcmae.train.run_folder import RunFolder
from sparse.errors import InputError

MOST_IN_MEMORY = 2**27
"""Bytes of a mask that is kept in memory."""

if TYPE_CHECKING:  # kinds of label draw with this module
    from finetune.tasks.base import LabelKind

SHOWN = 12
"""Largest number of images in a figure."""

ACROSS = 4
WIDTH = 12.0
"""Of the figure, in inches."""

THUMBNAIL = 320
"""Longest side of an image in a figure, in pixels."""

Shown = tuple[Image.Image, Any, Any]
"""A small RGB image, the model's output for it (`LabelKind.to_show`) and its target."""

_log = logging.getLogger(__name__)


class Examples:
    """Images of a measurement to show: given ones, and those with the highest loss.

    Args:
        kind: of the labels.
        how: how the images are normalised, to undo it.
        chosen: positions of the images to show in any case.

    Attributes:
        chosen: what to show of these.
    """

    def __init__(self, kind: "LabelKind", how: Preprocessing, chosen: Iterable[int] = ()) -> None:
        self._kind, self._how, self._chosen = kind, how, frozenset(chosen)
        self.chosen: list[Shown] = []
        self._worst: list[tuple[float, int, Shown]] = []

    def add(self, batch: Batch, images_BCHW: Tensor, outputs: Tensor, losses_B: Tensor) -> None:
        """Look at a batch: its normalised images, the model's outputs and each image's loss."""
        assert batch.targets is not None
        targets = each_target(batch.targets)
        losses = losses_B.float().nan_to_num(math.inf).tolist()
        for n, (index, loss) in enumerate(zip(batch.indices.tolist(), losses, strict=True)):
            among_worst = len(self._worst) < SHOWN or loss > self._worst[0][0]
            if not among_worst and index not in self._chosen:
                continue
            image = thumbnail(images_BCHW[n], self._how)
            shown = (
                image,
                self._kind.to_show(outputs[n]),
                map_tensors(targets[n], lambda kept: kept.numpy().copy()),
            )
            if index in self._chosen:
                self.chosen.append(shown)
            if among_worst:
                heapq.heappush(self._worst, (loss, -index, shown))
                if len(self._worst) > SHOWN:
                    heapq.heappop(self._worst)

    def worst(self) -> list[Shown]:
        """Return the images with the highest loss, the highest first."""
        return [shown for *_, shown in sorted(self._worst, reverse=True)]


def thumbnail(image_CHW: Tensor, how: Preprocessing) -> Image.Image:
    """Return a normalised image as a small RGB image.

    One channel is shown as grey; of more than three, the first three are shown.
    """
    image_CHW = image_CHW.float().cpu()
    std, mean = (torch.tensor(values).view(-1, 1, 1) for values in (how.std, how.mean))
    pixels = (image_CHW * std + mean).mul(255).round().clamp(0, 255).byte()
    pixels_HWC = pixels[[0, 0, 0] if len(pixels) < 3 else [0, 1, 2]].permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels_HWC)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def draw_predictions(kind: "LabelKind", shown: Sequence[Shown], title: str | None = None) -> Any:
    """Draw images with their true and their predicted labels.

    Args:
        kind: of the labels.
        shown: what to draw; see `Examples`.
        title: of the figure.

    Returns:
        A figure of matplotlib; None without images.
    """
    from matplotlib.figure import Figure

    if not shown:
        return None
    figure, down = Figure(layout="constrained"), math.ceil(len(shown) / ACROSS)
    for place, (image, output, target) in enumerate(shown, 1):
        panels, truth, guess = kind.show(image, output, target)
        joined = np.concatenate([np.asarray(panel) for panel in panels], axis=1)
        axes = figure.add_subplot(down, ACROSS, place)
        axes.imshow(joined)
        axes.set_axis_off()
        lines = [f"{who}: {_short(text)}" for who, text in (("true", truth), ("model", guess))]
        axes.set_title("\n".join(lines).replace("$", r"\$"), fontsize=8, loc="left")
    height = WIDTH / ACROSS * joined.shape[0] / joined.shape[1]
    figure.set_size_inches(WIDTH, down * (height + 0.45) + (0.4 if title else 0))
    if title:
        figure.suptitle(title)
    return figure


def pixels_of(figure: Any, dpi: float = 100) -> npt.NDArray[np.uint8]:
    """Return a figure of matplotlib as pixels (H, W, 3), `dpi` for each inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def below(figures: Sequence[Any]) -> Image.Image:
    """Return figures as one image, one below the other, each at the left; None is skipped."""
    drawn = [pixels_of(figure, dpi=150) for figure in figures if figure is not None]
    width = max(part.shape[1] for part in drawn)
    wide = [
        np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255)
        for part in drawn
    ]
    return Image.fromarray(np.concatenate(wide))


def write_figures(figures: Mapping[str, Any], folder: RunFolder, step: int) -> None:
    """Write figures, by name, to a run's folder and its trackers; None is skipped."""
    for name, figure in figures.items():
        if figure is None:
            continue
        pixels = pixels_of(figure)
        folder.trackers.image(name, pixels, step)
        try:
            folder.paths.figures.mkdir(exist_ok=True)
            with atomic_write(folder.paths.figures / f"{name}.png") as path:
                Image.fromarray(pixels).save(path, format="png")
        except OSError as error:
            _log.warning("could not write the figure %s: %s", name, error)


def png_path(folder: Path, key: bytes) -> Path:
    """Return where a PNG for an image is written: its relative name with another ending."""
    return folder / f"{os.fsdecode(stem(key)).lstrip('/')}.png"


def check_png_folder(folder: Path, source: Source, names: bool = True) -> None:
    """Check that a PNG for each image can be written to a folder; without `names` a file of the
    image's whole name and more.

    Raises:
        InputError: two would have the same name, one would lie elsewhere, or replace an image or a
            label.
    """
    keys = [source.key(index) for index in range(len(source))]
    if names and len({stem(key) for key in keys}) < len(keys):
        raise InputError("several images differ only in their ending: predict them separately")
    if outside := [key for key in keys if b".." in key.split(b"/")]:
        shown = os.fsdecode(outside[0])
        raise InputError(f"image {shown!r} would be written outside of {folder}: list full paths")
    if (folder.parent / IMAGES).is_dir() and folder.name in {layout.folder for layout in LAYOUTS}:
        raise InputError(f"{folder} is a folder of labels: give another one")
    paths = [png_path(folder, key).with_suffix(end) for key in keys for end in (".png", ".tif")]
    existing = {os.path.realpath(path) for path in paths if path.exists()}
    if isinstance(source, FileList) and existing:
        images = {os.path.realpath(source.path(index)) for index in range(len(source))}
        if replaced := {os.fsencode(path) for path in existing} & images:
            raise InputError(f"{os.fsdecode(replaced.pop())!r} is an image: give another folder")


def scratch(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return room for a mask of (height, width): in memory, or of a large one in a file that is
    deleted with it."""
    if math.prod(size) <= MOST_IN_MEMORY:
        return np.empty(size, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=size)


def save_labels(
    labels: npt.NDArray[Any], folder: Path, source: Source, index: int, nodata: int | None = None
) -> None:
    """Write labels (H, W) of an image: a PNG, or a GeoTIFF with the coordinates of a map.

    Raises:
        RunError: it could not be written.
    """
    key = source.key(index)
    if (where := placement_of(source.open(index))) is None:
        save_png(Image.fromarray(labels), folder, key)
    else:
        with out_file(png_path(folder, key).with_suffix(".tif")) as temporary:
            write_map(temporary, labels, where, nodata)


def save_png(image: Image.Image, folder: Path, key: bytes) -> None:
    """Write a PNG for an image; see `check_png_folder`.

    Raises:
        RunError: it could not be written.
    """
    with out_file(png_path(folder, key)) as temporary:
        image.save(temporary, format="PNG")


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
