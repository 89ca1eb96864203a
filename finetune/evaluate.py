"""`fcmae evaluate`: how well a classifier does on labelled images, in all and for each class."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from fcmae.atomic import check_out_file, out_file
from fcmae.config.values import height_width, read_yaml
from fcmae.console import show_logs
from fcmae.data.evaluation import tell_left_out
from fcmae.data.files import FileList, refuse_to_replace
from fcmae.data.labelled import TRAIN, VAL, Split, check_known, find_classes, labels_of
from fcmae.train.processes import resolve_device
from finetune.classifier import Classifier, load_classifier
from finetune.settings import VAL_LIST
from finetune.tool_config import EvaluateConfig
from sparse.errors import InputError, RunError

TOP = 5
MOST_ROWS = 100
"""With more classes than this, a table shows only this many, the worst."""

Counts = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, show: bool = True) -> dict[str, Any]:
    """Measure a classifier, and print a table, or with `config.json` one JSON object.

    Args:
        show: False prints nothing.

    Returns:
        `top1` and `top5` in percent of the `n` pictures (top5 is the share among the best
        `top5_of`, fewer than five where there are fewer classes); `balanced`, the mean over the
        classes measured; `per_class`, {name: {top1, n}}, and `not_measured`, the classes without a
        picture; `unreadable`, the pictures left out; `split`, `weights`, and `kept_back`, whether
        the pictures are those that the run kept back of one folder: what was measured.

    Raises:
        InputError: the weights, the data or `out` is wrong.
        RunError: no picture could be read, or `out` could not be written.
    """
    show_logs()
    out = None if config.out is None else check_out_file(config.out, ".png", ".csv")
    size = None if config.img_size is None else height_width(config.img_size, multiple=1)
    classifier = load_classifier(config.source, resolve_device(config.device), size)
    split, kept = find_split(config, classifier)
    if out is not None:
        refuse_to_replace(out, split.files)
    confusion, top5, bad = measure(classifier, split, config)
    result = summarise(confusion, top5, classifier.names)
    result |= {
        "unreadable": len(bad),
        "split": split.prefix.rstrip("/") or ".",
        "kept_back": kept,
        "weights": str(classifier.folder),
    }
    tell_left_out(bad)
    if show and config.json:
        print(json.dumps(result))
    elif show:
        _print_table(result)
    if out is not None:
        write_confusion(confusion, classifier.names, out)
    return result


def find_split(config: EvaluateConfig, classifier: Classifier) -> tuple[Split, bool]:
    """Find the pictures to measure on: data/SPLIT/CLASS, or data/CLASS; and say whether they are
    those that a run kept back of one folder.

    A run that divided this data by `val_fraction`, or what it exported, is measured on the pictures
    that it kept back then, whatever came to the folder or left it since.

    Raises:
        InputError: nothing there, or classes that the model does not know.
    """
    root = Path(config.data).expanduser()
    if not root.is_dir():
        raise InputError(f"data {config.data!r} is no folder: give one with {config.split}/CLASS/…")
    folder = root / config.split
    if folder.is_dir():
        files, names = find_classes(folder)
        check_known(folder, names, classifier.names, "the model")
        return Split(files, f"{config.split}/"), False
    kept = _kept_back(Path(config.source)) if config.split == VAL else None
    if kept is not None:
        trained = Path(kept.roots[0])
        for inside, prefix in ((root / TRAIN, f"{TRAIN}/"), (root, "")):
            if inside.is_dir() and trained.is_dir() and inside.samefile(trained):
                _log.info("measuring on the %d pictures that the run kept back", len(kept))
                return Split(kept, prefix), True
        _log.warning(
            "all of %s is measured: the run kept back pictures of %s, which is another folder",
            root, trained,
        )  # fmt: skip
    _log.info("%s has no folder %r: its folders are taken for classes", root, config.split)
    files, names = find_classes(root)
    check_known(root, names, classifier.names, "the model")
    return Split(files, ""), False


def _kept_back(source: Path) -> FileList | None:
    """The pictures that a run divided off its training data by `val_fraction`; None of others."""
    folder = source.parent if source.is_file() else source
    for run in (folder, folder.parent):
        asked, stored = run / "config.yaml", run / VAL_LIST
        if asked.is_file() and stored.is_file():
            return FileList.load(stored) if read_yaml(asked).get("val_fraction") else None
    return None


def measure(
    classifier: Classifier, split: Split, config: EvaluateConfig
) -> tuple[Counts, int, list[tuple[str, str]]]:
    """Return the confusion matrix (true class, predicted class), the hits among the best five, and
    (name, reason) of the pictures left out.

    Raises:
        RunError: no picture could be read.
    """
    classes = len(classifier.names)
    confusion = np.zeros((classes, classes), np.int64)
    top5, bad = 0, []
    labels = labels_of(split.files, classifier.names)
    for batch, scores in classifier.classify(
        split.files, labels, config.batch_size, config.workers, split.prefix
    ):
        bad += batch.bad
        best = scores.topk(min(TOP, classes)).indices
        top5 += int((best == batch.labels[:, None]).sum())
        np.add.at(confusion, (batch.labels.numpy(), best[:, 0].numpy()), 1)
    if not confusion.sum():
        raise RunError(f"none of the {len(bad)} pictures can be read ({': '.join(bad[0])})")
    return confusion, top5, bad


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
    """Write the confusion matrix as a table (.csv) or a picture (.png), atomically.

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
    """Draw the share of each true class (row) that is taken for each class, in percent."""
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
    place = "the pictures that it kept back" if result["kept_back"] else result["split"]
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
