"""`fcmae predict`: the best classes of each picture, as a CSV file."""

from __future__ import annotations

import csv
import logging
import os
import sys
from pathlib import Path

from fcmae.atomic import check_out_file, out_file
from fcmae.console import show_logs
from fcmae.data.files import FileList, find_images
from fcmae.train.processes import resolve_device
from finetune.classifier import load_classifier
from finetune.tool_config import PredictConfig
from sparse.errors import RunError

_log = logging.getLogger(__name__)


def predict(config: PredictConfig) -> Path:
    """Classify pictures and return the CSV file written: path,label,score,label2,score2,…

    A score is the model's probability, from 0 to 1. A path begins with `config.images` as it was
    given; for a list of paths it is in full. Pictures that can't be read are named on stderr and
    left out.

    Raises:
        InputError: the weights, the pictures or `out` is wrong.
        RunError: no picture could be read, or `out` could not be written.
    """
    show_logs()
    out = check_out_file(config.out, ".csv")
    classifier = load_classifier(config.source, resolve_device(config.device))
    files = find_images(config.images, setting="images")
    top = min(config.top, len(classifier.names))
    written, bad = 0, 0
    # Names that are no UTF-8 go back to the bytes they are.
    with (
        out_file(out) as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(_columns(top))
        for batch, scores in classifier.classify(files, None, config.batch_size, config.workers):
            for name, reason in batch.bad:
                print(f"left out, since it can't be read: {name}: {reason}", file=sys.stderr)
            bad += len(batch.bad)
            best = scores.softmax(1).topk(top)
            for index, values, places in zip(
                batch.indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                row: list[str] = [_path(files, index, config.images)]
                for value, place in zip(values, places, strict=True):
                    row += [classifier.names[place], f"{value:.6f}"]
                rows.writerow(row)
                written += 1
        if not written:
            raise RunError(f"none of the {len(files)} pictures in {config.images!r} can be read")
    left_out = f"; {bad} could not be read" if bad else ""
    _log.info("%s: %d pictures%s", out, written, left_out)
    return out


def _columns(top: int) -> list[str]:
    further = [f"{kind}{place}" for place in range(2, top + 1) for kind in ("label", "score")]
    return ["path", "label", "score", *further]


def _path(files: FileList, index: int, images: str) -> str:
    if os.path.isdir(os.path.expanduser(images)):
        return os.path.join(images, os.fsdecode(files.relative(index)))
    return os.fsdecode(files.path(index))
