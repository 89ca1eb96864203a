"""What a run is to do, what may end it early, and how fast it goes."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from fcmae.train.optimizer import cosine_with_warmup, warmup_steps

_log = logging.getLogger(__name__)

BASE_BATCH = 256
"""Batch that learning rates are given for."""


@dataclass(frozen=True)
class Plan:
    """How many steps there are and what happens at which.

    The learning rate rises to `peak` in `warmup` steps and falls to zero by a cosine.
    """

    steps_per_epoch: int
    epochs: int
    accumulate: int
    peak: float
    warmup: int
    clip_grad: float | None
    seed: int
    log_steps: int
    checkpoint_steps: int | None
    checkpoint_minutes: float
    keep_checkpoints: int
    max_bad: float
    nonfinite: str
    max_nonfinite: int
    autocast: torch.dtype | None

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def learning_rate(self, step: int) -> float:
        return cosine_with_warmup(step, self.peak, self.warmup, self.total_steps)


def pretraining_epochs(epochs: str | int, images: int) -> int:
    """`auto` → as many passes as make up `IMAGES_SEEN`, in tens, from 100 to the paper's 800."""
    if epochs != "auto":
        return int(epochs)
    return min(max(math.ceil(IMAGES_SEEN / images / 10) * 10, FEWEST_EPOCHS), MOST_EPOCHS)


def make_plan(config: Any, steps_per_epoch: int, epochs: int, autocast: torch.dtype | None) -> Plan:
    """The plan of a config of pretraining or fine-tuning."""
    total = steps_per_epoch * epochs
    return Plan(
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        accumulate=config.accumulate,
        peak=config.optim.base_lr * config.batch_size / BASE_BATCH,
        warmup=warmup_steps(config.optim.warmup_epochs, steps_per_epoch, total),
        clip_grad=config.optim.clip_grad,
        seed=config.seed,
        log_steps=config.log_steps,
        checkpoint_steps=config.checkpoint_steps,
        checkpoint_minutes=config.checkpoint_minutes,
        keep_checkpoints=config.keep_checkpoints,
        max_bad=config.max_bad,
        nonfinite=config.nonfinite,
        max_nonfinite=config.max_nonfinite,
        autocast=autocast,
    )


class Signals:
    """Turns SIGTERM and SIGUSR1, and while training Ctrl-C, into a wish to stop.

    A second Ctrl-C quits at once.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._before = self._catch(signal.SIGTERM, signal.SIGUSR1)
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    @contextmanager
    def ctrl_c(self) -> Iterator[None]:
        """Heed Ctrl-C inside; before there is something to save it may end the process."""
        before = self._catch(signal.SIGINT)
        try:
            yield
        finally:
            _restore(before)

    def _catch(self, *numbers: int) -> dict[int, Any]:
        return {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


IMAGES_SEEN = 1_200_000
"""Crops that pretraining on a small set sees before more of them bring little; see docs/recipes."""

FEWEST_EPOCHS, MOST_EPOCHS = 100, 800

SAVING_SHARE = 0.05
"""Most of the time that saving may take, where the time decides when to save."""


class Clock:
    """Times training steps, leaving out evaluation and saving; knows when to save."""

    def __init__(self) -> None:
        now = time.perf_counter()
        self._last_save = now
        self._save_seconds = 0.0
        self._warned = False
        self._mark = now
        self._images = 0
        self._steps = 0
        self._speed = 0.0
        self._step_seconds = 0.0

    def count(self, images: int) -> None:
        self._images += images
        self._steps += 1

    def images_per_second(self) -> float:
        """Speed since it was last asked for."""
        seconds = time.perf_counter() - self._mark
        if self._steps:
            self._speed, self._step_seconds = self._images / seconds, seconds / self._steps
        self.skip()
        return self._speed

    def seconds_a_step(self) -> float:
        return self._step_seconds

    def skip(self) -> None:
        self._mark, self._images, self._steps = time.perf_counter(), 0, 0

    def save_due(self, minutes: float) -> bool:
        """Whether so many minutes passed since the last save, and enough for it to be worth it."""
        enough = max(60 * minutes, self._save_seconds * (1 / SAVING_SHARE - 1))
        return minutes > 0 and time.perf_counter() - self._last_save > enough

    def saved(self, began: float, steps: int | None) -> None:
        """Note a save, and say once where saving takes more than its share of the time.

        Args:
            began: when it began, by `time.perf_counter`.
            steps: where saves come by steps, how many lie between two.
        """
        now = time.perf_counter()
        self._save_seconds = now - began
        between = began - self._last_save
        share = self._save_seconds / (between + self._save_seconds)
        if share > SAVING_SHARE and self._save_seconds > 1 and steps and not self._warned:
            self._warned = True
            _log.warning(
                "a save took %.1f s, %.0f %% of the time: --checkpoint_steps %d or more keeps it "
                "under %.0f %%", self._save_seconds, 100 * share,
                math.ceil(steps * self._save_seconds * (1 / SAVING_SHARE - 1) / between),
                100 * SAVING_SHARE,
            )  # fmt: skip
        self._last_save = now
        self.skip()
