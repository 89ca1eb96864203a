"""Finding weights and loading models, from a run, a checkpoint, a timm folder or a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.model.fcmae import FCMAE
from fcmae.train.checkpoint import (
    MANIFEST,
    damage,
    list_checkpoints,
    load_checkpoint,
    load_model_tensors,
    newest_checkpoint,
    newest_good,
)
from fcmae.train.run_paths import RunPaths
from fcmae.weights.preprocessing import read_preprocessing
from fcmae.weights.read import WEIGHTS_FILE, read_state
from sparse import SparseConvNeXtV2
from sparse.block import SparseBlock
from sparse.convert import canonical, encoder_part
from sparse.encoder import init_fan_in
from sparse.errors import InputError
from sparse.layouts import Architecture, infer_architecture
from sparse.sizes import PATCH

V1_LAYER_SCALE = 1e-6
"""ConvNeXt V1's initial scale (arXiv 2201.03545)."""

_log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """Weights in our names (the encoder's without prefix, `decoder.*` where there is a decoder),
    the architecture that they belong to, and where they come from, in words. The final norm that
    fine-tuning learnt is no part of an encoder: `norm` has its weight and bias, or nothing."""

    state: dict[str, Tensor]
    architecture: Architecture
    origin: str
    norm: dict[str, Tensor]


def load_weights(source: str | Path) -> Weights:
    """Read weights in any known layout from a run, checkpoint or timm folder, or from a file.

    A classifier is dropped; `origin` then says so.

    Raises:
        InputError: nothing there, damaged, refused, not finite, or not a ConvNeXt V2.
    """
    path = find_weights(source)
    state, notes = read_state(path)
    try:
        weights = canonical(state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"{path}: {len(broken)} tensors hold NaN or infinity ({broken[0]}): "
            "take a checkpoint from before training diverged"
        )
    if {"head.fc.weight", "head.weight"} & state.keys():
        notes.append("without its classifier")
    origin = f"{path}, {', '.join(notes)}" if notes else str(path)
    return Weights(weights, infer_architecture(weights), origin, _final_norm(state))


def _final_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `weight` and `bias` between pooling and classifier, in timm's or the official names."""
    return {
        name.rpartition(".")[2]: tensor
        for name, tensor in state.items()
        if name.rpartition(".")[0] in ("head.norm", "norm")
    }


