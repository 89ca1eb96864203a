"""Three interchangeable engines behind one small interface."""

from __future__ import annotations

import logging
from difflib import get_close_matches

from sparse.engines.base import Engine
from sparse.engines.dense import DenseEngine
from sparse.engines.minkowski import MinkowskiEngine, why_unavailable
from sparse.engines.patch import PatchEngine
from sparse.errors import InputError

__all__ = ["ENGINES", "Engine", "available_engines", "get_engine"]

ENGINES = ("minkowski", "patch", "dense")

_log = logging.getLogger(__name__)


def available_engines() -> list[str]:
    """Names of the engines that can run here, best default first."""
    return [name for name in ENGINES if name != "minkowski" or why_unavailable() is None]


def get_engine(name: str = "auto", device: str = "cpu") -> Engine:
    """Return an engine by name.

    Args:
        name: `minkowski`, `patch`, `dense`, or `auto`: minkowski on the CPU where it is installed,
            else patch. All give the same numbers.
        device: type of the device that will compute.

    Raises:
        InputError: unknown name, or an engine asked for by name that can't run here.
    """
    if name == "auto":
        name, why = _choose(device)
        _log.info("engine %s: %s; patch gives the same numbers (`fcmae bench` compares)", name, why)
    if name == "minkowski":
        if device != "cpu":
            raise InputError(
                f"engine 'minkowski' computes on the CPU, not on {device!r}: use engine 'patch'"
            )
        return MinkowskiEngine()
    if name == "patch":
        return PatchEngine()
    if name == "dense":
        return DenseEngine()
    near = get_close_matches(name, ENGINES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"engine {name!r} is unknown: {hint}use auto, {', '.join(ENGINES)}")


def _choose(device: str) -> tuple[str, str]:
    if device != "cpu":
        return "patch", f"MinkowskiEngine computes on the CPU only and this run is on {device}"
    reason = why_unavailable()
    if reason is not None:
        return "patch", reason
    return "minkowski", "MinkowskiEngine is installed and this run is on the CPU"
