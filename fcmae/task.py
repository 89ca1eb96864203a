"""What the training loop trains: the interface, and reconstruction as such a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fcmae import pictures
from fcmae.checkpoint import Checkpoint
from fcmae.data.loader import Batch, normalise
from fcmae.model import FCMAE
from fcmae.run import RunFolder

PICTURES_SHOWN = 8


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

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back what `extra_tensors` and `extra_state` gave."""
        ...


class Interrupted(Exception):
    """An evaluation was cut short because the run has to stop."""


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
        holdout: list[tuple[Tensor, Tensor]],
        files: int,
        picture_epochs: int,
        epochs: int,
        folder: RunFolder | None,
    ) -> None:
        self.model, self.optimizer, self.files = model, optimizer, files
        self._settings, self._folder = settings, folder
        self._holdout = holdout
        self._picture_epochs, self._epochs = picture_epochs, epochs

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        images = normalise(batch.images, self._settings.mean, self._settings.std, device)
        return forward(images, batch.masks).loss

    def after_step(self, step: int) -> None:
        pass

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        if not self._holdout or not self._picture_epochs:
            return {}
        if epoch % self._picture_epochs and epoch != self._epochs:
            return {}
        total, count, shown = 0.0, 0, None
        for images, masks in self._holdout:
            columns, loss = pictures.reconstruct_batch(
                self.model, images, masks, self._settings.mean, self._settings.std
            )
            total, count = total + loss * len(images), count + len(images)
            shown = columns if shown is None else shown
        if self._folder is not None and shown is not None:
            grid = pictures.grid([column[:PICTURES_SHOWN] for column in shown])
            self._folder.picture("reconstructions", step, grid)
        return {"holdout_loss": total / count}

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def extra_state(self) -> dict[str, Any]:
        return {}

    def restore(self, checkpoint: Checkpoint) -> None:
        pass
