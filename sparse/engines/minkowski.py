"""The minkowski engine: coordinates and strided convolutions of MinkowskiEngine 0.5.4.

MinkowskiEngine has no depthwise kernel (its channelwise convolution is a Python loop over 49
offsets), so the depthwise convolution is our own, over the positions of MinkowskiEngine's
coordinates. It computes on the CPU and in float32 or float64.
"""

import collections.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse.engines.base import PackedSites, Sites, Stage
from sparse.engines.patch import patch_sites
from sparse.ops.windows import neighbours
from sparse.sizes import SIDES

BLAS_THREADS = "OPENBLAS_NUM_THREADS"
INSTALL = "python -m sparse.install_minkowski"


@cache
def load_minkowski() -> ModuleType:
    """Import MinkowskiEngine.

    Raises:
        ImportError: it is not installed, or built for another torch.
    """
    # 0.5.4 still imports `Sequence` from `collections`, and appends its own folder to sys.path.
    path = list(sys.path)
    # Its OpenBLAS reads this when it is loaded. Its threads would compete with torch's for the
    # cores, and the strided convolutions that it computes are a small part of the work.
    threads = os.environ.get(BLAS_THREADS)
    os.environ.setdefault(BLAS_THREADS, "1")
    shim = not hasattr(collections, "Sequence")
    if shim:
        collections.Sequence = collections.abc.Sequence  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The MinkowskiEngine was compiled with CPU")
            warnings.filterwarnings("ignore", category=SyntaxWarning)
            return importlib.import_module("MinkowskiEngine")
    finally:
        if shim:
            del collections.Sequence  # type: ignore[attr-defined]
        sys.path[:] = path
        if threads is None:
            del os.environ[BLAS_THREADS]


def why_unavailable() -> str | None:
    """Return the reason why the engine cannot run, as a clause, or None if it can."""
    if importlib.util.find_spec("MinkowskiEngine") is None:
        return "MinkowskiEngine is not installed"
    try:
        load_minkowski()
    except (ImportError, OSError, AttributeError) as error:
        return f"MinkowskiEngine does not load ({str(error).splitlines()[0]})"
    return None


class MinkowskiSites(PackedSites):
    """Visible sites of one stage, at MinkowskiEngine's coordinates, reordered patch by patch.

    The rows of a strided map come in hash order; only its coordinates identify them.

    Args:
        manager, key: MinkowskiEngine's coordinate manager, and the key of this stage's map.
        shape: (B, H, W) of the stage's map.
        side: sites along a patch's side.
        patches_B: visible patches of each image.
        near: of `sparse.ops.windows.neighbours`.

    Attributes:
        following: the next stage, if any.
    """

    following: "MinkowskiSites"

    def __init__(
        self,
        manager: Any,
        key: Any,
        shape: tuple[int, int, int],
        side: int,
        patches_B: Tensor,
        near: Tensor,
    ) -> None:
        self.manager, self.key = manager, key
        stride = SIDES[0] // side
        image, y, x = (manager.get_coordinates(key).long() // torch.tensor([1, stride, stride])).T
        _, h, w = shape
        patch = (image * (h // side) + y // side) * (w // side) + x // side
        self.order_N = ((patch * side + y % side) * side + x % side).argsort()
        self.inverse_N = torch.empty_like(self.order_N)
        self.inverse_N[self.order_N] = torch.arange(len(self.order_N))
        index_N = ((image * h + y) * w + x)[self.order_N]
        super().__init__(*Stage.of(index_N, shape, side, patches_B, near))

    def downsample(self, x_NC: Tensor, weight_OI22: Tensor, bias_O: Tensor) -> Tensor:
        # In a kernel of MinkowskiEngine the first spatial coordinate, here y, runs fastest.
        kernel_4IO = weight_OI22.permute(3, 2, 1, 0).flatten(0, 1).contiguous()
        convolve, shape, mode = _strided_convolution()
        with torch.autocast(x_NC.device.type, enabled=False):
            rows_NC = x_NC.to(kernel_4IO.dtype).index_select(0, self.inverse_N)
            y_MO = convolve(
                rows_NC, kernel_4IO, shape, mode, self.key, self.following.key, self.manager
            )
            return y_MO.index_select(0, self.following.order_N) + bias_O


@cache
def _strided_convolution() -> tuple[Any, Any, Any]:
    """Return MinkowskiEngine's convolution, the shape of a 2×2 kernel of stride 2, and the mode."""
    engine = load_minkowski()
    mode = importlib.import_module("MinkowskiEngineBackend._C").ConvolutionMode.DEFAULT
    shape = engine.KernelGenerator(kernel_size=2, stride=2, dimension=2)
    return engine.MinkowskiConvolutionFunction.apply, shape, mode


def minkowski_sites(mask_BHW: Tensor, device: torch.device) -> Sequence[Sites]:
    """Visible sites at MinkowskiEngine's coordinates. See `sparse.engines.Engine`."""
    visible = ~mask_BHW
    if not visible.any():  # MinkowskiEngine crashes on an empty list of coordinates
        return patch_sites(mask_BHW, device)
    # Kernel maps built by several threads list their pairs in a different order each time, which
    # changes the last bits of a convolution. Also, creating a coordinate manager sets OpenMP's
    # thread count, which torch shares.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        manager, keys = _coordinate_maps(visible)
    finally:
        torch.set_num_threads(threads)
    (batch, rows, cols), patches_B = visible.shape, visible.flatten(1).sum(1)
    near = neighbours(visible)
    stages = []
    for key, side in zip(keys, SIDES, strict=True):
        shape = (batch, rows * side, cols * side)
        stages.append(MinkowskiSites(manager, key, shape, side, patches_B, near))
    for finer, coarser in pairwise(stages):
        finer.following = coarser
    return stages


def _coordinate_maps(visible_BHW: Tensor) -> tuple[Any, list[Any]]:
    """Return a coordinate manager and the keys of all stages' maps; build the kernel maps."""
    lattice = visible_BHW.repeat_interleave(SIDES[0], 1).repeat_interleave(SIDES[0], 2)
    engine = load_minkowski()
    manager = engine.CoordinateManager(
        D=2, num_threads=1, coordinate_map_type=engine.CoordinateMapType.CPU
    )
    keys = [manager.insert_and_map(lattice.nonzero().int().contiguous(), 1)[0]]
    for _ in SIDES[1:]:
        keys.append(manager.stride(keys[-1], 2))
        manager.kernel_map(keys[-2], keys[-1], stride=2, kernel_size=2)  # kept for the convolution
    return manager, keys
