"""How checkpoints store a ConvNeXt V2: the names, and the shape of every tensor, of each layout.

Ours is the reference: timm's names, dense layouts, no final norm. A `Layout` says how another one
spells a name of ours and how it packs the tensor; `layout_table` lists both sides for a whole
architecture, so that any checkpoint can be checked key by key and converted either way.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse.errors import InputError
from sparse.sizes import PATCH

State = Mapping[str, Tensor]
ENCODER = "encoder."


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's tensors say about the encoder that they belong to.

    `depths` and `dims` are the blocks and channels of the four stages; `layer_scale` is True where
    blocks carry ConvNeXt V1's per-channel scale.
    """

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    in_chans: int = 3
    use_grn: bool = True
    layer_scale: bool = False


@dataclass(frozen=True)
class Layout:
    """One way to store a ConvNeXt V2.

    `name(ours)` and `pack(ours, tensor)` give its name and its tensor for ours; `unpack(tensor,
    shape)` gives back our tensor, of that shape. `title` is for messages.
    """

    title: str
    name: Callable[[str], str]
    pack: Callable[[str, Tensor], Tensor]
    unpack: Callable[[Tensor, torch.Size], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor on both sides; `prefix`, part of `theirs`, is `encoder.` or nothing, as found."""

    prefix: str
    ours: str
    shape: torch.Size
    theirs: str
    their_shape: torch.Size


_OFFICIAL_NAMES = (
    (re.compile(r"^stem\."), "downsample_layers.0."),
    (re.compile(r"^stages\.(\d+)\.downsample\."), r"downsample_layers.\1."),
    (re.compile(r"^decoder\.(proj|pred|mask_token)"), r"\1"),
    (re.compile(r"\.blocks\."), "."),
    (re.compile(r"\.conv_dw\."), ".dwconv."),
    (re.compile(r"\.mlp\.fc"), ".pwconv"),
    (re.compile(r"\.mlp\.grn\.weight$"), ".grn.gamma"),
    (re.compile(r"\.mlp\.grn\.bias$"), ".grn.beta"),
)
_MINKOWSKI_NAMES = (
    (re.compile(r"\.(conv_dw|downsample\.1)\.weight$"), r".\1.kernel"),
    (re.compile(r"\.(norm|downsample\.0)\.(weight|bias)$"), r".\1.ln.\2"),
    (re.compile(r"\.(fc[12])\.(weight|bias)$"), r".\1.linear.\2"),
)
_ENCODER_BLOCK = re.compile(r"stages\.([0-3])\.(?:blocks\.)?(\d+)\.(.+)")
_DECODER_BLOCK = re.compile(r"decoder\.(?:blocks\.)?(\d+)\.(.+)")


def _own_name(name: str) -> str:
    return name


def _own_tensor(_name: str, tensor: Tensor) -> Tensor:
    return tensor


def _official_name(name: str) -> str:
    for pattern, theirs in _OFFICIAL_NAMES:
        name = pattern.sub(theirs, name)
    return name


def _minkowski_name(name: str) -> str:
    if name.startswith("stages."):  # the stem and the decoder are dense there too
        for pattern, theirs in _MINKOWSKI_NAMES:
            name = pattern.sub(theirs, name)
    return _official_name(name)


def _pack_official(name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(1, 1, 1, -1) if ".mlp.grn." in name else tensor


def _pack_minkowski(name: str, tensor: Tensor) -> Tensor:
    if not name.startswith("stages."):
        return _pack_official(name, tensor)
    if name.endswith((".conv_dw.weight", ".downsample.1.weight")):
        # MinkowskiEngine counts kernel positions with the first coordinate, the row, fastest.
        kernel_KIO = tensor.transpose(2, 3).flatten(2).permute(2, 1, 0)
        return kernel_KIO.squeeze(1) if name.endswith(".conv_dw.weight") else kernel_KIO
    if name.endswith((".conv_dw.bias", ".downsample.1.bias")) or ".mlp.grn." in name:
        return tensor.reshape(1, -1)
    return tensor


def _unpack_minkowski(tensor: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != 4 or tensor.ndim == 4:  # no kernel, or a dense one (stem, decoder)
        return tensor.reshape(shape)
    out, width, rows, columns = shape
    kernel_OIK = tensor.reshape(rows * columns, width, out).permute(2, 1, 0)
    return kernel_OIK.reshape(out, width, columns, rows).transpose(2, 3)


def _reshape(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.reshape(shape)


OURS = Layout("timm", _own_name, _own_tensor, _reshape)
OFFICIAL = Layout("official dense", _official_name, _pack_official, _reshape)
MINKOWSKI = Layout("Minkowski", _minkowski_name, _pack_minkowski, _unpack_minkowski)


def encoder_prefix(names: Iterable[str]) -> str:
    """Return `encoder.` where some key starts so, else the empty string."""
    return ENCODER if any(name.startswith(ENCODER) for name in names) else ""


def detect_layout(state: State) -> Layout:
    """Say which of the layouts a state dict is in, by the names that only one of them uses.

    Raises:
        InputError: it holds no ConvNeXt V2 in any layout that we know.
    """
    names = [name.removeprefix(ENCODER) for name in state]
    if any(name.endswith((".kernel", ".linear.weight", ".ln.weight")) for name in names):
        return MINKOWSKI
    if any(name.startswith("downsample_layers.") for name in names):
        return OFFICIAL
    if any(name.startswith(("stem.", "stages.")) for name in names):
        return OURS
    raise InputError(
        "not a ConvNeXt V2 state dict: expected names such as stem.0.weight (timm and this "
        "project), downsample_layers.0.0.weight (official) or stages.0.0.dwconv.kernel "
        f"(Minkowski), found {brief(state) or 'nothing'}"
    )


def brief(names: Iterable[str], most: int = 4) -> str:
    """Join a few names for a one-line message, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_architecture(state: State, layout: Layout, prefix: str) -> Architecture:
    """Read depths, dims, input channels, GRN and layer scale off the tensors of one layout.

    Raises:
        InputError: a stage has no block, or the stem is missing.
    """

    def tensor(ours: str) -> Tensor:
        theirs = prefix + layout.name(ours)
        if theirs not in state:
            raise InputError(
                f"incomplete state dict in {layout.title} layout: expected {theirs}, "
                f"found {len(state)} others: {brief(state)}"
            )
        return state[theirs]

    blocks: list[set[str]] = [set(), set(), set(), set()]
    parts = set()
    for name in state:
        if match := _ENCODER_BLOCK.match(name.removeprefix(prefix)):
            blocks[int(match[1])].add(match[2])
            parts.add(match[3])
    dims = [tensor(f"stages.{stage}.blocks.0.conv_dw.bias").numel() for stage in range(4)]
    stem = tensor("stem.0.weight")
    return Architecture(
        depths=(len(blocks[0]), len(blocks[1]), len(blocks[2]), len(blocks[3])),
        dims=(dims[0], dims[1], dims[2], dims[3]),
        in_chans=stem.shape[1] if stem.ndim == 4 else 3,
        use_grn=any("grn." in part for part in parts),
        layer_scale="gamma" in parts,
    )


def _block_shapes(at: str, width: int, grn: bool, scale: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "conv_dw.weight": (width, 1, 7, 7),
        "conv_dw.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
    }
    if grn:
        shapes |= {"mlp.grn.weight": (4 * width,), "mlp.grn.bias": (4 * width,)}
    shapes |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    if scale:
        shapes["gamma"] = (width,)
    return {f"{at}.{name}": shape for name, shape in shapes.items()}


def encoder_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """List our name and shape of every parameter of the encoder, in the order of the network."""
    dims, first = architecture.dims, architecture.dims[0]
    shapes: dict[str, tuple[int, ...]] = {
        "stem.0.weight": (first, architecture.in_chans, 4, 4),
        "stem.0.bias": (first,),
        "stem.1.weight": (first,),
        "stem.1.bias": (first,),
    }
    for stage, (depth, width) in enumerate(zip(architecture.depths, dims, strict=True)):
        if stage:
            before, at = dims[stage - 1], f"stages.{stage}.downsample"
            shapes |= {f"{at}.0.weight": (before,), f"{at}.0.bias": (before,)}
            shapes |= {f"{at}.1.weight": (width, before, 2, 2), f"{at}.1.bias": (width,)}
        for block in range(depth):
            at = f"stages.{stage}.blocks.{block}"
            shapes |= _block_shapes(at, width, architecture.use_grn, architecture.layer_scale)
    return shapes


def _decoder_shapes(
    state: State, layout: Layout, architecture: Architecture
) -> dict[str, tuple[int, ...]]:
    """List the decoder's names and shapes, or none where the state dict holds no decoder.

    Raises:
        InputError: it holds parts of a decoder, but no projection to tell its width.
    """
    tops = {layout.name(f"decoder.{part}").split(".")[0] for part in ("proj", "pred", "mask_token")}
    names = [name for name in state if name.split(".")[0] in tops | {"decoder"}]
    if not names:
        return {}
    proj_bias = layout.name("decoder.proj.bias")
    if proj_bias not in state:
        raise InputError(f"incomplete decoder: expected {proj_bias}, found {brief(names)}")
    width, pixels = state[proj_bias].numel(), architecture.in_chans * PATCH**2
    found = [match for name in names if (match := _DECODER_BLOCK.match(name))]
    grn = any("grn." in match[2] for match in found)
    scale = any(match[2] == "gamma" for match in found)
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.proj.weight": (width, architecture.dims[3], 1, 1),
        "decoder.proj.bias": (width,),
        "decoder.mask_token": (1, width, 1, 1),
    }
    for index in range(len({match[1] for match in found})):
        shapes |= _block_shapes(f"decoder.blocks.{index}", width, grn, scale)
    shapes |= {"decoder.pred.weight": (pixels, width, 1, 1), "decoder.pred.bias": (pixels,)}
    return shapes


def layout_table(state: State, layout: Layout, prefix: str) -> tuple[Architecture, list[Entry]]:
    """Return the architecture of a state dict in `layout`, and every tensor that it must hold.

    A decoder is listed where the state dict holds any part of one.
    """
    architecture = read_architecture(state, layout, prefix)
    encoder = encoder_shapes(architecture)
    shapes = encoder | _decoder_shapes(state, layout, architecture)
    entries = []
    for ours, shape in shapes.items():
        packed = layout.pack(ours, torch.empty(shape, device="meta"))
        at = prefix if ours in encoder else ""
        entries.append(Entry(at, ours, torch.Size(shape), at + layout.name(ours), packed.shape))
    return architecture, entries
