"""The number of steps of a run, and the learning rate of each."""

import math
from dataclasses import dataclass
from typing import Any

from fcmae.data.order import steps_per_epoch

BASE_BATCH = 256
"""The batch size for which learning rates are given."""

WARMUP_SHARE = 0.1
WARMUP_EPOCHS = 40
STEEPEST = 4
"""How much faster the rate may rise in a short run than over its least number of steps."""


@dataclass(frozen=True)
class Plan:
    """The learning rate rises to `peak` in `warmup` steps and falls to zero by a cosine."""

    steps_per_epoch: int
    epochs: int
    peak: float
    warmup: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.total_steps - self.warmup, 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_plan(config: Any, images: int, epochs: int, least_warmup: int = 0) -> Plan:
    """The plan of a config of pretraining or fine-tuning.

    Args:
        config: of the run.
        images: to train on.
        epochs: passes over them.
        least_warmup: see `warmup_steps`.
    """
    per_epoch = steps_per_epoch(images, config.batch_size)
    total, warmup_epochs = per_epoch * epochs, config.optim.warmup_epochs
    return Plan(
        per_epoch,
        epochs,
        peak=asked_rate(config) * peak_share(warmup_epochs, total, least_warmup),
        warmup=warmup_steps(warmup_epochs, per_epoch, total, least_warmup),
    )


def asked_rate(config: Any) -> float:
    """The learning rate that a config asks for, at its batch size."""
    return float(config.optim.base_lr * config.batch_size / BASE_BATCH)


@dataclass(frozen=True)
class AutoEpochs:
    """What `epochs: auto` stands for: the passes that add up to `crops`, within bounds.

    Attributes:
        crops: training crops of the whole run.
        fewest, most: the bounds.
        multiple: passes are rounded up to a multiple of it.
    """

    crops: int
    fewest: int
    most: int
    multiple: int = 1

    def resolve(self, epochs: str | int, images: int) -> int:
        """Return the number of passes over so many images."""
        if epochs != "auto":
            return int(epochs)
        passes = math.ceil(self.crops / images / self.multiple) * self.multiple
        return min(max(passes, self.fewest), self.most)

    def explain(self, epochs: int) -> str:
        """Return a line for the log that says how `epochs` came about."""
        return f"epochs auto: {epochs} ({self.fewest} to {self.most}, about {self.crops:,} crops)"


def warmup_steps(
    epochs: float | None, steps_per_epoch: int, total_steps: int, least: int = 0
) -> int:
    """Steps of linear warm-up: as asked, else the paper's 40 epochs but at most 10 % of the run.

    Args:
        epochs: as asked, or None.
        steps_per_epoch: of the run.
        total_steps: of the run.
        least: minimum for a warm-up that was not asked for, but at most half of the run.
    """
    if epochs is not None:
        return min(round(epochs * steps_per_epoch), total_steps)
    usual = min(WARMUP_EPOCHS * steps_per_epoch, int(WARMUP_SHARE * total_steps))
    return max(usual, min(least, total_steps // 2))


def peak_share(epochs: float | None, total_steps: int, least: int = 0) -> float:
    """Share of the peak rate that the warm-up reaches; the arguments are those of `warmup_steps`.

    1, unless half of the run is so short that the rate would rise more than `STEEPEST` times as
    fast as over `least` steps.
    """
    if epochs is not None or not least:
        return 1.0
    return min(max(total_steps // 2, 1) * STEEPEST / least, 1.0)
