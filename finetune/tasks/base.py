"""The interface of a kind of label to fine-tuning, evaluation and prediction."""

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fcmae.atomic import check_out_file, out_file
from fcmae.data.evaluation import EvalDataset, View
from fcmae.data.labelled import LabelledData, Labels, Split
from fcmae.data.sample import Batch
from fcmae.data.sources import Indices, Source
from fcmae.data.statistics import Preprocessing
from fcmae.data.table import Table
from fcmae.train.processes import World
from fcmae.weights.export import write_timm_folder
from finetune.augment import TrainDataset
from finetune.config import FinetuneConfig
from finetune.model import Start, build_model, freeze_backbone, scale_classifier
from finetune.optim import layer_depths
from sparse.errors import InputError

Counts = npt.NDArray[np.int64]

Writer = Callable[[Sequence[str], Batch, Any], None]
"""Writes the predictions of a batch: paths of its images, the batch, and its `predictions`."""


class Measurement(ABC):
    """Scores of one model on the labelled images of all processes.

    Attributes:
        state: what these images decide about later predictions, such as thresholds: JSON that is
            stored beside the weights and given to `LabelKind`; set by `compute`.
    """

    state: Mapping[str, Any]

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Add a batch of this process, and return the loss of each image (B,).

        Args:
            outputs: of the model, (B, …).
            targets: (B, …).
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return each score for metrics.jsonl by its name, `loss` among them, over all processes.

        Each process calls this once, before the methods below, which do not communicate.
        """

    @abstractmethod
    def each(self) -> dict[str, dict[str, Any]]:
        """Return the scores of each class or target by its name and theirs, the most important one
        first, and `n`, the number of its images. A score that does not exist is None."""

    @abstractmethod
    def total(self) -> dict[str, Any]:
        """Return the scores of all, and `n`, the number of images."""

    def result(self) -> dict[str, Any]:
        """Return the scores as JSON for `fcmae evaluate`."""
        each = self.each()
        measured = {name: scores for name, scores in each.items() if scores["n"]}
        absent = [name for name in each if name not in measured]
        return {**self.total(), "per_class": measured, "not_measured": absent}

    @abstractmethod
    def draw(self) -> Any:
        """Return a figure of the scores, of matplotlib; None if there can't be one."""

    def rows(self) -> list[list[Any]]:
        """Return the numbers of the figure as rows of a table, with headings."""
        each = self.each()
        heads = next(iter(each.values()))
        return [["name", *heads], *([name, *scores.values()] for name, scores in each.items())]


