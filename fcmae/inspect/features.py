"""Frozen features: what an encoder makes of whole pictures, nothing hidden.

A picture's feature is the mean over the positions of the last stage's map, before any norm or head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.config.values import MAX_PIXELS
from fcmae.console import tracked
from fcmae.data.evaluation import EvalDataset, batches_of, each_batch
from fcmae.data.files import FileList
from fcmae.data.labelled import Labels
from fcmae.train.processes import World
from fcmae.train.task import Interrupted
from fcmae.weights.export import CROP_PCT, default_preprocessing
from fcmae.weights.read import Preprocessing, find_weights, load_weights, read_preprocessing
from sparse import SparseConvNeXtV2, get_engine
from sparse.block import SparseBlock
from sparse.convert import encoder_part
from sparse.encoder import init_fan_in
from sparse.sizes import PATCH

V1_LAYER_SCALE = 1e-6
"""ConvNeXt V1's initial scale (arXiv 2201.03545)."""


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


class Features(NamedTuple):
    """Features (N, C) float32 on the CPU, of which files (N,), and what could not be read."""

    values: Tensor
    indices: Labels
    bad: list[tuple[str, str]]


def load_backbone(
    source: str, device: torch.device, img_size: tuple[int, int] | None = None
) -> Backbone:
    """Load the encoder of a run, a checkpoint, a timm folder or a weight file.

    Images are prepared as they were for these weights, where their source says it.

    Args:
        img_size: (height, width), multiples of 32; None takes what the source says, else 224.

    Raises:
        InputError: nothing there, damaged, or no ConvNeXt.
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


@torch.no_grad()
def pooled(encoder: SparseConvNeXtV2, images_BCHW: Tensor) -> Tensor:
    """Features of normalised images (B, C, H, W) → (B, dims[-1]) float32, whatever engine is set.

    The dense engine computes them: with nothing hidden there is nothing to skip.
    """
    batch, _, height, width = images_BCHW.shape
    nothing = torch.zeros(batch, height // PATCH, width // PATCH, dtype=torch.bool)
    sites = get_engine("dense").sites(nothing, images_BCHW.device)
    return SparseConvNeXtV2.encode(encoder, images_BCHW, sites).mean((2, 3)).float()


def extract(
    backbone: Backbone,
    files: FileList,
    batch_size: int,
    workers: int,
    world: World | None = None,
    prefix: str = "",
    stop: Callable[[], bool] | None = None,
    what: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Features:
    """Compute the features of files; those that can't be read are left out.

    Args:
        world: the processes that share the work, each with all features in the end.
        prefix: goes before the names of files that can't be read.
        stop: asked between batches.
        what: shown beside a progress bar; None shows none.
        max_pixels: larger pictures are not read.

    Raises:
        Interrupted: `stop()` turned true.
        RunError: a process that reads pictures died.
    """
    world = world or World(0, 1, backbone.device)
    batches = batches_of(len(files), batch_size, world.rank, world.size)
    dataset = EvalDataset(
        files, None, backbone.images.img_size, backbone.encoder.in_chans, CROP_PCT, "bicubic",
        max_pixels, prefix,
    )  # fmt: skip
    loaded = each_batch(
        dataset, batches, workers, backbone.images.mean, backbone.images.std, backbone.device
    )
    values, indices, bad = [torch.empty(0, backbone.encoder.dims[-1])], [], []
    for batch, images in tracked(loaded, len(batches), what):
        if stop is not None and stop():
            raise Interrupted
        bad += batch.bad
        if len(batch):
            values.append(pooled(backbone.encoder, images).cpu())
            indices += batch.indices.tolist()
    parts = world.gather((torch.cat(values), indices, bad))
    order = np.array([index for part in parts for index in part[1]], np.int64)
    joined = torch.cat([part[0] for part in parts])
    places = np.argsort(order)
    return Features(joined[places], order[places], [entry for part in parts for entry in part[2]])
