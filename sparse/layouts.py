"""How checkpoints store a ConvNeXt V2: the name and shape of every tensor in each layout.

Our layout is the reference: timm's names, dense kernels, no final norm. A `Layout` maps our names
and tensors to another layout. `check_layout` compares a checkpoint with the tensors that it must
hold; their shapes come from a model on the meta device.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse.block import SparseBlock
from sparse.encoder import SparseConvNeXtV2
from sparse.errors import InputError, brief
from sparse.sizes import PATCH, SIDES

State = Mapping[str, Tensor]
ENCODER = "encoder."


@dataclass(frozen=True)
class Architecture:
    """The encoder that a checkpoint's tensors belong to.

    Attributes:
        depths: blocks of each of the four stages.
        dims: channels of each stage.
        in_chans: channels of the images.
        use_grn: blocks have global response normalisation (V2).
        layer_scale: initial value of a learned per-channel scale of the blocks (V1), which weights
            replace; None for none.
        patch_size: the total stride in pixels, eight times the stem's.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int = 3
    use_grn: bool = True
    layer_scale: float | None = None
    patch_size: int = PATCH


@dataclass(frozen=True)
class Layout:
    """One way to store a ConvNeXt V2.

    Attributes:
        title: for messages.
        renames: regular expressions and replacements that turn our name into this layout's.
        pack: (our name, our tensor) → this layout's tensor.
        unpack: (this layout's tensor, our shape) → our tensor.
    """

    title: str
    renames: tuple[tuple[str, str], ...]
    pack: Callable[[str, Tensor], Tensor]
    unpack: Callable[[Tensor, torch.Size], Tensor]

    def name(self, ours: str) -> str:
        """Return this layout's name for one of ours, with or without the prefix `encoder.`."""
        for pattern, replacement in self.renames:
            ours = re.sub(pattern, replacement, ours)
        return ours


