"""Sparse ConvNeXt V2 encoders: one network, three engines, dense weights."""

from sparse.encoder import SparseConvNeXtV2
from sparse.engines import available_engines, get_engine

__all__ = ["SparseConvNeXtV2", "available_engines", "get_engine"]
