"""`fcmae embed`: the features of pictures, as numpy arrays."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from fcmae.atomic import check_out_file, out_file
from fcmae.config.tools import EmbedConfig
from fcmae.config.values import height_width
from fcmae.console import show_logs
from fcmae.data.evaluation import tell_left_out
from fcmae.data.files import find_images
from fcmae.inspect.features import extract, load_backbone
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import resolve_device
from sparse.errors import RunError

_log = logging.getLogger(__name__)


def embed(config: EmbedConfig) -> Path:
    """Write features (N, C) float32 and their paths (N) to an .npz file, and return it.

    A feature is the mean of the last stage's map over a centre crop; a path is relative to
    `config.images`. Pictures that can't be read are named and left out.

    Raises:
        InputError: the weights, the pictures or `out` is wrong.
        RunError: no picture could be read, or `out` could not be written.
    """
    show_logs()
    out = check_out_file(config.out, ".npz")
    size = None if config.img_size is None else height_width(config.img_size)
    device = resolve_device(config.device)
    backbone = load_backbone(config.source, device, size)
    files = find_images(config.images, setting="images")
    workers = resolve_workers(config.workers, device)
    found = extract(backbone, files, config.batch_size, workers, what="features")
    tell_left_out(found.bad)
    if not len(found.indices):
        raise RunError(f"none of the {len(files)} pictures in {config.images!r} can be read")
    paths = np.array([files.name(index) for index in found.indices.tolist()])
    with out_file(out) as path, path.open("wb") as file:
        np.savez(file, features=found.values.numpy(), paths=paths)
    _log.info("%s: %d pictures, %d channels, from %s", out, *found.values.shape, backbone.origin)
    return out
