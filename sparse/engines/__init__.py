"""Three interchangeable engines behind one small interface, and the one registry of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from sparse.engines.base import Engine
from sparse.engines.dense import DenseEngine
from sparse.engines.minkowski import INSTALL, MinkowskiEngine, why_unavailable
from sparse.engines.patch import PatchEngine
from sparse.errors import InputError


@dataclass(frozen=True)
class EngineEntry:
    """What the rest of the project may know of an engine.

    Attributes:
        make: builds the engine.
        devices: types of the devices it computes on; None for any.
        dtypes: types of the weights it computes with; None for any floating point.
        compiles: whether `torch.compile` makes one graph of a step with it.
        automatic: whether `auto` may choose it; the first entry that can run wins.
        missing: returns one clause that says why it is not installed, or None.
    """

    make: Callable[[], Engine]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    compiles: bool = True
    automatic: bool = True
    missing: Callable[[], str | None] = lambda: None

    def obstacle(self, device: str, dtype: torch.dtype, compiled: bool) -> str | None:
        """Return one clause that says why the engine can't run so, or None where it can."""
        if self.devices is not None and device not in self.devices:
            return f"it computes on {' and '.join(self.devices)}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it computes in {' and '.join(map(str, self.dtypes))}, not in {dtype}"
        if compiled and not self.compiles:
            return "torch.compile can't take its operators"
        return self.missing()


ENGINES: dict[str, EngineEntry] = {
    "minkowski": EngineEntry(
        MinkowskiEngine,
        devices=("cpu",),
        dtypes=(torch.float32, torch.float64),
        compiles=False,
        missing=lambda: (reason := why_unavailable()) and f"{reason}; install it with `{INSTALL}`",
    ),
    "patch": EngineEntry(PatchEngine),
    "dense": EngineEntry(DenseEngine, automatic=False),
}
"""All engines by name, best default first."""


def available_engines(device: str = "cpu") -> list[str]:
    """Names of the engines that can run on a type of device, best default first."""
    return [
        name
        for name, entry in ENGINES.items()
        if entry.obstacle(device, torch.float32, compiled=False) is None
    ]


def check_engine_name(name: str) -> None:
    """Raise InputError for an unknown engine, or a named one that is not installed."""
    if name == "auto":
        return
    if name not in ENGINES:
        near = get_close_matches(name, ENGINES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"engine {name!r} is unknown: {hint}use auto, {', '.join(ENGINES)}")
    _check_runs(name, ENGINES[name].missing())


def resolve_engine(
    name: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[str, str]:
    """Return the name of the engine that runs, and why: one clause, empty where it was named.

    Args:
        name: a key of `ENGINES`, or `auto`: the first of them that can run so. All give the same
            numbers.
        device: type of the device that computes.
        dtype: type of the weights.
        compiled: whether `torch.compile` has to take it.

    Raises:
        InputError: unknown name, or an engine asked for by name that can't run so.
    """
    check_engine_name(name)
    obstacles = {key: ENGINES[key].obstacle(device, dtype, compiled) for key in ENGINES}
    if name != "auto":
        _check_runs(name, obstacles[name])
        return name, ""
    candidates = [key for key, entry in ENGINES.items() if entry.automatic]
    chosen = next(key for key in candidates if obstacles[key] is None)
    passed = [
        f"{key} can't run: {obstacles[key]}" for key in candidates[: candidates.index(chosen)]
    ]
    return chosen, "; ".join(["chosen by auto", *passed])


def get_engine(
    name: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Engine:
    """Return an engine; arguments and errors are those of `resolve_engine`."""
    return ENGINES[resolve_engine(name, device, dtype, compiled)[0]].make()


def _check_runs(name: str, obstacle: str | None) -> None:
    if obstacle is not None:
        raise InputError(
            f"engine {name!r} can't run: {obstacle}; or use engine 'patch', which gives the same "
            "numbers"
        )
