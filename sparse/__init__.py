"""Sparse ConvNeXt V2 encoders: one network, three engines, dense weights.

The names below load torch on first use, so that errors and sizes can be had without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse.encoder import SparseConvNeXtV2
    from sparse.engines import available_engines, get_engine

__all__ = ["SparseConvNeXtV2", "available_engines", "get_engine"]

_HOMES = {
    "SparseConvNeXtV2": "encoder",
    "available_engines": "engines",
    "get_engine": "engines",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sparse.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sparse' has no attribute {name!r}")
