"""Frozen features, an encoder's output for whole images, and `fcmae embed`, which writes them.

An image's feature is the mean over the positions of the last stage's map, before any norm or head.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.atomic import check_out_folder, out_file
from fcmae.commands.embed import EmbedConfig
from fcmae.data.file_list import refuse_to_replace
from fcmae.data.labelled import Labels
from fcmae.data.sample import Batch
from fcmae.inspect.projector import SPRITE, write_projector
from fcmae.inspect.prologue import set_up
from fcmae.model.mask import grid_of
from fcmae.train.processes import ALONE, World
from fcmae.weights.load import load_backbone
from sparse import SparseConvNeXtV2, get_engine

_log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features (N, C) float32 on the CPU, the images' indices (N,), and unreadable images."""

    values: Tensor
    indices: Labels
    bad: list[tuple[str, str]]


@torch.no_grad()
def pooled(encoder: SparseConvNeXtV2, images_BCHW: Tensor) -> Tensor:
    """Features of normalised images (B, C, H, W) → (B, dims[-1]) float32.

    The dense engine computes them, whatever engine is set: with nothing hidden there is nothing to
    skip.
    """
    batch, _, height, width = images_BCHW.shape
    grid = grid_of((height, width), encoder.patch_size)
    nothing = torch.zeros(batch, *grid, dtype=torch.bool)
    sites = get_engine("dense", images_BCHW.device.type).sites(nothing, images_BCHW.device)
    return SparseConvNeXtV2.encode(encoder, images_BCHW, sites).mean((2, 3)).float()


def extract(
    encoder: SparseConvNeXtV2, batches: Iterable[tuple[Batch, Tensor]], world: World = ALONE
) -> Features:
    """Compute the features of images, in order; images that can't be read are skipped.

    Args:
        encoder: in evaluation mode.
        batches: this process's share, with normalised images on the encoder's device; may be empty.
        world: the processes that share the work; each returns all features.
    """
    found = collect(lambda _, images: pooled(encoder, images), batches, world)
    return found._replace(values=found.values.reshape(len(found.indices), encoder.dims[-1]))


def collect(
    describe: Callable[[Batch, Tensor], Tensor],
    batches: Iterable[tuple[Batch, Tensor]],
    world: World = ALONE,
) -> Features:
    """As `extract`, with features (B, C) that `describe` computes from a batch and its images."""
    values, indices, bad = [torch.empty(0)], [], []  # torch joins it to tensors of any width
    for batch, images in batches:
        bad += batch.bad
        if len(batch):
            values.append(describe(batch, images).cpu())
            indices += batch.indices.tolist()
    parts = world.gather((torch.cat(values), indices, bad))
    order = np.array([index for part in parts for index in part[1]], np.int64)
    joined = torch.cat([part[0] for part in parts])
    places = np.argsort(order)
    return Features(joined[places], order[places], [entry for part in parts for entry in part[2]])


def embed(config: EmbedConfig) -> Path:
    """Write features (N, C) float32 and their paths (N) to an .npz file, and return it.

    A feature is the mean of the last stage's map over a centre crop; a path is relative to
    `config.images`. Images that can't be read are reported and skipped. With `config.tensorboard`,
    also write a folder for TensorBoard's projector.

    Raises:
        InputError: the weights, the images, `out` or `tensorboard` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, config.source, load_backbone, ".npz")
    split, backbone, out = setting.find_images(), setting.model, Path(config.out)
    if config.tensorboard is not None:
        refuse_to_replace(check_out_folder(config.tensorboard) / SPRITE, split.source)
    found = extract(backbone.encoder, setting.batches(split, "features"))
    paths = np.array([split.source.name(index) for index in found.indices])
    with out_file(out) as path, path.open("wb") as file:
        np.savez(file, features=found.values.numpy(), paths=paths)
    _log.info("%s: %d images, %d channels, from %s", out, *found.values.shape, backbone.origin)
    if config.tensorboard is not None:
        write_projector(Path(config.tensorboard), setting, split, found.values, found.indices)
    return out
