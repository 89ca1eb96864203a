"""A ConvNeXt V2 of timm as a folder for Hugging Face transformers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae import __version__
from fcmae.data.statistics import Preprocessing
from fcmae.weights.graphs import Exportable, difference
from sparse.errors import InputError
from sparse.layouts import Architecture
from sparse.ops.grn_mlp import LAYER_NORM_EPS

NAMES = {
    r"stem\.0": "embeddings.patch_embeddings",
    r"stem\.1": "embeddings.layernorm",
    r"(stages\.\d)\.downsample(\.\d)": r"encoder.\1.downsampling_layer\2",
    r"(stages\.\d)\.blocks(\.\d+)\.conv_dw": r"encoder.\1.layers\2.dwconv",
    r"(stages\.\d)\.blocks(\.\d+)\.norm": r"encoder.\1.layers\2.layernorm",
    r"(stages\.\d)\.blocks(\.\d+)\.mlp\.fc(\d)": r"encoder.\1.layers\2.pwconv\3",
    r"(stages\.\d)\.blocks(\.\d+)\.mlp\.grn": r"encoder.\1.layers\2.grn",
    r"head\.norm": "layernorm",
    r"head\.fc": "classifier",
}
"""timm's names of layers, as patterns, and those of transformers."""

RESAMPLING = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which transformers uses."""


def write_transformers(
    what: Exportable,
    kind: Architecture,
    images: Preprocessing,
    names: Sequence[str],
    out: Path,
) -> float:
    """Write a folder that `AutoModel.from_pretrained` and `AutoImageProcessor` load, or with
    classes `AutoModelForImageClassification`; return the largest relative difference of their
    outputs from the model's.

    Args:
        what: a ConvNeXt V2 of timm, with or without classifier.
        kind: its architecture.
        images: how images are prepared: transformers crops squares.
        names: the classes; empty without a classifier.
        out: the folder.

    Raises:
        InputError: the package is missing, or it cannot express this model.
    """
    if not kind.use_grn or kind.layer_scale or kind.patch_size != 32:
        raise InputError(
            "to transformers: its ConvNeXt V2 has GRN, no layer scale and patches of 32 pixels; "
            f"this one has use_grn {kind.use_grn}, layer_scale {kind.layer_scale} and patch_size "
            f"{kind.patch_size}: use --to onnx or pt2"
        )
    if images.img_size[0] != images.img_size[1]:
        size = max(images.img_size)
        raise InputError(
            f"to transformers: its images are square, and img_size is {list(images.img_size)}: use "
            f"--img_size {size}, or --to onnx"
        )
    try:
        from transformers import (
            CLIPImageProcessor,
            ConvNextV2Config,
            ConvNextV2ForImageClassification,
            ConvNextV2Model,
        )
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise InputError(
            f"to transformers needs {error.name}, which is not installed: pip install "
            "'fcmae[export]'"
        ) from error
    disable_progress_bar()
    config = ConvNextV2Config(
        num_channels=kind.in_chans, patch_size=4, depths=[*kind.depths], hidden_sizes=[*kind.dims],
        layer_norm_eps=LAYER_NORM_EPS, image_size=images.img_size[0],
        id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)},
    )  # fmt: skip
    config.fcmae_version = __version__  # by which an earlier export is recognised
    model_class: Any = ConvNextV2ForImageClassification if names else ConvNextV2Model
    model = model_class(config)
    own = renamed(what.model.state_dict(), "convnextv2." if names else "")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.view(shapes[name]) for name, tensor in own.items()})
    model.save_pretrained(out)
    side = images.img_size[0]
    # It resizes and crops as evaluation does; ConvNeXt's own warps images from 384 pixels on.
    CLIPImageProcessor(
        size={"shortest_edge": round(side / images.crop_pct)},
        crop_size={"height": side, "width": side}, resample=RESAMPLING[images.interpolation],
        image_mean=[*images.mean], image_std=[*images.std],
        do_convert_rgb=kind.in_chans == 3,
    ).save_pretrained(out)  # fmt: skip
    loaded = model_class.from_pretrained(out).eval()
    return difference(
        what, lambda images: loaded(images).logits if names else loaded(images).pooler_output
    )


def renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a state dict of timm's ConvNeXt V2 in the names of transformers.

    Args:
        state: timm's.
        prefix: of all names but those of the classifier.
    """
    found = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        pattern = next(pattern for pattern in NAMES if re.fullmatch(pattern, layer))
        new = re.sub(pattern, NAMES[pattern], layer)
        found[f"{'' if new == 'classifier' else prefix}{new}.{leaf}"] = tensor
    return found
