"""`fcmae evaluate`: how well a classifier does on labelled images, in all and for each class."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcmae.atomic import out_file
from fcmae.commands.evaluate import EvaluateConfig
from fcmae.config.files import read_yaml
from fcmae.data.file_list import FileList, refuse_to_replace
from fcmae.data.labelled import TRAIN, VAL, Split, check_known, find_classes, labels_of
from fcmae.inspect.prologue import Setting, batches, set_up
from fcmae.train.run_paths import RunPaths
from finetune.classifier import Classifier, load_classifier
from sparse.errors import InputError

TOP = 5
MOST_ROWS = 100
"""With more classes than this, a table shows only this many, the worst."""

Counts = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, show: bool = True) -> dict[str, Any]:
    """Measure a classifier, and print a table, or with `config.json` one JSON object.

    Args:
        config: what was asked.
        show: False prints nothing.

    Returns:
        `top1` and `top5` in percent of the `n` images (top5 is the share among the best
        `top5_of`, fewer than five where there are fewer classes); `balanced`, the mean over the
        classes measured; `per_class`, {name: {top1, n}}, and `not_measured`, the classes without an
        image; `unreadable`, the images skipped; `split`, `weights`, and `kept_back`, whether
        the images are those that the run kept back of one folder: what was measured.

    Raises:
        InputError: the weights, the data or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    found = set_up(
        config, load_classifier, lambda classifier: find_split(config, classifier),
        ".png", ".csv", multiple=1,
    )  # fmt: skip
    split, kept = found.images
    setting = Setting(found.model, split, found.out, found.device)
    classifier = setting.model
    if setting.out is not None:
        refuse_to_replace(setting.out, split.source)
    confusion, top5 = measure(setting, config)
    result = summarise(confusion, top5, classifier.names)
    result |= {
        "unreadable": len(split.source) - result["n"],
        "split": split.prefix.rstrip("/") or ".",
        "kept_back": kept,
        "weights": str(classifier.folder),
    }
    if show and config.json:
        print(json.dumps(result))
    elif show:
        _print_table(result)
    if setting.out is not None:
        write_confusion(confusion, classifier.names, setting.out)
    return result


def find_split(config: EvaluateConfig, classifier: Classifier) -> tuple[Split, bool]:
    """Find the images to measure on: data/SPLIT/CLASS, or data/CLASS; and tell whether they are
    those that a run kept back of one folder.

    A run that divided this data by `val_fraction`, or what it exported, is measured on the images
    that it kept back then, whatever came to the folder or left it since.

    Raises:
        InputError: nothing there, or classes that the model does not know.
    """
    root = _root(config)
    folder, prefix = root / config.split, f"{config.split}/"
    if not folder.is_dir():
        kept = _kept_back(Path(config.source)) if config.split == VAL else None
        trained = None if kept is None else Path(kept.roots[0])
        if kept is not None and trained is not None:
            for inside, prefix in ((root / TRAIN, f"{TRAIN}/"), (root, "")):
                if inside.is_dir() and trained.is_dir() and inside.samefile(trained):
                    _log.info("measuring on the %d images that the run kept back", len(kept))
                    return Split(kept, prefix, labels_of(kept, classifier.names)), True
            _log.warning(
                "all of %s is measured: the run kept back images of %s, which is another folder",
                root, trained,
            )  # fmt: skip
        _log.info("%s has no folder %r: its folders are treated as classes", root, config.split)
        folder, prefix = root, ""
    files, names = find_classes(folder)
    check_known(folder, names, classifier.names, "the model")
    return Split(files, prefix, labels_of(files, classifier.names)), False


def _root(config: EvaluateConfig) -> Path:
    root = Path(config.data).expanduser()
    if not root.is_dir():
        raise InputError(
            f"data {config.data!r} is not a folder: give one with {config.split}/CLASS/…"
        )
    return root


def _kept_back(source: Path) -> FileList | None:
    """The images that a run divided off its training data by `val_fraction`; None of others.

    Raises:
        InputError: the run did, and its list of them is missing.
    """
    folder = source.parent if source.is_file() else source
    for run in (RunPaths(folder), RunPaths(folder.parent)):
        if run.config.is_file() and read_yaml(run.config).get("val_fraction"):
            return FileList.load(run.images("val"))
    return None


def measure(setting: Setting[Classifier, Split], config: EvaluateConfig) -> tuple[Counts, int]:
    """Return the confusion matrix (true class, predicted class) and the hits among the best five.

    Raises:
        RunError: no image could be read.
    """
    classes = len(setting.model.names)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    top5 = 0
    with torch.no_grad():
        for batch, images in batches(setting, config):
            assert batch.targets is not None
            best = setting.model.model(images).cpu().topk(min(TOP, classes)).indices
            top5 += int((best == batch.targets[:, None]).sum())
            confusion += multiclass_confusion_matrix(best[:, 0], batch.targets, classes)
    return confusion.numpy(), top5


def summarise(confusion: Counts, top5: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Return percentages of a confusion matrix (true class, predicted class)."""
    counts, hits = confusion.sum(axis=1), confusion.diagonal()
    total = int(counts.sum())
    per_class = {
        name: {"top1": 100 * int(hit) / int(count), "n": int(count)}
        for name, hit, count in zip(names, hits, counts, strict=True)
        if count
    }
    return {
        "top1": 100 * int(hits.sum()) / total,
        "top5": 100 * top5 / total,
        "top5_of": min(TOP, len(names)),
        "balanced": sum(entry["top1"] for entry in per_class.values()) / len(per_class),
        "n": total,
        "per_class": per_class,
        "not_measured": [name for name, count in zip(names, counts, strict=True) if not count],
    }


def write_confusion(confusion: Counts, names: tuple[str, ...], out: Path) -> None:
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


def _draw_confusion(confusion: Counts, names: tuple[str, ...]) -> Any:
    """Draw the share of each true class (row) that is predicted as each class, in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.35 * len(names), 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="% of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for (row, column), value in np.ndenumerate(share):
            if confusion[row, column]:
                color = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    return figure


def _print_table(result: dict[str, Any]) -> None:
    place = "the images that it kept back" if result["kept_back"] else result["split"]
    table = Table(title=f"{result['weights']} on {place}")
    for name in ("class", "top-1 %", "images"):
        table.add_column(name, justify="left" if name == "class" else "right")
    classes = result["per_class"]
    if len(classes) > MOST_ROWS:
        table.caption = f"the worst {MOST_ROWS} of {len(classes)} classes; --json has all"
        worst = sorted(classes, key=lambda name: classes[name]["top1"])[:MOST_ROWS]
        classes = {name: classes[name] for name in worst}
    for name, entry in classes.items():
        table.add_row(name, f"{entry['top1']:.1f}", str(entry["n"]))
    absent = result["not_measured"]
    for name in absent[:MOST_ROWS]:
        table.add_row(name, "not measured", "0")
    table.add_section()
    table.add_row("all: top-1", f"{result['top1']:.2f}", str(result["n"]))
    table.add_row(f"all: top-{result['top5_of']}", f"{result['top5']:.2f}", str(result["n"]))
    count = len(result["per_class"])
    over = f" over {count} of {count + len(absent)} classes" if absent else ""
    table.add_row(f"balanced{over}", f"{result['balanced']:.2f}", "")
    Console(highlight=False).print(table, markup=False)
