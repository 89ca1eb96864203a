"""What a run is to do, what may end it early, and how fast it goes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from fcmae.schedule import cosine_with_warmup, warmup_steps

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


def make_plan(config: Any, steps_per_epoch: int, autocast: torch.dtype | None) -> Plan:
    """The plan of a config of pretraining or fine-tuning."""
    total = steps_per_epoch * config.epochs
    return Plan(
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
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


class Clock:
    """Times training steps, leaving out evaluation and saving."""

    def __init__(self, step: int) -> None:
        now = time.perf_counter()
        self._last_save = now
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

    def since_save(self) -> float:
        return time.perf_counter() - self._last_save

    def saved(self) -> None:
        self._last_save = time.perf_counter()
        self.skip()
