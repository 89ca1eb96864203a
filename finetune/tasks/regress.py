"""Numbers for each image: a loss on standardised targets; MAE, RMSE and R²."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, r2_score

from fcmae.data.labelled import Labels
from fcmae.data.sources import Indices
from fcmae.data.table import Table
from fcmae.train.processes import World
from finetune.config import FinetuneConfig
from finetune.tasks.base import Gathered, LabelKind, mean_of
from sparse.errors import InputError, brief

OTHERS = ("label", "labels")
"""Columns that are classes."""

SCORES = ("mae", "rmse", "r2")

_log = logging.getLogger(__name__)


class NumberMeasurement(Gathered):
    """Mean absolute error, root of the mean squared error and R² of each target.

    Computed on standardised numbers, so that a large mean costs no digits.

    Args:
        kind: whose loss and units count.
        world: see `LabelKind.measurement`.
    """

    def __init__(self, kind: "Regress", world: World) -> None:
        super().__init__(world)
        self.kind, self.state = kind, kind.state

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the image's known numbers; 0 without any."""
        return self.kind.errors(outputs, targets).nanmean(1).nan_to_num()

    def compute(self) -> dict[str, float]:
        self.gather()
        losses, self._each = [], {}
        for place, name in enumerate(self.kind.names):
            there = self.targets[:, place].isfinite()
            found, true = (v[there, place].double() for v in (self.outputs, self.targets))
            unit, n = self.kind.state["std"][place], len(true)
            scores: dict[str, float | None] = dict.fromkeys(SCORES)
            if n:
                losses.append(float(self.kind.errors(found, true).mean()))
                scores["mae"] = unit * float(mean_absolute_error(found, true))
                scores["rmse"] = unit * float(mean_squared_error(found, true, squared=False))
            if len(true.unique()) > 1:
                scores["r2"] = float(r2_score(found, true))
            self._each[name] = {
                key: None if value is None or not math.isfinite(value) else value
                for key, value in {**scores, "n": n}.items()
            }
        logged = {f"mae/{name}": scores["mae"] for name, scores in self._each.items()}
        logged["r2"] = mean_of([scores["r2"] for scores in self._each.values()])
        known = {name: value for name, value in logged.items() if value is not None}
        return {**known, "loss": sum(losses) / len(losses) if losses else math.nan}

    def each(self) -> dict[str, dict[str, Any]]:
        return self._each

    def total(self) -> dict[str, Any]:
        return {"n": len(self.outputs)}

    def result(self) -> dict[str, Any]:
        """Return each score, and `values`, the known numbers, by the target's name."""
        by_score = {
            score: {name: scores[score] for name, scores in self._each.items()}
            for score in (*SCORES, "n")
        }
        return {**by_score, "values": by_score["n"], **self.total()}

    def draw(self) -> Any:
        """Plot the prediction of each target against its true value."""
        from matplotlib.figure import Figure

        names, true = self.kind.names, self.kind.decode(self.targets)
        found = self.kind.decode(self.outputs)
        across = min(len(names), 3)
        down = math.ceil(len(names) / across)
        figure = Figure(figsize=(4 * across, 4 * down), layout="constrained")
        for place, name in enumerate(names):
            axes = figure.add_subplot(down, across, place + 1, title=name)
            axes.set(xlabel="true", ylabel="predicted")
            pairs = np.stack([true[:, place], found[:, place]])
            pairs = pairs[:, np.isfinite(pairs).all(0)]
            axes.scatter(pairs[0], pairs[1], s=8, alpha=0.5)
            if pairs.size:
                ends = [pairs.min(), pairs.max()]
                axes.plot(ends, ends, color="grey", linewidth=0.8)
        return figure