def find_weights(source: str | Path) -> Path:
    """Return the weight file that `source` stands for.

    A run stands for its best weights where it keeps those, as fine-tuning does, else for its newest
    intact checkpoint, else for its exported model; a checkpoint or timm folder for its
    model.safetensors; a file for itself.

    Raises:
        InputError: nothing there that can be read.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a run, a timm folder or a file")
    run = RunPaths(path)
    if (run.best / WEIGHTS_FILE).is_file():
        return run.best / WEIGHTS_FILE
    for folder in (newest_good(run.checkpoints), run.exported, path):
        if folder is not None and (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
    if damaged := list_checkpoints(run.checkpoints):
        reason = damage(damaged[0])
        raise InputError(
            f"{path}: all {len(damaged)} checkpoints are damaged (the newest: {reason}); "
            "pretrain anew, or give another run"
        )
    raise InputError(
        f"{path}: no weights: expected a run with checkpoints/step-*/{WEIGHTS_FILE}, "
        f"or a folder with {WEIGHTS_FILE}"
    )


def init_encoder(encoder: SparseConvNeXtV2, source: str) -> None:
    """Start an encoder of pretraining from given weights; the first layer is adapted to its
    channels, and what the weights do not have, such as GRN, keeps its initial values.

    Raises:
        InputError: the weights can't be read, or are of another size.
    """
    weights = load_weights(source)
    state = dict(encoder_part(weights.state))
    state["stem.0.weight"] = adapt_in_chans(state["stem.0.weight"], encoder.in_chans)
    found = infer_architecture(state)
    if (found.depths, found.dims) != (encoder.depths, encoder.dims):
        raise InputError(
            f"init_from {source!r} has depths {list(found.depths)} and dims {list(found.dims)}, "
            f"the model {list(encoder.depths)} and {list(encoder.dims)}: choose its --model"
        )
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if unexpected:
        raise InputError(
            f"init_from {source!r} has {unexpected[0]!r}, which the model does not have"
        )
    if missing:
        _log.warning("not in %s, so they keep their initial values: %s", source, ", ".join(missing))
    _log.info("encoder starts from %s", weights.origin)


def adapt_in_chans(stem_weight: Tensor, in_chans: int) -> Tensor:
    """Fit the stem's weight (C, I, 4, 4) to another number of input channels.

    One channel gets the sum over the old ones, which is the response to a grey image; more get
    copies in turn, scaled by I / in_chans so that activations keep their size. timm's rule for
    I = 3, here for any I.
    """
    before = stem_weight.shape[1]
    if in_chans == before:
        return stem_weight
    if in_chans == 1:
        return stem_weight.sum(1, keepdim=True)
    turns = [channel % before for channel in range(in_chans)]
    return stem_weight[:, turns] * (before / in_chans)


@dataclass(frozen=True)
class Backbone:
    """An encoder in evaluation mode, how it wants images, and where it comes from: in words, and
    the weight file, if any."""

    encoder: SparseConvNeXtV2
    images: Preprocessing
    origin: str
    file: Path | None = None

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device


def load_backbone(
    source: str, device: torch.device, img_size: tuple[int, int] | None = None
) -> Backbone:
    """Load the encoder of a run, a checkpoint, a timm folder or a weight file.

    Images are prepared as they were for these weights, where their source says it.

    Args:
        img_size: (height, width), multiples of 32; None takes what the source says, else 224.

    Raises:
        InputError: nothing there, damaged, or not a ConvNeXt.
    """
    file = find_weights(source)
    weights = load_weights(file)
    kind = weights.architecture
    encoder = SparseConvNeXtV2(
        kind.depths, kind.dims, kind.in_chans, use_grn=kind.use_grn,
        layer_scale=1.0 if kind.layer_scale else None,
    )  # fmt: skip
    encoder.load_state_dict(encoder_part(weights.state))
    images = read_preprocessing(file) or default_preprocessing(kind.in_chans)
    height, width = img_size or (_whole(images.img_size[0]), _whole(images.img_size[1]))
    images = Preprocessing((height, width), images.mean, images.std)
    return Backbone(encoder.to(device).eval(), images, weights.origin, file)


def random_backbone(like: Backbone, seed: int = 0) -> Backbone:
    """The same architecture with the random weights that pretraining starts from."""
    given = like.encoder
    block = next(module for module in given.modules() if isinstance(module, SparseBlock))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SparseConvNeXtV2(
            given.depths, given.dims, given.in_chans,
            use_grn=block.mlp.grn is not None,
            layer_scale=None if block.gamma is None else V1_LAYER_SCALE,
        )  # fmt: skip
        init_fan_in(encoder)
    return Backbone(encoder.to(like.device).eval(), like.images, "random weights")


def _whole(side: int) -> int:
    """The nearest multiple of 32: weights that were fine-tuned by timm may name another size."""
    return max(round(side / PATCH), 1) * PATCH


class Pretrained(NamedTuple):
    """A pretrained model with its decoder, in evaluation mode, and how it was trained: how images
    were prepared, the resolved settings, and the completed steps."""

    model: FCMAE
    images: Preprocessing
    settings: dict[str, Any]
    step: int


def load_pretrained(run: str, device: torch.device) -> Pretrained:
    """Load the model of a run of pretraining, or of one of its checkpoints.

    Raises:
        InputError: there is no good checkpoint, or it is not of pretraining.
    """
    path = Path(run)
    named = (path / MANIFEST).exists()
    checkpoint = load_checkpoint(path) if named else newest_checkpoint(RunPaths(path).checkpoints)
    if checkpoint is None:
        raise InputError(
            f"{run!r} holds no good checkpoint: give the --out folder of `fcmae pretrain`"
        )
    command, settings = checkpoint.state.get("command"), checkpoint.state["settings"]
    if command != "pretrain":
        raise InputError(
            f"{run!r} is a run of `fcmae {command}`, which has no decoder: give one of "
            "`fcmae pretrain`"
        )
    encoder = SparseConvNeXtV2(
        settings["depths"], settings["dims"], settings["in_chans"],
        use_grn=settings["use_grn"], layer_scale=settings["layer_scale"],
    )  # fmt: skip
    model = FCMAE(
        encoder, settings["decoder"]["dim"], settings["decoder"]["depth"], settings["mask_ratio"],
        settings["norm_pix_loss"],
    )  # fmt: skip
    load_model_tensors(model, checkpoint.tensors("model"))
    height, width = settings["img_size"]
    images = Preprocessing((height, width), tuple(settings["mean"]), tuple(settings["std"]))
    return Pretrained(model.to(device).eval(), images, settings, checkpoint.state["step"])
