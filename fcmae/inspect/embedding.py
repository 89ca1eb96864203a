"""`fcmae embed`: the features of images, as numpy arrays."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from fcmae.atomic import out_file
from fcmae.commands.embed import EmbedConfig
from fcmae.inspect.features import pooled
from fcmae.inspect.prologue import batches, images_of, set_up
from fcmae.weights.load import load_backbone

_log = logging.getLogger(__name__)


def embed(config: EmbedConfig) -> Path:
    """Write features (N, C) float32 and their paths (N) to an .npz file, and return it.

    A feature is the mean of the last stage's map over a centre crop; a path is relative to
    `config.images`. Images that can't be read are reported and skipped.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, load_backbone, images_of(config), ".npz")
    backbone, source = setting.model, setting.images.source
    features, paths = [], []
    for batch, images in batches(setting, config, "features"):
        features.append(pooled(backbone.encoder, images).cpu().numpy())
        paths += [source.name(index) for index in batch.indices.tolist()]
    values = np.concatenate(features)
    assert setting.out is not None
    with out_file(setting.out) as path, path.open("wb") as file:
        np.savez(file, features=values, paths=np.array(paths))
    _log.info("%s: %d images, %d channels, from %s", setting.out, *values.shape, backbone.origin)
    return setting.out
