"""Checkpoint conversion, state dict to state dict: ours, timm's, the official dense and Minkowski.

Every function is pure and strict. The tensors themselves say which architecture they belong to;
a name that is missing, a name too many or a shape that differs raises an `InputError` that prints
both sides. Nothing is ever dropped silently: the decoder goes where a function says so, and of a
classifier only `HEAD_NAMES`.
"""

import torch
from torch import Tensor

from sparse.errors import InputError
from sparse.layouts import (
    ENCODER,
    MINKOWSKI,
    OFFICIAL,
    OURS,
    Architecture,
    Entry,
    Layout,
    State,
    brief,
    detect_layout,
    encoder_prefix,
    layout_table,
)

__all__ = [
    "CONV_MLP_WIDTHS",
    "HEAD_NAMES",
    "Architecture",
    "canonical",
    "encoder_part",
    "from_minkowski",
    "from_official_dense",
    "infer_architecture",
    "to_minkowski",
    "to_timm",
]

CONV_MLP_WIDTHS = frozenset({40, 48, 64, 80})
"""Stem widths (atto, femto, pico, nano) whose timm variants store mlp.fc1 and mlp.fc2 as 1x1
convolutions, with 4-D weights."""

HEAD_NAMES = frozenset(
    f"{head}.{kind}"
    for head in ("head.norm", "head.fc", "norm", "head")
    for kind in ("weight", "bias")
)
"""Final norm and classifier in timm's and the official names. They are no part of the encoder:
`canonical` and what builds on it leave them out."""


def from_minkowski(state: State) -> dict[str, Tensor]:
    """Convert a checkpoint of the official pretraining script to our names and dense layouts.

    Kernels (K², C_in, C_out) and (K², C) become dense weights (C_out, C_in, K, K) and (C, 1, K, K).
    Encoder names keep their prefix `encoder.` or its absence; a decoder is converted too.

    Raises:
        InputError: another layout, or names and shapes that do not make one whole model.
    """
    return _unpack(state, MINKOWSKI)


def to_minkowski(state: State) -> dict[str, Tensor]:
    """Convert a state dict in our names to the layout of the official pretraining script.

    The exact inverse of `from_minkowski`: prefix and decoder are kept as they are found.

    Raises:
        InputError: another layout, or names and shapes that do not make one whole model.
    """
    entries = _check(state, OURS)
    converted = {}
    for name, entry in entries.items():
        packed = MINKOWSKI.pack(entry.ours, state[name])
        converted[entry.prefix + MINKOWSKI.name(entry.ours)] = packed.contiguous()
    return converted


def from_official_dense(state: State) -> dict[str, Tensor]:
    """Convert an official dense release to our names; a final norm and classifier are left out.

    Raises:
        InputError: another layout, or names and shapes that do not make one whole model.
    """
    return _unpack(_without_head(state), OFFICIAL)


def canonical(state: State) -> dict[str, Tensor]:
    """Bring a state dict in any known layout to our names: the encoder's without prefix, and
    `decoder.*` where there is a decoder.

    Reads our own and timm's (4-D `mlp.fc1` and `mlp.fc2` become 2-D), the official dense and the
    Minkowski layout. A final norm and classifier (`HEAD_NAMES`) are left out.

    Raises:
        InputError: no known layout, or names and shapes that do not make one whole model.
    """
    layout = detect_layout(state)
    if layout is MINKOWSKI:
        converted = from_minkowski(state)
    elif layout is OFFICIAL:
        converted = from_official_dense(state)
    else:
        flat = {name: _flat_mlp(name, tensor) for name, tensor in _without_head(state).items()}
        converted = _unpack(flat, OURS)
    return {name.removeprefix(ENCODER): tensor for name, tensor in converted.items()}


def encoder_part(state: State) -> dict[str, Tensor]:
    """Return the encoder alone of what `canonical` gives."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")}


def to_timm(state: State) -> dict[str, Tensor]:
    """Convert a state dict in any known layout to that of timm's dense model without classifier.

    The decoder is left out, an identity `head.norm` (weight 1, bias 0) is added, since timm's
    models have one and load strictly, and `mlp.fc1` and `mlp.fc2` are 4-D where timm's variant of
    this stem width has them so (`CONV_MLP_WIDTHS`).

    Raises:
        InputError: no known layout, or names and shapes that do not make one whole model.
    """
    encoder = encoder_part(canonical(state))
    if encoder["stem.0.bias"].numel() in CONV_MLP_WIDTHS:
        encoder = {
            name: tensor[..., None, None] if _is_mlp_weight(name) else tensor
            for name, tensor in encoder.items()
        }
    width = encoder["stages.3.blocks.0.conv_dw.bias"]
    return encoder | {
        "head.norm.weight": torch.ones_like(width),
        "head.norm.bias": torch.zeros_like(width),
    }


def infer_architecture(state: State) -> Architecture:
    """Read depths, dims, input channels, GRN and layer scale off a state dict in any known layout.

    Raises:
        InputError: no known layout, or parts that tell the size are missing.
    """
    layout = detect_layout(state)
    return layout_table(state, layout, encoder_prefix(state))[0]


def _unpack(state: State, layout: Layout) -> dict[str, Tensor]:
    entries = _check(state, layout)
    return {
        entry.prefix + entry.ours: layout.unpack(state[name], entry.shape).contiguous()
        for name, entry in entries.items()
    }


def _check(state: State, layout: Layout) -> dict[str, Entry]:
    """Return the entry of every name in `state`, in its order, or raise with both sides."""
    found = detect_layout(state)
    if found is not layout:
        raise InputError(
            f"this state dict is in {found.title} layout ({brief(state, 2)}), expected "
            f"{layout.title} layout: use canonical(state), which reads every layout"
        )
    architecture, table = layout_table(state, layout, encoder_prefix(state))
    entries = {entry.theirs: entry for entry in table}
    missing = [name for name in entries if name not in state]
    unexpected = [name for name in state if name not in entries]
    differ = [
        f"{name} is {tuple(state[name].shape)} and not {tuple(entry.their_shape)}"
        for name, entry in entries.items()
        if name in state and state[name].shape != entry.their_shape
    ]
    if missing or unexpected or differ:
        sides = (("missing", missing), ("unexpected", unexpected), ("of another shape", differ))
        raise InputError(
            f"state dict in {layout.title} layout does not match a ConvNeXt V2 with depths "
            f"{list(architecture.depths)} and dims {list(architecture.dims)}: "
            + "; ".join(f"{len(names)} {what} ({brief(names)})" for what, names in sides if names)
        )
    return {name: entries[name] for name in state}


def _without_head(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in HEAD_NAMES}


def _is_mlp_weight(name: str) -> bool:
    return name.endswith((".mlp.fc1.weight", ".mlp.fc2.weight"))


def _flat_mlp(name: str, tensor: Tensor) -> Tensor:
    is_conv = _is_mlp_weight(name) and tensor.shape[2:] == (1, 1)
    return tensor[..., 0, 0] if is_conv else tensor
