"""`fcmae predict`: the predictions of a fine-tuned model for new images, in files."""

import logging
import os
from pathlib import Path

import torch

from fcmae.commands.predict import PredictConfig
from fcmae.data.file_list import FileList, refuse_to_replace
from fcmae.data.sources import Source
from fcmae.inspect.prologue import set_up
from finetune.tuned import load_tuned

_log = logging.getLogger(__name__)


def predict(config: PredictConfig) -> Path:
    """Predict labels of images and return the CSV file written. Its columns after `path`:

    - classify: `label`, `score`, `label2`, `score2`, …, the most probable classes and the model's
      probabilities, from 0 to 1;
    - multilabel: the probability of each class;
    - regress: each target.

    A path begins with `config.images` as given; from a list of paths it is absolute. Images that
    can't be read are reported and skipped.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, config.source, load_tuned)
    model, kind, written = setting.model.model, setting.model.kind, 0
    out, split = kind.check_out(config.out), setting.find_images()
    refuse_to_replace(out, split.source)
    with torch.no_grad(), kind.writing(out, config.top) as write:
        for batch, images in setting.batches(split, named=len(split.source)):
            paths = [_path(split.source, i, config.images) for i in batch.indices.tolist()]
            write(paths, batch, model(images))
            written += len(batch)
    skipped = len(split.source) - written
    more = f"; {skipped} could not be read" if skipped else ""
    _log.info("%s: %d images%s", out, written, more)
    return out


def _path(source: Source, index: int, images: str) -> str:
    if os.path.isdir(os.path.expanduser(images)):
        return os.path.join(images, os.fsdecode(source.key(index)))
    return os.fsdecode(source.path(index)) if isinstance(source, FileList) else source.name(index)
