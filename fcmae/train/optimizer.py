"""The optimizer: its parameter groups, and the gate for updates that are not finite."""

import math
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from sparse.errors import InputError


def make_optimizer(
    model: nn.Module, optim: Any, depths: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters; a group's `lr_scale` multiplies the schedule.

    Args:
        model: on its device.
        optim: has `weight_decay`, `betas` and, where `depths` are given, `layer_decay`.
        depths: how many layers before the head each parameter is; None treats all equally.

    Raises:
        InputError: the optimizer ignores the non-finite gate.
    """
    decay = optim.layer_decay if depths else 1.0
    groups = parameter_groups(model, optim.weight_decay, decay, depths)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(optim.betas), fused=True)
    check_gate(optimizer)
    return optimizer


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    depths: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that are trained, from the first layer to the head.

    Biases, norms, GRN and what the model itself names (`no_weight_decay`) are not decayed. The
    head's `lr_scale` is 1, that of a parameter `d` layers before it `layer_decay ** d`.
    """
    named: Any = model
    exempt = named.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = 0 if layer_decay == 1 or depths is None else depths[name]
        spared = parameter.ndim <= 1 or name.endswith(".bias")
        spared = spared or any(fnmatch(name, pattern) for pattern in exempt)
        new = {
            "params": [],
            "weight_decay": 0.0 if spared else weight_decay,
            "lr_scale": layer_decay**depth,
        }
        groups.setdefault((-depth, spared), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def check_gate(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that an optimizer obeys `found_inf`, which skips an update that is not finite
    without waiting for the device.

    Raises:
        InputError: it would apply such an update and destroy the weights.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        name = type(optimizer).__name__
        raise InputError(f"optimizer {name} ignores found_inf: use one such as AdamW(fused=True)")


def gradient_norm(model: nn.Module, clip: float | None) -> Tensor:
    """The norm of the whole gradient, before it is scaled down to `clip` if it is larger."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None and math.isfinite(clip):
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm
