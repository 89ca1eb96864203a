"""Checkpoint conversion, state dict to state dict: ours, timm's, the official dense and Minkowski.

Every function is pure and strict. The tensors themselves determine the architecture; a missing
name, an unexpected name or a wrong shape raises an `InputError` that prints both sides.
Nothing is dropped silently: each function documents what it does with the decoder, and of a
classifier only `HEAD_NAMES` are dropped.
"""

import re

import torch
from torch import Tensor

from sparse.layouts import ENCODER, MINKOWSKI, OURS, Layout, State, check_layout, detect_layout

CONV_MLP_WIDTHS = frozenset({40, 48, 64, 80})
"""Stem widths (atto, femto, pico, nano) whose timm variants store mlp.fc1 and mlp.fc2 as 1x1
convolutions, with 4-D weights."""

HEAD_NAMES = re.compile(r"(head\.norm|head\.fc|norm|head)\.(weight|bias)")
"""Final norm and classifier in timm's and the official names. They are not part of the encoder:
`canonical` and `to_timm` drop them."""


def from_minkowski(state: State) -> dict[str, Tensor]:
    """Convert a checkpoint of the official pretraining script to our names and dense layouts.

    Kernels (K², C_in, C_out) and (K², C) become dense weights (C_out, C_in, K, K) and (C, 1, K, K).
    A prefix `encoder.` is kept; a decoder is converted too.

    Raises:
        InputError: another layout, or names and shapes that do not form a complete model.
    """
    return _to_ours(state, MINKOWSKI)


def to_minkowski(state: State) -> dict[str, Tensor]:
    """Convert a state dict in our names to the layout of the official pretraining script.

    The exact inverse of `from_minkowski`: a prefix `encoder.` is kept; a decoder is converted too.

    Raises:
        InputError: another layout, or names and shapes that do not form a complete model.
    """
    return {
        MINKOWSKI.name(name): MINKOWSKI.pack(name, state[name]).contiguous()
        for name in check_layout(state, OURS)
    }


def canonical(state: State) -> dict[str, Tensor]:
    """Convert a state dict in any known layout to our names.

    The encoder's names have no prefix; a decoder's start with `decoder.`. Reads our own and timm's
    layout (4-D `mlp.fc1` and `mlp.fc2` become 2-D), the official dense and the Minkowski layout. A
    final norm and classifier (`HEAD_NAMES`) are dropped.

    Raises:
        InputError: no known layout, or names and shapes that do not form a complete model.
    """
    kept = {
        name: tensor[..., 0, 0] if _is_mlp(name) and tensor.shape[2:] == (1, 1) else tensor
        for name, tensor in state.items()
        if not HEAD_NAMES.fullmatch(name)
    }
    converted = _to_ours(kept, detect_layout(kept))
    return {name.removeprefix(ENCODER): tensor for name, tensor in converted.items()}


def encoder_part(state: State) -> dict[str, Tensor]:
    """Return the encoder's part of what `canonical` returns."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")}


def to_timm(state: State) -> dict[str, Tensor]:
    """Convert a state dict in any known layout to that of timm's dense model without classifier.

    The decoder is dropped. An identity `head.norm` (weight 1, bias 0) is added, since timm's models
    have one and load strictly. `mlp.fc1` and `mlp.fc2` are 4-D where timm's variant of this stem
    width stores them so (`CONV_MLP_WIDTHS`).

    Raises:
        InputError: no known layout, or names and shapes that do not form a complete model.
    """
    encoder = encoder_part(canonical(state))
    if encoder["stem.0.bias"].numel() in CONV_MLP_WIDTHS:
        for name in filter(_is_mlp, encoder):
            encoder[name] = encoder[name][..., None, None]
    width = encoder["stages.3.blocks.0.conv_dw.bias"]
    norm = {"head.norm.weight": torch.ones_like(width), "head.norm.bias": torch.zeros_like(width)}
    return encoder | norm


def _to_ours(state: State, layout: Layout) -> dict[str, Tensor]:
    return {
        ours: layout.unpack(state[theirs], shape).contiguous()
        for theirs, (ours, shape) in check_layout(state, layout).items()
    }


def _is_mlp(name: str) -> bool:
    return name.endswith((".mlp.fc1.weight", ".mlp.fc2.weight"))