class Regress(LabelKind):
    """Numbers for each image. The state has `mean` and `std` of each target over the training
    images, and the `loss`."""

    task = "regress"
    output = "numbers"
    layout = "a CSV file with columns of numbers"

    _weights: Tensor

    @classmethod
    def recognises(cls, labels: Table | Path) -> bool:
        if not isinstance(labels, Table):
            return False
        columns = [cells for name, cells in labels.columns.items() if name not in OTHERS]
        return bool(columns) and all(
            _number(cell) is not None for cells in columns for cell in cells if cell
        )

    @classmethod
    def read(
        cls, table: Table, rows: Indices, names: tuple[str, ...] | None
    ) -> tuple[Labels, tuple[str, ...]]:
        """The numbers of each row (N, K), float64; NaN for an empty cell."""
        names = names or tuple(name for name in table.columns if name not in OTHERS)
        labels = np.full((len(rows), len(names)), np.nan)
        wrong: list[str] = []
        for place, name in enumerate(names):
            cells = table.column(name)
            for at, row in enumerate(rows.tolist()):
                if not cells[row]:
                    continue
                if (value := _number(cells[row])) is None:
                    wrong.append(f"{table.lines[row]} has {cells[row][:20]!r} in {name!r}")
                else:
                    labels[at, place] = value
        if wrong:
            what = f"{len(wrong)} cells of {table.file} are not finite numbers: line {brief(wrong)}"
            raise InputError(f"{what}; leave a cell empty where a number is missing")
        if not names:
            raise InputError(f"{table.file} has no column of numbers: add one beside path")
        return labels, names

    def prepare(self, config: FinetuneConfig, train: Labels, device: torch.device) -> None:
        super().prepare(config, train, device)
        if config.class_weights != "none":
            raise InputError("class_weights balanced is for classes, the task is regress: use none")
        there = np.isfinite(train)
        counts = there.sum(0)
        if not counts.all():
            empty = brief(repr(name) for name, n in zip(self.names, counts, strict=True) if not n)
            raise InputError(f"no training image has a number in {empty}: remove the column")
        same = np.nanmin(train, 0) == np.nanmax(train, 0)  # rounding could give it a deviation
        if constant := [name for name, alike in zip(self.names, same, strict=True) if alike]:
            _log.warning("the same in all training images: %s", brief(map(repr, constant)))
        self.state = {
            "mean": np.nanmean(train, 0).tolist(),
            "std": np.where(same, 1.0, np.nanstd(train, 0)).tolist(),
            "loss": config.regress_loss,
        }
        missing = there.size - int(counts.sum())
        if missing:
            _log.info(
                "%d of %d numbers to train on are missing and not learned", missing, there.size
            )
        self._weights = torch.tensor(len(train) / counts, dtype=torch.float32, device=device)

    def encode(self, labels: Labels) -> Labels:
        """Standardise numbers: (labels - mean) / std, float32; NaN where they are missing."""
        mean, std = self.state["mean"], self.state["std"]
        return np.asarray((labels - np.array(mean)) / np.array(std), np.float32)

    def decode(self, values: Tensor) -> npt.NDArray[np.float64]:
        """Return standardised numbers (…, K) in their own units."""
        mean, std = np.array(self.state["mean"]), np.array(self.state["std"])
        return np.asarray(values.double().cpu().numpy() * std + mean)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each of the standardised numbers."""
        loss = F.huber_loss if self.state["loss"] == "huber" else F.mse_loss
        return loss(outputs, targets, reduction="none")

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """Every target counts the same: its numbers weigh the more, the fewer there are."""
        outputs = forward(images_BCHW).float()
        known = torch.where(targets.isfinite(), targets, outputs.detach())  # no error elsewhere
        return (self.errors(outputs, known) * self._weights).mean()

    def measurement(self, world: World, final: bool = False) -> NumberMeasurement:
        return NumberMeasurement(self, world)

    def chance(self, scores: Sequence[Mapping[str, float]], val: Labels) -> str | None:
        best = max((score["r2"] for score in scores if "r2" in score), default=math.inf)
        return f"R² is {best:.2f}, that of the mean is 0" if best <= 0 else None

    def exported(self, model: nn.Module) -> nn.Module:
        return InUnits(model, self.state)

    def describe_target(self, target: npt.NDArray[Any]) -> str:
        return self._words(torch.from_numpy(target))

    def describe_output(self, output: Tensor) -> str:
        return self._words(output)

    def _words(self, values: Tensor) -> str:
        pairs = [*zip(self.names, self.decode(values).tolist(), strict=True)]
        shown = ["?" if math.isnan(value) else f"{value:.4g}" for _, value in pairs]
        if len(pairs) == 1:
            return shown[0]
        return ", ".join(f"{name} {text}" for (name, _), text in zip(pairs, shown, strict=True))

    def cells(self, outputs: Tensor, top: int) -> list[list[str]]:
        """The numbers in their own units."""
        return [[f"{value:.9g}" for value in row] for row in self.decode(outputs).tolist()]


class InUnits(nn.Module):
    """A model with its outputs (B, K) in their own units.

    Args:
        model: gives standardised numbers.
        state: of `Regress`.
    """

    exact_buffers = True
    """These stay float32 in an export in float16, whose numbers end at 65,504."""

    mean_K: Tensor
    std_K: Tensor

    def __init__(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            self.register_buffer(f"{name}_K", torch.tensor(state[name], dtype=torch.float32))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        out: Tensor = self.model(images_BCHW).float() * self.std_K + self.mean_K
        return out


def _number(cell: str) -> float | None:
    """Return a cell's value; None if it is not a finite number."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
