"""What the training loop trains: the interface, and reconstruction as such a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fcmae.data.loader import Batch, normalise
from fcmae.model.fcmae import FCMAE
from fcmae.train.checkpoint import SavedCheckpoint


class Task(Protocol):
    """What the loop trains.

    Attributes:
        model: the weights, saved as `model`.
        optimizer: AdamW; each group's rate is the schedule's times its `lr_scale`, if any.
        files: number of files indexed, of which too many may turn out unreadable.
    """

    optimizer: torch.optim.Optimizer
    files: int

    @property
    def model(self) -> nn.Module: ...

    def loss(self, forward: nn.Module, batch: Any) -> Tensor:
        """Mean loss of one part of a batch; `forward` is the model, maybe wrapped for processes."""
        ...

    def after_step(self, step: int) -> None:
        """Called after each update, with the number of completed steps."""
        ...

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Evaluate after epoch `epoch` (from 1) and return what to log.

        May raise `Interrupted` when `stop()` turns true: the epoch's end is then repeated when the
        run goes on.
        """
        ...

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Further tensors to save, by file."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """Further JSON to save."""
        ...

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        """Take back what `extra_tensors` and `extra_state` gave."""
        ...


class Interrupted(Exception):
    """An evaluation was cut short because the run has to stop."""


class Watcher(Protocol):
    """Looks at the model every `epochs` epochs (0: never) and after the last one."""

    epochs: int

    def __call__(self, model: FCMAE, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Return what to log. May raise `Interrupted` when `stop()` turns true."""
        ...


@dataclass(frozen=True)
class Settings:
    """The config with every `auto` resolved."""

    img_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    precision: str
    workers: int


class PretrainTask:
    """FCMAE as something that `Loop` can train."""

    def __init__(
        self,
        model: FCMAE,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        watchers: Sequence[Watcher],
        files: int,
        epochs: int,
    ) -> None:
        self.model, self.optimizer, self.files = model, optimizer, files
        self._settings, self._watchers = settings, watchers
        self._epochs = epochs

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        images = normalise(batch.images, self._settings.mean, self._settings.std, device)
        return forward(images, batch.masks).loss

    def after_step(self, step: int) -> None:
        pass

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for watcher in self._watchers:
            if watcher.epochs and (epoch % watcher.epochs == 0 or epoch == self._epochs):
                metrics |= watcher(self.model, step, stop)
        return metrics

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def extra_state(self) -> dict[str, Any]:
        return {}

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        pass
