"""The sparse ConvNeXt V2 encoder (arXiv 2301.00808, section 3): one network, three engines."""

import os
import shutil
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from sparse.block import SparseBlock, weight_and_bias
from sparse.engines import Engine, get_engine
from sparse.engines.base import Layout, Sites, hide
from sparse.errors import InputError
from sparse.ops.grn_mlp import LAYER_NORM_EPS
from sparse.sizes import PATCH, SIDES, resolve_size


class SparseStage(nn.Module):
    """Downsampling from `dim_in` channels (None in the first stage), then blocks of width `dim`."""

    def __init__(self, dim_in: int | None, dim: int, blocks: Sequence[SparseBlock]) -> None:
        super().__init__()
        self.downsample: nn.Sequential | None = None
        if dim_in is not None:
            self.downsample = nn.Sequential(
                nn.LayerNorm(dim_in, eps=LAYER_NORM_EPS), nn.Conv2d(dim_in, dim, 2, stride=2)
            )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_NC: Tensor, finer: Sites | None, here: Sites) -> Tensor:
        """Rows of the previous stage (`finer`; None in the first stage) → rows of this one."""
        if self.downsample is not None and finer is not None:
            norm, conv = self.downsample
            x_NC = hide(here, finer.downsample(norm(x_NC), *weight_and_bias(conv)))
        for block in self.blocks:
            x_NC = block(x_NC, here)
        return x_NC


class SparseConvNeXtV2(nn.Module):
    """ConvNeXt V2 that computes only where images are visible.

    Parameters have timm's names and dense layouts whichever engine runs, so all engines share
    state dicts and optimizer states.

    Args:
        depths: blocks of each of the four stages.
        dims: channels of each stage.
        in_chans: channels of the images.
        engine: `auto`, `minkowski`, `patch` or `dense`; see `sparse.engines.get_engine`. `forward`
            resolves `auto` from the device of the images.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0 at the first.
        use_grn: global response normalisation (V2); False for V1 blocks.
        layer_scale: initial LayerScale (V1); None for none.
        recompute: recompute each MLP's hidden layer in the backward pass instead of keeping it:
            the same numbers with less memory and slightly more time. V2 blocks only.
        patch_size: side P of a masking patch in pixels, which is the total stride: 8, 16 or 32. The
            stem's stride is P / 8.

    Raises:
        InputError: the engine is unknown or not installed.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        in_chans: int = 3,
        engine: str = "auto",
        drop_path: float = 0.0,
        use_grn: bool = True,
        layer_scale: float | None = None,
        recompute: bool = False,
        patch_size: int = PATCH,
    ) -> None:
        super().__init__()
        if engine != "auto":
            get_engine(engine, device=None, dtype=None)
        self.engine, self._compiled, self.in_chans = engine, False, in_chans
        self.patch_size, stride = patch_size, patch_size // SIDES[0]
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], stride, stride=stride),
            nn.LayerNorm(dims[0], eps=LAYER_NORM_EPS),
        )
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for depth, dim_in, dim in zip(depths, [None, *dims[:-1]], dims, strict=True):
            stage_rates = [next(rates) for _ in range(depth)]
            blocks = [SparseBlock(dim, r, use_grn, layer_scale, recompute) for r in stage_rates]
            self.stages.append(SparseStage(dim_in, dim, blocks))
        self.apply(init_weights)

    @classmethod
    def from_size(
        cls,
        model: str,
        depths: list[int] | None = None,
        dims: list[int] | None = None,
        **options: object,
    ) -> "SparseConvNeXtV2":
        """Build a published size by name (`atto` … `huge`); `options` as for the class.

        Raises:
            InputError: unknown size.
        """
        size = resolve_size(model, depths, dims)
        return cls(size.depths, size.dims, **options)  # type: ignore[arg-type]

    def forward(
        self, images_BCHW: Tensor, mask_BHW: Tensor, layout: Layout | None = None
    ) -> Tensor:
        """Encode the visible patches.

        Args:
            images_BCHW: height and width multiples of P, not necessarily equal.
            mask_BHW: (B, H/P, W/P) bool, True = hidden. Only the mask decides what is visible. A
                mask on the CPU avoids a synchronisation with the GPU.
            layout: of the mask, made ahead by the engine's `lay_out`; None makes it here.

        Returns:
            (B, dims[-1], H/P, W/P), zeros where hidden.

        Raises:
            InputError: the shapes do not match, or the engine cannot run on this device.
        """
        self._check(images_BCHW, mask_BHW)
        device = images_BCHW.device
        visible = mask_BHW.cpu() if layout is None else layout
        return self.encode(images_BCHW, self.engine_on(device).sites(visible, device))

    def engine_on(self, device: torch.device) -> Engine:
        """Return the engine that computes on a device.

        Raises:
            InputError: the named engine cannot run there.
        """
        dtype = next(self.parameters()).dtype
        return get_engine(self.engine, device.type, dtype, self._compiled)

    def compile_encode(self) -> None:
        """Compile all but the index tables with `torch.compile`, as one graph without breaks.

        Raises:
            InputError: there is no C++ compiler, or the named engine cannot be compiled.
        """
        check_compiler()
        self._compiled = True
        self.engine_on(next(self.parameters()).device)
        self.encode = torch.compile(self.encode, fullgraph=True)  # type: ignore[method-assign]

    def encode(self, images_BCHW: Tensor, sites: Sequence[Sites]) -> Tensor:
        """Encode images (B, C, H, W) at the sites of each stage → (B, dims[-1], H/P, W/P)."""
        conv, norm = self.stem
        x_NC = hide(sites[0], norm(sites[0].stem(images_BCHW, *weight_and_bias(conv))))
        for stage, finer, here in zip(self.stages, [None, *sites], sites, strict=False):
            x_NC = stage(x_NC, finer, here)
        return sites[-1].densify(x_NC)

    def _check(self, images: Tensor, mask: Tensor) -> None:
        (b, c, h, w), p = images.shape, self.patch_size
        if c != self.in_chans:
            raise InputError(f"images have {c} channels, not {self.in_chans}: pass in_chans={c}")
        if h % p or w % p:
            near = "×".join(str(max(side // p, 1) * p) for side in (h, w))
            raise InputError(f"image size {h}×{w} is not a multiple of {p}: use {near}")
        grid = (b, h // p, w // p)
        if mask.dtype != torch.bool or mask.shape != grid:
            needed = f"torch.bool {grid} for images of {tuple(images.shape)}, True = hidden"
            raise InputError(f"mask is {mask.dtype} {tuple(mask.shape)}; it must be {needed}")


def init_weights(module: nn.Module) -> None:
    """Truncated normal with std 0.02 for weights, zero for biases (section 3; ConvNeXt's own)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def check_compiler() -> None:
    """Raise InputError if `torch.compile` would find no C++ compiler."""
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if not any(map(shutil.which, compilers)):
        raise InputError(f"compile needs a C++ compiler: install one of {compilers} or turn it off")


def init_fan_in(model: nn.Module, spare: Collection[nn.Module] = ()) -> None:
    """Draw the weights of all convolutions and linear layers but `spare` from N(0, 1/fan_in).

    With the paper's standard deviation of 0.02, every residual branch starts at a fiftieth of its
    input: the network starts nearly linear, and a few hundred steps hardly change that.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in spare:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
