"""A pretrained model back from its run folder, decoder included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fcmae.model.fcmae import FCMAE
from fcmae.train.checkpoint import (
    MANIFEST,
    SavedCheckpoint,
    load_checkpoint,
    load_model_tensors,
    newest_checkpoint,
)
from sparse import SparseConvNeXtV2
from sparse.errors import InputError


def load_run_checkpoint(run: str) -> SavedCheckpoint:
    """The newest good checkpoint of a pretraining run, or the checkpoint folder itself.

    Raises:
        InputError: there is none, or it is not of pretraining.
    """
    path = Path(run)
    named = (path / MANIFEST).exists()
    checkpoint = load_checkpoint(path) if named else newest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise InputError(
            f"{run!r} holds no good checkpoint: give the --out folder of `fcmae pretrain`"
        )
    if checkpoint.state.get("command") != "pretrain":
        raise InputError(
            f"{run!r} is a run of `fcmae {checkpoint.state.get('command')}`, which has no decoder: "
            "give one of `fcmae pretrain`"
        )
    return checkpoint


def build_model(checkpoint: SavedCheckpoint, device: torch.device) -> tuple[FCMAE, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, and the settings it was trained with."""
    settings = checkpoint.state["settings"]
    encoder = SparseConvNeXtV2(
        settings["depths"], settings["dims"], settings["in_chans"],
        use_grn=settings["use_grn"], layer_scale=settings["layer_scale"],
    )  # fmt: skip
    model = FCMAE(
        encoder, settings["decoder"]["dim"], settings["decoder"]["depth"], settings["mask_ratio"],
        settings["norm_pix_loss"],
    )  # fmt: skip
    load_model_tensors(model, checkpoint.tensors("model"))
    return model.to(device).eval(), settings
