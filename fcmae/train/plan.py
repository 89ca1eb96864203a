"""The number of steps of a run, and the learning rate of each."""

import math
from dataclasses import dataclass
from typing import Any

from fcmae.data.order import steps_per_epoch

BASE_BATCH = 256
"""The batch size for which learning rates are given."""

WARMUP_SHARE = 0.1
WARMUP_EPOCHS = 40
DROPS = (3 / 4, 11 / 12)
"""Parts of a run after which the schedule `step` divides the rate by 10: 27 and 33 of 36 epochs."""

STEEPEST = 4
"""How much faster the rate may rise in a short run than over its least number of steps."""


@dataclass(frozen=True)
class Plan:
    """The learning rate rises to `peak` in `warmup` steps and falls to zero, or in two steps.

    Attributes:
        schedule: how it falls: cosine, linear or step.
    """

    steps_per_epoch: int
    epochs: int
    peak: float
    warmup: int
    schedule: str = "cosine"

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.schedule == "step":
            return self.peak * 0.1 ** sum(step >= part * self.total_steps for part in DROPS)
        progress = (step - self.warmup) / max(self.total_steps - self.warmup, 1)
        if self.schedule == "linear":
            return self.peak * (1 - progress)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_plan(config: Any, images: int, epochs: int, least_warmup: int = 0) -> Plan:
    """The plan of a config of pretraining or fine-tuning.

    Args:
        config: of the run.
        images: to train on.
        epochs: passes over them.
        least_warmup: the fewest steps of a warm-up that was not asked for, but at most half of the
            run. If half of the run is so short that the rate would rise more than `STEEPEST` times
            as fast as over `least_warmup` steps, the peak is lower.

    The warm-up is as long as asked, else the paper's 40 epochs but at most 10 % of the run.
    """
    per_epoch, asked = steps_per_epoch(images, config.batch_size), config.optim.warmup_epochs
    schedule = config.optim.schedule
    total, peak = per_epoch * epochs, asked_rate(config)
    if asked is not None:
        return Plan(per_epoch, epochs, peak, min(round(asked * per_epoch), total), schedule)
    usual = min(WARMUP_EPOCHS * per_epoch, int(WARMUP_SHARE * total))
    if least_warmup:
        peak *= min(max(total // 2, 1) * STEEPEST / least_warmup, 1.0)
    return Plan(per_epoch, epochs, peak, max(usual, min(least_warmup, total // 2)), schedule)


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