def _pack_official(name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(1, 1, 1, -1) if ".mlp.grn." in name else tensor


def _pack_minkowski(name: str, tensor: Tensor) -> Tensor:
    if "stages." not in name:  # the stem and the decoder are dense
        return _pack_official(name, tensor)
    if name.endswith((".conv_dw.weight", ".downsample.1.weight")):
        # MinkowskiEngine counts kernel positions with the first coordinate, the row, fastest.
        kernel_KIO = tensor.transpose(2, 3).flatten(2).permute(2, 1, 0)
        return kernel_KIO.squeeze(1) if name.endswith(".conv_dw.weight") else kernel_KIO
    if name.endswith((".conv_dw.bias", ".downsample.1.bias")) or ".mlp.grn." in name:
        return tensor.reshape(1, -1)
    return tensor


def _unpack_minkowski(tensor: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != 4 or tensor.ndim == 4:  # not a kernel, or a dense one (stem, decoder)
        return tensor.reshape(shape)
    out, width, rows, columns = shape
    kernel_OIK = tensor.reshape(rows * columns, width, out).permute(2, 1, 0)
    return kernel_OIK.reshape(out, width, columns, rows).transpose(2, 3)


_OFFICIAL_NAMES = (
    (r"\bstem\.", "downsample_layers.0."),
    (r"\bstages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^decoder\.(proj|pred|mask_token)", r"\1"),
    (r"\.blocks\.", "."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
)
_MINKOWSKI_NAMES = (
    (r"(\bstages\..+\.(conv_dw|downsample\.1))\.weight$", r"\1.kernel"),
    (r"(\bstages\..+\.(norm|downsample\.0))\.", r"\1.ln."),
    (r"(\bstages\..+\.fc[12])\.", r"\1.linear."),
    *_OFFICIAL_NAMES,
)

OURS = Layout("timm", (), lambda _name, tensor: tensor, Tensor.reshape)
OFFICIAL = Layout("official dense", _OFFICIAL_NAMES, _pack_official, Tensor.reshape)
MINKOWSKI = Layout("Minkowski", _MINKOWSKI_NAMES, _pack_minkowski, _unpack_minkowski)
_MARKS = (
    (r"\.(kernel|linear\.weight|ln\.weight)$", MINKOWSKI),
    (r"^(encoder\.)?downsample_layers\.", OFFICIAL),
    (r"^(encoder\.)?(stem|stages)\.", OURS),
)


def detect_layout(state: State) -> Layout:
    """Detect the layout of a state dict by the names that only one layout uses.

    Raises:
        InputError: the state dict is not a ConvNeXt V2 in a known layout.
    """
    for pattern, layout in _MARKS:
        if _has(state, pattern):
            return layout
    names = "stem.0.weight, downsample_layers.0.0.weight or stages.0.0.dwconv.kernel"
    raise InputError(f"not a ConvNeXt V2: expected {names}, found {brief(state) or 'nothing'}")


def infer_architecture(state: State) -> Architecture:
    """Infer the encoder's architecture from a state dict in any known layout.

    Raises:
        InputError: no known layout, or the stem or a stage's first block is missing or empty.
    """
    prefix = _encoder_prefix(state)
    stages = [f"{prefix}stages.{index}" for index in range(4)]
    biases = [_tensor(state, f"{stage}.blocks.0.conv_dw.bias") for stage in stages]
    stem = _tensor(state, f"{prefix}stem.0.weight")
    return Architecture(
        depths=tuple(_count_blocks(state, stage) for stage in stages),
        dims=tuple(bias.numel() for bias in biases),
        in_chans=stem.shape[1] if stem.ndim == 4 else 3,
        use_grn=_has(state, r"stages\..+\.grn\."),
        layer_scale=1e-6 if _has(state, r"stages\..+\d\.gamma$") else None,
        patch_size=SIDES[0] * stem.shape[-1] if stem.shape[2:] in ((1, 1), (2, 2)) else PATCH,
    )


def encoder_shapes(architecture: Architecture) -> dict[str, torch.Size]:
    """Return our name and the shape of every parameter of the encoder."""
    with torch.device("meta"):
        encoder = SparseConvNeXtV2(**vars(architecture))
    return {name: tensor.shape for name, tensor in encoder.state_dict().items()}


def check_layout(state: State, layout: Layout) -> dict[str, tuple[str, torch.Size]]:
    """Check a state dict, and return our name and shape for each of its names, in its order.

    Raises:
        InputError: another layout, or any name or shape that does not match.
    """
    detected = detect_layout(state)
    if detected is not layout:
        rule = f"expected {layout.title} layout: canonical(state) reads every layout"
        raise InputError(f"state dict in {detected.title} layout ({brief(state)}), {rule}")
    ours = {layout.name(name): (name, shape) for name, shape in _expected_shapes(state).items()}
    differ = []
    for theirs, (name, shape) in ours.items():
        expected = layout.pack(name, torch.empty(shape, device="meta")).shape
        if theirs in state and state[theirs].shape != expected:
            differ.append(f"{theirs} is {tuple(state[theirs].shape)}, not {tuple(expected)}")
    problems = {
        "missing": [name for name in ours if name not in state],
        "unexpected": [name for name in state if name not in ours],
        "of the wrong shape": differ,
    }
    if found := [f"{len(x)} {what} ({brief(x)})" for what, x in problems.items() if x]:
        kind = infer_architecture(state)
        size = f"a ConvNeXt V2 of depths {list(kind.depths)} and dims {list(kind.dims)}"
        raise InputError(f"{layout.title} state dict does not match {size}: {'; '.join(found)}")
    return {theirs: ours[theirs] for theirs in state}


def _expected_shapes(state: State) -> dict[str, torch.Size]:
    """Return our name and shape of every tensor that a state dict in any known layout must hold.

    The encoder's names have the prefix `encoder.` if the state dict has it. A decoder is expected
    if the state dict holds any part of one.

    Raises:
        InputError: as `infer_architecture`, or the bias of the decoder's projection is missing.
    """
    architecture, prefix = infer_architecture(state), _encoder_prefix(state)
    shapes = {prefix + name: shape for name, shape in encoder_shapes(architecture).items()}
    if not _has(state, r"^(decoder|proj|pred|mask_token)\b"):
        return shapes
    width, depth = _tensor(state, "decoder.proj.bias").numel(), _count_blocks(state, "decoder")
    with torch.device("meta"):
        decoder = nn.Module()
        decoder.mask_token = nn.Parameter(torch.empty(1, width, 1, 1))
        decoder.proj = nn.Conv2d(architecture.dims[-1], width, 1)
        decoder.blocks = nn.ModuleList(SparseBlock(width, 0.0, True, None) for _ in range(depth))
        decoder.pred = nn.Conv2d(width, architecture.in_chans * architecture.patch_size**2, 1)
    return shapes | {f"decoder.{name}": part.shape for name, part in decoder.state_dict().items()}


def _has(state: State, pattern: str) -> bool:
    return any(re.search(pattern, name) for name in state)


def _encoder_prefix(state: State) -> str:
    return ENCODER if any(name.startswith(ENCODER) for name in state) else ""


def _count_blocks(state: State, stack: str) -> int:
    pattern = re.escape(stack) + r"\.(?:blocks\.)?(\d+)\."
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _tensor(state: State, ours: str) -> Tensor:
    """Return a tensor that the architecture depends on, by our name for it."""
    layout = detect_layout(state)
    name = layout.name(ours)
    if name not in state:
        found = f"found {len(state)} others: {brief(state)}"
        raise InputError(f"incomplete {layout.title} state dict: expected {name}, {found}")
    if not state[name].numel():
        raise InputError(f"{name} has shape {tuple(state[name].shape)}: it must not be empty")
    return state[name]
