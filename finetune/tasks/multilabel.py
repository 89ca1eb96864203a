"""Several classes per image, or none: binary cross-entropy, mean average precision, F1."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_f1_score,
    binary_precision_recall_curve,
)

from fcmae.data.labelled import Labels, check_known, check_names
from fcmae.data.sources import Indices
from fcmae.data.table import Table
from fcmae.train.processes import World
from finetune.config import FinetuneConfig
from finetune.tasks.base import Gathered, LabelKind, bars, mean_of
from sparse.errors import InputError

LABELS = "labels"
SEPARATOR = ";"

UNSURE = 0.5
"""Threshold of a class without an image that has it."""


class LabelMeasurement(Gathered):
    """Average precision and F1 in percent, of each class and their means, and mean cross-entropy.

    Classes that no image has are not measured.

    Args:
        names: the classes.
        world: see `LabelKind.measurement`.
        thresholds: probabilities from which a class is predicted (K,); None chooses those of the
            highest F1.
    """

    def __init__(
        self, names: Sequence[str], world: World, thresholds: Sequence[float] | None
    ) -> None:
        super().__init__(world)
        self.names, self._thresholds = names, thresholds

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)

    def compute(self) -> dict[str, float]:
        self.gather()
        chances, wanted = self.outputs.sigmoid().nan_to_num(), self.targets.long()
        thresholds = self._thresholds
        if thresholds is None:
            pairs = zip(chances.T, wanted.T, strict=True)
            thresholds = [best_threshold(chance, has) for chance, has in pairs]
        self.state = {"thresholds": list(thresholds)}
        self._each: dict[str, dict[str, Any]] = {}
        for name, chance, has, least in zip(
            self.names, chances.T, wanted.T, thresholds, strict=True
        ):
            ap = f1 = None
            if has.any():
                ap = 100 * float(binary_average_precision(chance, has))
                f1 = 100 * float(binary_f1_score((chance >= least).long(), has))
            self._each[name] = {"ap": ap, "f1": f1, "threshold": least, "n": int(has.sum())}
        total = self.total()
        loss = float(self.losses(self.outputs, self.targets).mean())
        scores = {key: total[key] for key in ("map", "f1") if total[key] is not None}
        if math.isnan(loss):  # outputs are not numbers
            scores = dict.fromkeys(scores, math.nan)
        return {**scores, "loss": loss}

    def each(self) -> dict[str, dict[str, Any]]:
        return self._each

    def total(self) -> dict[str, Any]:
        ap, f1 = (mean_of([scores[key] for scores in self._each.values()]) for key in ("ap", "f1"))
        return {"map": ap, "f1": f1, "n": len(self.outputs)}

    def draw(self) -> Any:
        """Draw the average precision of each class."""
        found = {name: scores["ap"] for name, scores in self.each().items() if scores["n"]}
        return bars(found, "average precision, %")


def best_threshold(chances_N: Tensor, has_N: Tensor) -> float:
    """Return the threshold on probabilities with the highest F1, midway between two of them."""
    if not has_N.any():
        return UNSURE
    precision, recall, at = binary_precision_recall_curve(chances_N, has_N)
    f1 = (2 * precision * recall / (precision + recall).clamp_min(1e-12))[:-1]
    best = int(f1.argmax())
    below = at[best - 1] if best else torch.zeros(())
    return float((at[best] + below) / 2)


class Multilabel(LabelKind):
    """Any number of classes for each image. The state has `thresholds`."""

    task = "multilabel"
    score = "map"
    layout = f"a CSV file with a column labels, separated by {SEPARATOR}"

    _weights: Tensor | None = None

    @classmethod
    def recognises(cls, labels: Table | Path) -> bool:
        return isinstance(labels, Table) and LABELS in labels.columns

    @classmethod
    def read(
        cls, table: Table, rows: Indices, names: tuple[str, ...] | None
    ) -> tuple[Labels, tuple[str, ...]]:
        """Which classes each row has (N, K), bool; an empty cell means none."""
        cells = table.column(LABELS)
        given = [
            {part.strip() for part in cells[row].split(SEPARATOR)} - {""} for row in rows.tolist()
        ]
        found = sorted(set().union(*given))
        if not found:
            raise InputError(f"{table.file} has {len(rows)} rows without any label in {LABELS!r}")
        if names is not None:
            check_known(table.file, found, names, "train")
        names = names or check_names(found, table.file)
        places = {name: place for place, name in enumerate(names)}
        labels = np.zeros((len(rows), len(names)), np.bool_)
        for row, classes in zip(labels, given, strict=True):
            row[[places[name] for name in classes]] = True
        return labels, names

    def prepare(self, config: FinetuneConfig, train: Labels, device: torch.device) -> None:
        super().prepare(config, train, device)
        if config.class_weights == "balanced":
            have = train.sum(0)
            weights = torch.tensor((len(train) - have) / np.maximum(have, 1), dtype=torch.float32)
            self._weights = weights.to(device)

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        outputs = forward(images_BCHW)
        return F.binary_cross_entropy_with_logits(
            outputs.float(), targets.float(), pos_weight=self._weights
        )

    def measurement(self, world: World, final: bool = False) -> LabelMeasurement:
        return LabelMeasurement(self.names, world, self.state["thresholds"] if final else None)

    def chance(self, scores: Sequence[Mapping[str, float]], val: Labels) -> str | None:
        """Guessing has the average precision of the share of images that have the class."""
        shares = 100 * val.mean(0)[val.any(0)]
        share, spread = shares.mean(), math.sqrt((shares * (100 - shares)).mean() / len(val))
        found = max(score.get("map", math.inf) for score in scores)
        if found > share + spread:
            return None
        return f"mAP is {found:.1f} %, that of guessing {share:.1f} %"

    def describe_target(self, target: npt.NDArray[Any]) -> str:
        return ", ".join(self.names[place] for place in np.flatnonzero(target)) or "none"

    def describe_output(self, output: Tensor) -> str:
        chances = output.float().sigmoid().tolist()
        rows = zip(self.names, chances, self.state["thresholds"], strict=True)
        return ", ".join(f"{name} {c:.2f}" for name, c, least in rows if c >= least) or "none"

    def cells(self, outputs: Tensor, top: int) -> list[list[str]]:
        """The probability of each class."""
        return [[f"{chance:.6f}" for chance in row] for row in outputs.sigmoid().tolist()]
