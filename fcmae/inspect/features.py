"""Frozen features: what an encoder makes of whole images, nothing hidden.

An image's feature is the mean over the positions of the last stage's map, before any norm or head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.config.values import MAX_PIXELS
from fcmae.data.evaluation import each_batch
from fcmae.data.labelled import Labels, Split
from fcmae.train.processes import ALONE, World
from fcmae.train.task import Interrupted
from fcmae.weights.load import Backbone
from sparse import SparseConvNeXtV2, get_engine
from sparse.sizes import PATCH


class Features(NamedTuple):
    """Features (N, C) float32 on the CPU, of which images (N,), and what could not be read."""

    values: Tensor
    indices: Labels
    bad: list[tuple[str, str]]


@torch.no_grad()
def pooled(encoder: SparseConvNeXtV2, images_BCHW: Tensor) -> Tensor:
    """Features of normalised images (B, C, H, W) → (B, dims[-1]) float32, whatever engine is set.

    The dense engine computes them: with nothing hidden there is nothing to skip.
    """
    batch, _, height, width = images_BCHW.shape
    nothing = torch.zeros(batch, height // PATCH, width // PATCH, dtype=torch.bool)
    sites = get_engine("dense", images_BCHW.device.type).sites(nothing, images_BCHW.device)
    return SparseConvNeXtV2.encode(encoder, images_BCHW, sites).mean((2, 3)).float()


def extract(
    backbone: Backbone,
    split: Split,
    batch_size: int,
    workers: int,
    world: World = ALONE,
    stop: Callable[[], bool] = lambda: False,
    shown: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Features:
    """Compute the features of images; those that can't be read are skipped.

    Args:
        backbone: the encoder.
        split: the images.
        batch_size: images at a time.
        workers: processes that read.
        world: the processes that share the work, each with all features in the end.
        stop: asked between batches.
        shown: what stands beside a progress bar; None shows none.
        max_pixels: images with more pixels count as unreadable.

    Raises:
        Interrupted: `stop()` turned true.
        RunError: a process that reads images died.
    """
    values, indices, bad = [torch.empty(0, backbone.encoder.dims[-1])], [], []
    for batch, images in each_batch(
        split, backbone.images, backbone.device, batch_size, workers, world, max_pixels, shown
    ):
        if stop():
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
