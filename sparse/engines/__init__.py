"""Three interchangeable engines behind one small interface, and their registry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse.engines.base import Layout, Sites
from sparse.engines.dense import dense_sites
from sparse.engines.minkowski import INSTALL, minkowski_sites, why_unavailable
from sparse.engines.patch import lay_out_patches, patch_sites
from sparse.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Engine:
    """Decides where the visible sites are and how spatial operations run on them.

    Attributes:
        name: its name in settings.
        sites: lays out the four stages (strides 4, 8, 16, 32) for a batch of masks. Its arguments
            are a mask (B, H, W), bool on the CPU, one entry per 32×32 patch, True = hidden, and the
            device of images and parameters.
        lay_out: lays out the sites of a mask (B, H, W) on the CPU, ahead of the step; `sites` takes
            the result in place of the mask. None if the engine can't.
        devices: device types that it supports; None for any.
        dtypes: dtypes of weights that it supports; None for any floating point.
        compiles: whether `torch.compile` can compile a step with it to one graph.
        automatic: whether `auto` may choose it; `auto` takes the first engine that can run.
        missing: returns the reason why it is not installed, as a clause, or None.
        why: why `auto` chose it; empty if it was named.
    """

    name: str
    sites: Callable[[Any, torch.device], Sequence[Sites]]
    lay_out: Callable[[Tensor], Layout] | None = None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    compiles: bool = True
    automatic: bool = True
    missing: Callable[[], str | None] = lambda: None
    why: str = ""

    def obstacle(self, device: str | None, dtype: torch.dtype | None, compiled: bool) -> str | None:
        """Return the reason why the engine cannot run, as a clause, or None if it can.

        None for a device or dtype means that it is not known yet.
        """
        if self.devices and device not in (None, *self.devices):
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        if self.dtypes and dtype not in (None, *self.dtypes):
            return f"it computes in {' and '.join(map(str, self.dtypes))}, not in {dtype}"
        if compiled and not self.compiles:
            return "torch.compile can't compile its operators"
        return self.missing()


ENGINES = {
    "minkowski": Engine(
        "minkowski",
        minkowski_sites,
        devices=("cpu",),
        dtypes=(torch.float32, torch.float64),
        compiles=False,
        missing=lambda: (reason := why_unavailable()) and f"{reason}; install it with `{INSTALL}`",
    ),
    "patch": Engine("patch", patch_sites, lay_out_patches),
    "dense": Engine("dense", dense_sites, automatic=False),
}
"""All engines by name, best default first."""


def available_engines(device: str = "cpu") -> list[str]:
    """Return the names of the engines that can run on a device type, best default first."""
    engines = ENGINES.values()
    return [e.name for e in engines if e.obstacle(device, torch.float32, compiled=False) is None]


def get_engine(
    name: str = "auto",
    device: str | None = "cpu",
    dtype: torch.dtype | None = torch.float32,
    compiled: bool = False,
) -> Engine:
    """Return the engine that runs.

    Args:
        name: a key of `ENGINES`, or `auto` for the first that can run. All give the same numbers.
        device: type of the device that computes; None if it is not known yet.
        dtype: dtype of the weights; None if it is not known yet.
        compiled: whether `torch.compile` must be able to compile it.

    Raises:
        InputError: unknown name, or a named engine that cannot run.
    """
    if name not in ("auto", *ENGINES):
        raise InputError(f"engine {name!r} is unknown: {did_you_mean(name, ['auto', *ENGINES])}")
    passed = ["chosen by auto"] if name == "auto" else []
    for engine in ENGINES.values():
        if name == engine.name or (name == "auto" and engine.automatic):
            obstacle = engine.obstacle(device, dtype, compiled)
            if obstacle is None:
                return replace(engine, why="; ".join(passed))
            passed.append(f"{engine.name} can't run: {obstacle}")
    raise InputError(f"engine {passed[0]}; use engine 'patch', which gives the same numbers")
