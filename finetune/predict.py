"""`fcmae predict`: the most probable classes of each image, as a CSV file."""

import csv
import logging
import os
from pathlib import Path

import torch

from fcmae.atomic import out_file
from fcmae.commands.predict import PredictConfig
from fcmae.data.file_list import FileList
from fcmae.data.sources import Source
from fcmae.inspect.prologue import set_up
from finetune.model import load_classifier

_log = logging.getLogger(__name__)


def predict(config: PredictConfig) -> Path:
    """Classify images and return the CSV file written: path,label,score,label2,score2,…

    A score is the model's probability, from 0 to 1. A path begins with `config.images` as given;
    from a list of paths it is absolute. Images that can't be read are reported and skipped.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, config.source, load_classifier, ".csv")
    split, model, names = setting.find_images(), setting.model.model, setting.model.names
    top, written, out = min(config.top, len(names)), 0, Path(config.out)
    # Names that are not UTF-8 are written as their bytes.
    with (
        torch.no_grad(),
        out_file(out) as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.writer(file)
        further = [f"{kind}{place}" for place in range(2, top + 1) for kind in ("label", "score")]
        rows.writerow(["path", "label", "score", *further])
        for batch, images in setting.batches(split, named=len(split.source)):
            best = model(images).cpu().softmax(1).topk(top)
            for index, scores, places in zip(
                batch.indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                row = [_path(split.source, index, config.images)]
                for score, place in zip(scores, places, strict=True):
                    row += [names[place], f"{score:.6f}"]
                rows.writerow(row)
                written += 1
    skipped = len(split.source) - written
    more = f"; {skipped} could not be read" if skipped else ""
    _log.info("%s: %d images%s", out, written, more)
    return out


def _path(source: Source, index: int, images: str) -> str:
    if os.path.isdir(os.path.expanduser(images)):
        return os.path.join(images, os.fsdecode(source.key(index)))
    return os.fsdecode(source.path(index)) if isinstance(source, FileList) else source.name(index)
