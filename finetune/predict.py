"""`fcmae predict`: the best classes of each image, as a CSV file."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

import torch

from fcmae.atomic import out_file
from fcmae.commands.predict import PredictConfig
from fcmae.data.file_list import FileList
from fcmae.inspect.prologue import batches, images_of, set_up
from finetune.classifier import load_classifier

_log = logging.getLogger(__name__)


def predict(config: PredictConfig) -> Path:
    """Classify images and return the CSV file written: path,label,score,label2,score2,…

    A score is the model's probability, from 0 to 1. A path begins with `config.images` as it was
    given; for a list of paths it is in full. Images that can't be read are reported and
    skipped.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, load_classifier, images_of(config), ".csv")
    names, source = setting.model.names, setting.images.source
    top, written = min(config.top, len(names)), 0
    assert setting.out is not None
    # Names that are not UTF-8 go back to the bytes they are.
    with (
        torch.no_grad(),
        out_file(setting.out) as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(_columns(top))
        for batch, images in batches(setting, config, report_all=True):
            best = setting.model.model(images).cpu().softmax(1).topk(top)
            for index, values, places in zip(
                batch.indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                row: list[str] = [_path(source, index, config.images)]
                for value, place in zip(values, places, strict=True):
                    row += [names[place], f"{value:.6f}"]
                rows.writerow(row)
                written += 1
    skipped = len(source) - written
    _log.info(
        "%s: %d images%s", setting.out, written,
        f"; {skipped} could not be read" if skipped else "",
    )  # fmt: skip
    return setting.out


def _columns(top: int) -> list[str]:
    further = [f"{kind}{place}" for place in range(2, top + 1) for kind in ("label", "score")]
    return ["path", "label", "score", *further]


def _path(files: FileList, index: int, images: str) -> str:
    if os.path.isdir(os.path.expanduser(images)):
        return os.path.join(images, os.fsdecode(files.key(index)))
    return os.fsdecode(files.path(index))
