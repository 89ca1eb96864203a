"""What the training loop trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fcmae.train.checkpoint import SavedCheckpoint


class Task(Protocol):
    """What the loop trains.

    Attributes:
        model: the weights, saved as `model`.
        optimizer: AdamW; each group's rate is the schedule's times its `lr_scale`.
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
