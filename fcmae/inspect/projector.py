"""Features for TensorBoard's projector, which maps images to two or three dimensions."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fcmae.atomic import out_file
from fcmae.data.labelled import Split
from fcmae.data.sources import Indices, key_hashes
from fcmae.inspect.prologue import Setting
from fcmae.inspect.thumbnails import sheet, thumbnails

SPRITE = "sprite.png"
SIDE = 64
"""Side of a thumbnail in pixels."""

MOST = (8192 // SIDE) ** 2
"""Thumbnails in the largest sprite that TensorBoard shows, 8192×8192 pixels."""

_log = logging.getLogger(__name__)


def write_projector(
    folder: Path, setting: Setting[Any], split: Split, features_NC: Tensor, indices_N: Indices
) -> None:
    """Write features, names, labels and thumbnails, and the projector's config, which comes last.

    A label is the first folder of an image's path. Of more than `MOST` images, those whose paths
    have the smallest hashes are shown.

    Args:
        folder: created if it is missing.
        setting: of the command.
        split: the images.
        features_NC: of the images that could be read.
        indices_N: their positions in `split`, ascending.

    Raises:
        RunError: a file could not be written.
    """
    # Its package needs a second to import.
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    kept = np.argsort(key_hashes(split.source.select(indices_N)), kind="stable")[:MOST]
    kept.sort()
    features, indices = features_NC[kept], indices_N[kept]
    names = [" ".join(split.source.name(index).split()) for index in indices.tolist()]
    with out_file(folder / "features.tsv") as path:
        np.savetxt(path, features.numpy(), "%.6g", "\t")
    with out_file(folder / "metadata.tsv") as path:
        path.write_text(_metadata(names), encoding="utf-8", errors="backslashreplace")
    with out_file(folder / SPRITE) as path:
        _sprite(thumbnails(setting, split, indices, SIDE)).save(path, format="PNG")
    config = ProjectorConfig()
    entry = config.embeddings.add()
    entry.tensor_name, entry.tensor_path = "features", "features.tsv"
    entry.metadata_path = "metadata.tsv"
    entry.sprite.image_path = SPRITE
    entry.sprite.single_image_dim.extend([SIDE, SIDE])
    with out_file(folder / "projector_config.pbtxt") as path:
        path.write_text(str(config))
    _log.info("%s: for `tensorboard --logdir %s`, tab Projector", folder, folder)
    if len(kept) < len(indices_N):
        _log.info("it shows a sample of %d of the %d images", len(kept), len(indices_N))


def _metadata(names: list[str]) -> str:
    """A name a line; if some are in folders, a table of names and labels, which has a heading."""
    labels = [name.partition("/")[0] if "/" in name else "" for name in names]
    if not any(labels):
        return "\n".join(names) + "\n"
    rows = zip(["name", *names], ["label", *labels], strict=True)
    return "".join(f"{name}\t{label}\n" for name, label in rows)


def _sprite(images_NCHW: Tensor) -> Image.Image:
    """Lay out thumbnails in a square, row by row; the last rows may be empty."""
    per_row = int(np.ceil(len(images_NCHW) ** 0.5))
    square = images_NCHW.new_zeros(per_row**2, *images_NCHW.shape[1:])
    square[: len(images_NCHW)] = images_NCHW
    return sheet(square, per_row, gap=0)
