"""Sparse ConvNeXt V2 encoders: one network, three engines, dense weights.

The names below load torch on first use, so errors and sizes are available without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse.encoder import SparseConvNeXtV2
    from sparse.engines import available_engines, get_engine

__all__ = ["SparseConvNeXtV2", "available_engines", "get_engine"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sparse' has no attribute {name!r}")
    home = "sparse.encoder" if name == "SparseConvNeXtV2" else "sparse.engines"
    return getattr(importlib.import_module(home), name)
