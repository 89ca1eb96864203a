"""`fcmae evaluate`: the accuracy of a classifier on labelled images, overall and per class."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcmae.atomic import out_file
from fcmae.commands.evaluate import EvaluateConfig
from fcmae.config.files import read_yaml
from fcmae.data.file_list import FileList, refuse_to_replace
from fcmae.data.labelled import TRAIN, VAL, Split, check_known, find_classes, labels_of
from fcmae.inspect.prologue import Setting, print_result, print_table, set_up
from fcmae.train.run_paths import RunPaths
from finetune.model import Classifier, load_classifier
from sparse.errors import InputError

TOP = 5
MOST_ROWS = 100
"""With more classes than this, a table shows only this many, the worst."""

Counts = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, show: bool = True) -> dict[str, Any]:
    """Measure a classifier, and print a table, or with `config.json` one JSON object.

    Args:
        config: what was asked for.
        show: False prints nothing.

    Returns:
        `top1` and `top5` in percent of the `n` images (`top5` counts hits among the best `top5_of`
        classes: five, or all if there are fewer); `balanced`, the mean over the measured classes;
        `per_class`, {name: {top1, n}}, and `not_measured`, the classes without an image;
        `unreadable`, the number of skipped images; and what was measured: `split`, `weights`, and
        `kept_back`, whether the images are those that the run kept back from one folder.

    Raises:
        InputError: the weights, the data or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, config.source, load_classifier, ".png", ".csv")
    classifier = setting.model
    split, kept = find_split(config, classifier)
    refuse_to_replace(setting.out, split.source)
    confusion, top5 = measure(setting, split)
    result = summarise(confusion, top5, classifier.names)
    result |= {
        "unreadable": len(split.source) - result["n"],
        "split": split.prefix.rstrip("/") or ".",
        "kept_back": kept,
        "weights": str(classifier.folder),
    }
    print_result(result, config.json, show, _print_table)
    if setting.out is not None:
        write_confusion(confusion, classifier.names, setting.out)
    return result


def find_split(config: EvaluateConfig, classifier: Classifier) -> tuple[Split, bool]:
    """Find the images to measure on, data/SPLIT/CLASS or data/CLASS. Return them and whether they
    are those that a run kept back from one folder.

    A run that divided this data by `val_fraction`, or what it exported, is measured on the images
    that it kept back then, whatever was added to the folder or removed since.

    Raises:
        InputError: no images, classes that the model does not have, or the run's list of the images
            is missing.
    """
    root, names = Path(config.data).expanduser(), classifier.names
    if not root.is_dir():
        raise InputError(f"data {config.data!r} is not a folder: use one with {config.split}/CLASS")
    folder, prefix = root / config.split, f"{config.split}/"
    if not folder.is_dir():
        run = RunPaths(classifier.folder.parent)
        divided = run.config.is_file() and read_yaml(run.config).get("val_fraction")
        if config.split == VAL and divided:
            kept = FileList.load(run.images(VAL))
            trained = Path(kept.roots[0])
            for inside, prefix in ((root / TRAIN, f"{TRAIN}/"), (root, "")):
                if inside.is_dir() and inside.resolve() == trained.resolve():
                    _log.info("measuring on the %d images that the run kept back", len(kept))
                    return Split(kept, prefix, labels_of(kept, names)), True
            _log.warning("all of %s is measured: the run kept back images of %s", root, trained)
        _log.info("%s has no folder %r: its folders are treated as classes", root, config.split)
        folder, prefix = root, ""
    files, found = find_classes(folder)
    check_known(folder, found, names, "the model")
    return Split(files, prefix, labels_of(files, names)), False


@torch.no_grad()
def measure(setting: Setting[Classifier], split: Split) -> tuple[Counts, int]:
    """Return the confusion matrix (true class, predicted class) and the top-5 hits.

    Raises:
        RunError: no image could be read.
    """
    classes, top5 = len(setting.model.names), 0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for batch, images in setting.batches(split):
        assert batch.targets is not None
        best = setting.model.model(images).cpu().topk(min(TOP, classes)).indices
        top5 += int((best == batch.targets[:, None]).sum())
        confusion += multiclass_confusion_matrix(best[:, 0], batch.targets, classes)
    return confusion.numpy(), top5


def summarise(confusion: Counts, top5: int, names: Sequence[str]) -> dict[str, Any]:
    """Return percentages of a confusion matrix (true class, predicted class)."""
    counts, total = confusion.sum(axis=1).tolist(), int(confusion.sum())
    per_class = {
        name: {"top1": 100 * hits / count, "n": count}
        for name, hits, count in zip(names, confusion.diagonal().tolist(), counts, strict=True)
        if count
    }
    return {
        "top1": 100 * int(confusion.trace()) / total,
        "top5": 100 * top5 / total,
        "top5_of": min(TOP, len(names)),
        "balanced": sum(entry["top1"] for entry in per_class.values()) / len(per_class),
        "n": total,
        "per_class": per_class,
        "not_measured": [name for name in names if name not in per_class],
    }


def write_confusion(confusion: Counts, names: Sequence[str], out: Path) -> None:
    """Write the confusion matrix as a table (.csv) or a figure (.png), atomically.

    Raises:
        RunError: it could not be written.
    """
    with out_file(out) as path:
        if out.suffix.lower() == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["true \\ predicted", *names])
                rows.writerows([name, *row] for name, row in zip(names, confusion, strict=True))
        else:
            _draw_confusion(confusion, names).savefig(path, format="png", dpi=150)
    _log.info("confusion matrix: %s", out)


def _draw_confusion(confusion: Counts, names: Sequence[str]) -> Any:
    """Plot the share of each true class (row) that is predicted as each class, in percent."""
    from matplotlib.figure import Figure

    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.35 * len(names), 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(drawn, label="% of the true class")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in np.argwhere(confusion):
            value = share[row, column]
            color = "white" if value > 50 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    return figure


def _print_table(result: dict[str, Any]) -> None:
    classes, absent, n = result["per_class"], result["not_measured"], str(result["n"])
    title = "the images that it kept back" if result["kept_back"] else result["split"]
    rows: list[tuple[str, ...]] = [
        (name, f"{entry['top1']:.1f}", str(entry["n"])) for name, entry in classes.items()
    ]
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: classes[row[0]]["top1"])[:MOST_ROWS]
        title += f"; the worst {MOST_ROWS} of {len(classes)} classes, --json has all"
    over = f" over {len(classes)} of {len(classes) + len(absent)} classes" if absent else ""
    rows += [(name, "not measured", "0") for name in absent[:MOST_ROWS]]
    rows += [
        (),
        ("all: top-1", f"{result['top1']:.2f}", n),
        (f"all: top-{result['top5_of']}", f"{result['top5']:.2f}", n),
        (f"balanced{over}", f"{result['balanced']:.2f}"),
    ]
    print_table(("class", "top-1 %", "images"), rows, f"{result['weights']} on {title}")
