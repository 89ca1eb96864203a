"""What surrounds an update: the gradient's norm, and what to do where the loss is not finite."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fcmae.train.processes import OnHost
from sparse.errors import InputError


class Update(NamedTuple):
    """An update of which the host does not know yet whether it was applied.

    values: whether the loss or gradient was not finite, the loss, and the gradient's norm; read:
    positions of the files that this process read for it.
    """

    step: int
    values: OnHost
    read: list[Tensor]


def check_gate(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that an optimizer obeys `found_inf`, by which an update that is not finite is
    skipped without waiting for the device.

    Raises:
        InputError: it would apply such an update.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise InputError(
            f"optimizer {type(optimizer).__name__} ignores found_inf, so a loss that is not finite "
            "would destroy the weights: use one that supports it, such as AdamW(fused=True)"
        )


def gradient_norm(model: nn.Module, clip: float | None) -> Tensor:
    """The norm of the whole gradient before it is scaled down to `clip`, where it is longer."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None and math.isfinite(clip):
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


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
