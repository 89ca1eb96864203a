"""Learning rates and parameter groups, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

WARMUP_SHARE = 0.1
WARMUP_EPOCHS = 40


def warmup_steps(epochs: float | None, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of linear warm-up: as asked, else the paper's 40 epochs but at most 10 % of the run."""
    if epochs is not None:
        return min(round(epochs * steps_per_epoch), total_steps)
    return min(WARMUP_EPOCHS * steps_per_epoch, int(WARMUP_SHARE * total_steps))


def cosine_with_warmup(step: int, peak: float, warmup: int, total: int) -> float:
    """Learning rate of a step, from 0: a linear rise to `peak`, then a half cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], decay: float
) -> list[dict[str, Any]]:
    """Two groups: weight decay for weights, none for biases, norms, GRN and the mask token."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        spare = parameter.ndim <= 1 or name.endswith(("bias", "mask_token"))
        (spared if spare else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def ema_decay(step: int, most: float) -> float:
    """Decay of averaged weights after `step` updates: short memory at first, `most` in the end."""
    return min(most, (1 + step) / (10 + step))
