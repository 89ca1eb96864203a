"""An update whose loss may turn out not to be finite, and what it must not leave behind."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fcmae.train.processes import OnHost


class Update(NamedTuple):
    """An update of which the host does not know yet whether it was applied.

    values: whether the loss or gradient was not finite, the loss, and the gradient's norm; read:
    positions of the files that this process read for it.
    """

    step: int
    values: OnHost
    read: list[Tensor]


class RunningStatistics:
    """Batch norm's: they take in a batch before it is known that its loss is not finite.

    Args:
        model: whose they are; None has none to look after.
    """

    def __init__(self, model: nn.Module | None) -> None:
        buffers = [] if model is None else [*model.buffers()]
        self._now = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        self._before = [buffer.clone() for buffer in self._now]

    def restore(self, broken: Tensor) -> None:
        """Set them back where `broken`, a scalar on their device, is not 0: without waiting."""
        for now, before in zip(self._now, self._before, strict=True):
            now.copy_(torch.where(broken > 0, before, now))