class LabelKind(ABC):
    """How one kind of label is read, learned, scored, drawn and predicted.

    The images of a run are read first (`read` or the methods on folders); a kind is then made with
    the names found, and `prepare`d if it is to be trained.

    Args:
        names: of the model's outputs in order: classes or targets.
        state: what else predictions need, as stored beside the weights; see `Measurement`.

    Attributes:
        task: the value of `--task`.
        layout: where labels are, in words.
        heads: values of `--head` besides auto.
        resolves: settings that `prepare` replaces `auto` in: the state has them.
        score: the name of the score that decides which weights are best; None takes the loss.
        output: the name of what `exported` computes.
        any_size: whether it takes images of any size.
    """

    task: ClassVar[str]
    layout: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    resolves: ClassVar[tuple[str, ...]] = ()
    score: ClassVar[str | None] = None
    tiles: ClassVar[bool] = False
    output: ClassVar[str] = "logits"
    any_size: ClassVar[bool] = True

    def __init__(self, names: Sequence[str], state: Mapping[str, Any] | None = None) -> None:
        self.names, self.state = tuple(names), dict(state or {})

    # Reading labels

    @classmethod
    def not_labels(cls, path: str | Path) -> InputError:
        """Return the error for a file or folder without labels of this kind."""
        return InputError(f"{str(path)!r} has no labels for {cls.task}: expected {cls.layout}")

    @classmethod
    @abstractmethod
    def recognises(cls, labels: Table | Path) -> bool:
        """Return whether a CSV file or a folder holds labels of this kind."""

    @classmethod
    def read(
        cls, table: Table, rows: Indices, names: tuple[str, ...] | None
    ) -> tuple[Labels, tuple[str, ...]]:
        """Read labels from a CSV file; see `fcmae.data.table.Reader`."""
        raise cls.not_labels(table.file)

    @classmethod
    def find_folder(cls, config: FinetuneConfig) -> LabelledData:
        """Find the images to train and to validate on in the folder `config.data`.

        Raises:
            InputError: there are none, or their labels can't be learned.
        """
        raise cls.not_labels(config.data)

    @classmethod
    def find_split(cls, folder: Path, split: str, names: Sequence[str]) -> Split:
        """Find images to measure on.

        Args:
            folder: with one folder for each split, or of one split; or `hf:` and a dataset.
            split: the name of the split.
            names: those that the model knows.

        Raises:
            InputError: there are none, or they have labels that the model does not know.
        """
        raise cls.not_labels(folder)

    @classmethod
    def labels_of(cls, files: Source, names: Sequence[str]) -> Labels:
        """Return the labels of images in a folder whose list a run has stored without labels."""
        raise InputError(f"the run has no stored labels for {cls.task}: start over")

    def encode(self, labels: Labels) -> Labels:
        """Return labels as targets of the loss."""
        return labels

    # Training

    def prepare(self, config: FinetuneConfig, train: Labels, device: torch.device) -> None:
        """Prepare for training, before `encode`.

        Args:
            config: what was asked for.
            train: labels of the training images.
            device: of the loss.

        Raises:
            InputError: the config does not suit this kind of label.
        """
        augment = config.augment
        if augment.mixup or augment.cutmix:
            raise InputError(
                f"mixup and cutmix blend classes, and the task is {self.task}: leave both at 0"
            )

    def check(self, part: int, batch_size: int) -> None:
        """Check what depends on the number of images in a part of a step.

        Raises:
            InputError: the part does not suit the config.
        """

    def build_model(
        self, start: Start, in_chans: int, img_size: tuple[int, int], drop_path: float = 0.0
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Build the model; see `finetune.model.build_model`."""
        return build_model(start, len(self.names), in_chans, img_size, drop_path)

    def scale_head(self, model: nn.Module, scale: float) -> None:
        """Scale the initial weights of the head by `scale`."""
        scale_classifier(model, scale)

    def freeze(self, model: nn.Module) -> None:
        """Train the head only."""
        freeze_backbone(model)

    def layer_depths(self, model: nn.Module, layer_group: str) -> dict[str, int]:
        """Return how many layers before the head each parameter is; see `finetune.optim`."""
        return layer_depths(model, layer_group)

    def train_dataset(
        self, split: Split, images: Preprocessing, config: FinetuneConfig
    ) -> TrainDataset:
        """Return the training samples."""
        return TrainDataset(split, images, config)

    @abstractmethod
    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of normalised images; `forward` is the model, perhaps wrapped in DDP.

        The mean over parts of the same size is the loss of all of them.
        """

    # Scores

    def eval_dataset(self, split: Split, images: Preprocessing, max_pixels: int) -> EvalDataset:
        """Return the samples to measure on or to predict."""
        return EvalDataset(split, images, max_pixels)

    def infer(
        self, model: Callable[[Tensor], Tensor], images_BCHW: Tensor, how: Preprocessing
    ) -> Tensor:
        """Return the outputs (B, …) of a model for images of `eval_dataset`.

        Args:
            model: in evaluation mode.
            images_BCHW: normalised.
            how: how they were prepared.
        """
        return model(images_BCHW)

    @abstractmethod
    def measurement(self, world: World, final: bool = False) -> Measurement:
        """Return an empty measurement.

        Args:
            world: the processes that share the images.
            final: whether the state is given, as in `fcmae evaluate`; else the images decide it.
        """

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Return a key that orders scores, the best highest: by `score`, then by the lower loss.

        What is missing or not finite is the worst.
        """
        values = [*([scores.get(self.score, math.nan)] if self.score else []), -scores["loss"]]
        return tuple(value if math.isfinite(value) else -math.inf for value in values)

    @abstractmethod
    def chance(self, scores: Sequence[Mapping[str, float]], val: Labels) -> str | None:
        """Return a text if the scores of all models are those of guessing, else None."""

    # Output

    def predictions(
        self,
        model: Callable[[Tensor], Tensor],
        batch: Batch,
        images_BCHW: Tensor,
        how: Preprocessing,
    ) -> Any:
        """Return what `writing` and `overlay` take for a batch, an entry for each image.

        Args:
            model, images_BCHW, how: see `infer`.
            batch: of `eval_dataset`.
        """
        return self.infer(model, images_BCHW, how)

    def tiled(self, model: nn.Module, view: View, tile: int) -> Any:
        """Return what `predictions` does for one image, computed in windows of a side in pixels.
        Only where `tiles` is true."""
        raise NotImplementedError

    def overlay(self, image: Image.Image, prediction: Any) -> Image.Image:
        """Return an RGB image with its prediction drawn on it, here as a line of text."""
        drawn, text = image.copy(), self.describe_output(prediction.float().cpu())
        pen = ImageDraw.Draw(drawn)
        size = max(10, image.width // 24)
        pen.text(
            (4, 4), text, "white", ImageFont.load_default(size), stroke_width=2, stroke_fill="black"
        )
        return drawn

    def exported(self, model: nn.Module) -> nn.Module:
        """Return a model for other programs: normalised images (B, C, H, W) → `output`.

        Raises:
            InputError: there is none.
        """
        return model

    def write(self, state: Mapping[str, Tensor], config: Mapping[str, Any], out: Path) -> None:
        """Write a trained model as a folder; see `fcmae.weights.export.write_timm_folder`."""
        write_timm_folder(state, config, out)

    def to_show(self, output: Tensor) -> Tensor:
        """Return what `show` needs of the model's output for one image, on the CPU."""
        return output.float().cpu()

    def show(
        self, image: Image.Image, output: Tensor, target: npt.NDArray[Any]
    ) -> tuple[list[Image.Image], str, str]:
        """Show a prediction beside the truth: images of the same size, and two texts.

        Args:
            image: RGB.
            output: see `to_show`.
            target: see `encode`.
        """
        return [image], self.describe_target(target), self.describe_output(output)

    def describe_target(self, target: npt.NDArray[Any]) -> str:
        """Return a target in words."""
        return ""

    def describe_output(self, output: Tensor) -> str:
        """Return a prediction in words."""
        return ""

    def check_out(self, out: str) -> Path:
        """Check where predictions will be written.

        Raises:
            InputError: they can't be written there.
        """
        return check_out_file(out, ".csv")

    @contextmanager
    def writing(self, out: Path, source: Source, top: int) -> Iterator[Writer]:
        """Write predictions: yield a function that takes batches. Here, a CSV file.

        Args:
            out: see `check_out`.
            source: the images.
            top: classes per image, where a prediction names the best.

        Raises:
            RunError: `out` could not be written.
        """
        # Names that are not UTF-8 are written as their bytes.
        with (
            out_file(out) as path,
            path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            rows = csv.writer(file)
            rows.writerow(["path", *self.columns(top)])

            def write(paths: Sequence[str], batch: Batch, outputs: Tensor) -> None:
                cells = self.cells(outputs.float().cpu(), top)
                rows.writerows([path, *row] for path, row in zip(paths, cells, strict=True))

            yield write

    def columns(self, top: int) -> Sequence[str]:
        """Return the columns of a CSV file of predictions after `path`: one for each output."""
        return self.names

    def cells(self, outputs: Tensor, top: int) -> list[list[str]]:
        """Return the cells of these columns for outputs (B, N)."""
        return []


class Gathered(Measurement):
    """A measurement that keeps all outputs (N, K) and targets (N, K) on the CPU.

    Args:
        world: the processes that share the images.

    Attributes:
        outputs, targets: of all processes, float32, set by `gather`.
    """

    outputs: Tensor
    targets: Tensor

    def __init__(self, world: World) -> None:
        self._world = world
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = outputs.float().cpu(), targets.float().cpu()
        self._parts.append((outputs, targets))
        return self.losses(outputs, targets)

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image (B,)."""

    def gather(self) -> None:
        """Collect the batches of all processes."""
        parts = [part for parts in self._world.gather(self._parts) for part in parts]
        self.outputs, self.targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of those values that exist; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def confusion_rows(confusion: Counts, names: Sequence[str]) -> list[list[Any]]:
    """Return a confusion matrix (true class, predicted class) as rows of a table, with headings."""
    pairs = zip(names, confusion.tolist(), strict=True)
    return [["true \\ predicted", *names], *([name, *row] for name, row in pairs)]


def draw_confusion(confusion: Counts, names: Sequence[str]) -> Any:
    """Draw the share of each true class (row) that is predicted as each class, in percent."""
    from matplotlib.figure import Figure

    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.35 * len(names), 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(drawn, label="% of the true class")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in np.argwhere(confusion):
            value = share[row, column]
            color = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    return figure


def bars(values: Mapping[str, float], label: str, most: int = 60) -> Any:
    """Draw a horizontal bar for each name, the highest first; of many, those of both ends.

    Args:
        values: by name.
        label: of their axis, which ends at 100.
        most: largest number of bars.
    """
    from matplotlib.figure import Figure

    ordered = sorted(values.items(), key=lambda item: item[1])
    if len(ordered) > most:
        ordered = [*ordered[: most // 2], *ordered[-most // 2 :]]
    figure = Figure(figsize=(6, 1.2 + 0.25 * len(ordered)), layout="constrained")
    axes = figure.add_subplot(xlabel=label, xlim=(0, 100))
    axes.grid(alpha=0.3, axis="x")
    axes.barh(range(len(ordered)), [value for _, value in ordered])
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    return figure
