"""One class per image: cross-entropy, top-1 and top-5."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from fcmae.data.dataset_list import is_dataset, open_splits
from fcmae.data.labelled import (
    DATASET_VAL,
    TRAIN,
    VAL,
    LabelledData,
    Labels,
    Split,
    at_chance,
    check_known,
    dataset_part,
    find_classes,
    find_labelled,
    labels_of,
    majority_share,
)
from fcmae.data.masks import find_layout
from fcmae.data.object_files import find_place
from fcmae.data.sources import Indices
from fcmae.data.table import LABEL, Table, read_classes
from fcmae.train.processes import World
from finetune.augment import seeded
from finetune.config import FinetuneConfig
from finetune.tasks.base import (
    Counts,
    LabelKind,
    Measurement,
    confusion_rows,
    draw_confusion,
    mean_of,
)
from sparse.errors import InputError, brief

TOP = 5

MOST_COUNTED = 1000
"""With more classes than this, training does not count confusions, for lack of memory."""

_log = logging.getLogger(__name__)


class ClassMeasurement(Measurement):
    """Top-1 and top-5 in percent, the mean cross-entropy, and confusions.

    With fewer than five classes, `top5` counts all of them.

    Args:
        names: the classes.
        world: see `LabelKind.measurement`.
        counted: whether to count confusions, which all that follows `compute` needs.
    """

    state: Mapping[str, Any] = {}

    def __init__(self, names: Sequence[str], world: World, counted: bool) -> None:
        self.names, classes, device = names, len(names), world.device
        top: dict[str, Any] = {"num_classes": classes, "average": "micro", "validate_args": False}
        self._accuracy = {
            f"top{k}": MulticlassAccuracy(top_k=min(k, classes), **top).to(device) for k in (1, TOP)
        }
        self._loss = MeanMetric(nan_strategy="disable").to(device)
        self._counts = None
        if counted:
            self._counts = MulticlassConfusionMatrix(classes, validate_args=False).to(device)

    def update(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs.float()
        for metric in self._accuracy.values():
            metric.update(outputs, targets)
        if self._counts is not None:
            self._counts.update(outputs, targets)
        losses = F.cross_entropy(outputs, targets, reduction="none")
        self._loss.update(losses)
        return losses

    def compute(self) -> dict[str, float]:
        with warnings.catch_warnings():  # a process may have had no image
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            found = {name: 100 * float(m.compute()) for name, m in self._accuracy.items()}
            self._top5 = found[f"top{TOP}"]
            if self._counts is not None:
                self.confusion: Counts = self._counts.compute().cpu().numpy()
            return found | {"loss": float(self._loss.compute())}

    def each(self) -> dict[str, dict[str, Any]]:
        counts, hits = self.confusion.sum(axis=1).tolist(), self.confusion.diagonal().tolist()
        return {
            name: {"top1": 100 * hit / n if n else None, "n": n}
            for name, hit, n in zip(self.names, hits, counts, strict=True)
        }

    def total(self) -> dict[str, Any]:
        n, each = int(self.confusion.sum()), self.each().values()
        return {
            "top1": 100 * int(self.confusion.trace()) / n,
            "top5": self._top5,
            "top5_of": min(TOP, len(self.names)),
            "balanced": mean_of([scores["top1"] for scores in each if scores["n"]]),
            "n": n,
        }

    def rows(self) -> list[list[Any]]:
        return confusion_rows(self.confusion, self.names)

    def draw(self) -> Any:
        return None if self._counts is None else draw_confusion(self.confusion, self.names)


class Classify(LabelKind):
    """A class for each image."""

    task = "classify"
    score = "top1"
    layout = "train/CLASS/… and val/CLASS/…, or a CSV file with a column label"

    _mixup: Mixup | None = None
    _weights: Tensor | None = None
    _smoothing = 0.0

    @classmethod
    def recognises(cls, labels: Table | Path) -> bool:
        if isinstance(labels, Table):
            return LABEL in labels.columns
        places = (find_place(labels, split) for split in (TRAIN, ""))
        return find_layout(labels) is None and not any(places)

    @classmethod
    def read(
        cls, table: Table, rows: Indices, names: tuple[str, ...] | None
    ) -> tuple[Labels, tuple[str, ...]]:
        return read_classes(table, rows, names)

    @classmethod
    def find_folder(cls, config: FinetuneConfig) -> LabelledData:
        return find_labelled(config.data, config.val_fraction, exclude=config.out)

    @classmethod
    def find_split(cls, folder: Path, split: str, names: Sequence[str]) -> Split:
        if is_dataset(folder):
            splits = open_splits(str(folder))
            part = dataset_part(splits, splits.pick(*(DATASET_VAL if split == VAL else [split])))
            check_known(part.place, part.names, names, "the model")
            return Split(part.source, part.prefix, labels_of(part.source, names))
        inside, prefix = folder / split, f"{split}/"
        if not inside.is_dir():
            if (folder / TRAIN).is_dir():
                there = brief(repr(path.name) for path in sorted(folder.iterdir()) if path.is_dir())
                raise InputError(f"{folder} has no split {split!r}: it has {there}")
            _log.info("%s has no folder %r: its folders are classes", folder, split)
            inside, prefix = folder, ""
        files, found = find_classes(inside)
        check_known(inside, found, names, "the model")
        return Split(files, prefix, labels_of(files, names))

    def prepare(self, config: FinetuneConfig, train: Labels, device: torch.device) -> None:
        augment, self._smoothing = config.augment, config.augment.label_smoothing
        if augment.mixup or augment.cutmix:
            self._mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing,
                num_classes=len(self.names),
            )  # fmt: skip
            self._smoothing = 0.0  # the blended labels are smoothed already
        if config.class_weights == "balanced":
            counts = np.bincount(train, minlength=len(self.names))
            weights = len(train) / (len(self.names) * np.maximum(counts, 1))
            self._weights = torch.tensor(weights, dtype=torch.float32, device=device)

    def check(self, part: int, batch_size: int) -> None:
        if self._mixup is not None and part % 2:
            raise InputError(
                f"batch_size {batch_size} makes parts of {part} images, but mixup and cutmix pair "
                f"them: use {batch_size + batch_size // part}"
            )

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        if self._mixup is not None:
            # The loop seeds torch's stream at each step; numpy's, timm's source, follows it.
            with seeded(int(torch.randint(2**62, ()))):
                images_BCHW, targets = self._mixup(images_BCHW, targets)
        # Not the mean that torch divides by the weights of this part: parts count equally.
        return F.cross_entropy(
            forward(images_BCHW), targets, self._weights, reduction="none",
            label_smoothing=self._smoothing,
        ).mean()  # fmt: skip

    def measurement(self, world: World, final: bool = False) -> ClassMeasurement:
        return ClassMeasurement(self.names, world, final or len(self.names) <= MOST_COUNTED)

    def chance(self, scores: Sequence[Mapping[str, float]], val: Labels) -> str | None:
        top1 = max(score["top1"] for score in scores)
        if not at_chance(top1, val):
            return None
        share = majority_share(val)
        return f"top-1 is {top1:.1f} %, always answering the most frequent class {share:.1f} %"

    def describe_target(self, target: npt.NDArray[Any]) -> str:
        return self.names[int(target)]

    def describe_output(self, output: Tensor) -> str:
        score, place = output.float().softmax(0).max(0)
        return f"{self.names[int(place)]} {float(score):.2f}"

    def columns(self, top: int) -> Sequence[str]:
        """`label` and `score` of the best class, then of the next best: `label2`, `score2`, …"""
        places = ["", *map(str, range(2, min(top, len(self.names)) + 1))]
        return [f"{kind}{place}" for place in places for kind in ("label", "score")]

    def cells(self, outputs: Tensor, top: int) -> list[list[str]]:
        best = outputs.softmax(1).topk(min(top, len(self.names)))
        return [
            [cell for score, place in zip(scores, places, strict=True)
             for cell in (self.names[place], f"{score:.6f}")]
            for scores, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]  # fmt: skip
