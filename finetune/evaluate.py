"""`fcmae evaluate`: the scores of a fine-tuned model on labelled images, overall and per class."""

import csv
import logging
from pathlib import Path
from typing import Any

import torch

from fcmae.atomic import out_file
from fcmae.commands.evaluate import EvaluateConfig
from fcmae.config.values import MAX_PIXELS
from fcmae.data.file_list import refuse_to_replace
from fcmae.inspect.prologue import print_result, print_table, set_up, write_skipped
from fcmae.train.processes import World
from finetune.figures import Examples, below, draw_predictions
from finetune.labels import find_split
from finetune.tasks.base import Measurement
from finetune.tuned import load_tuned

MOST_ROWS = 100
"""With more classes than this, a table shows only this many, the worst."""

HEADINGS = {
    "top1": "top-1 %", "top5": "top-5 %", "balanced": "balanced %",
    "ap": "AP %", "map": "mAP %", "f1": "F1 %", "mae": "MAE", "rmse": "RMSE", "r2": "R²",
    "miou": "mean IoU %", "iou": "IoU %", "accuracy": "accuracy %", "n": "images",
    "ap50": "AP50 %", "ap75": "AP75 %", "box_ap": "AP of boxes %", "objects": "objects",
}  # fmt: skip

_log = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(config: EvaluateConfig, show: bool = True) -> dict[str, Any]:
    """Measure a fine-tuned model, and print a table, or with `config.json` one JSON object.

    Args:
        config: what was asked for.
        show: False prints nothing.

    Returns:
        The scores of the kind of label, those of classes in percent:

        - classify: `top1`; `top5`, hits among the best `top5_of` classes (five, or all if there
          are fewer); `balanced`, the mean over the measured classes; `per_class`, {name: {top1,
          n}}.
        - multilabel: `map` and `f1`, means over the measured classes; `per_class`, {name: {ap, f1,
          threshold, n}}.
        - regress: `mae`, `rmse` and `r2`, each {target: number or None}, and `values`, the known
          numbers of each target.
        - segment: `miou` and `accuracy`; `per_class`, {name: {iou, accuracy, n}}.
        - detect, instances: COCO's `ap`, `ap50` and `ap75`, of masks for instances, with `box_ap`;
          `per_class`, {name: {ap, ap50, objects, n}}.

        `not_measured` lists classes without an image. Further `n`, the number of images;
        `unreadable` and `skipped`, the number of others, and the path and reason of each; and what
        was measured: `task`, `split`, `weights`, and `held_out`, whether the images are those that
        the run held out.

    Raises:
        InputError: the weights, the data or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, config.source, load_tuned, ".png", ".csv")
    tuned = setting.model
    split, name, held_out = find_split(config, tuned)
    refuse_to_replace(setting.out, split.source)
    measurement = tuned.kind.measurement(World(device=setting.device), final=True)
    dataset = tuned.kind.eval_dataset(split, setting.images, MAX_PIXELS)
    examples = None
    if setting.out is not None and setting.out.suffix.lower() == ".png":
        examples = Examples(tuned.kind, setting.images)
    for batch, images in setting.batches(split, dataset=dataset):
        assert batch.targets is not None
        outputs = tuned.kind.infer(tuned.model, images, setting.images)
        losses = measurement.update(outputs, batch.targets_on(setting.device))
        if examples is not None:
            examples.add(batch, images, outputs, losses)
    measurement.compute()
    result = measurement.result()
    result |= {
        "task": tuned.kind.task,
        "unreadable": len(setting.skipped),
        "skipped": [{"path": name, "reason": reason} for name, reason in setting.skipped],
        "split": name,
        "held_out": held_out,
        "weights": str(tuned.folder),
    }
    print_result(result, config.json, show, lambda result: _print_table(result, measurement))
    if setting.out is not None:
        worst = examples and draw_predictions(tuned.kind, examples.worst(), "highest loss")
        write_scores(measurement, worst, setting.out)
        write_skipped(setting.skipped, setting.out)
    return result


def write_scores(measurement: Measurement, worst: Any, out: Path) -> None:
    """Write scores as a table (.csv) or, above the figure `worst`, as a figure (.png), atomically.

    Raises:
        RunError: it could not be written.
    """
    with out_file(out) as path:
        if out.suffix.lower() == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(measurement.rows())
        else:
            below([measurement.draw(), worst]).save(path, format="PNG")
    _log.info("scores: %s", out)


def _print_table(result: dict[str, Any], measurement: Measurement) -> None:
    each, total = measurement.each(), measurement.total()
    title = "the images that it held out" if result["held_out"] else result["split"]
    rows = [(name, *map(_cell, scores.values())) for name, scores in each.items()]
    if len(rows) > MOST_ROWS:
        key = next(iter(each[rows[0][0]]))
        worst = sorted(rows, key=lambda row: each[row[0]][key] or 0.0)
        rows = worst[:MOST_ROWS]
        title += f"; the lowest {MOST_ROWS} of {len(each)}, --json has all"
    if absent := len(result.get("not_measured", [])):
        title += f"; {absent} of {len(each)} classes not measured"
    if (best := total.pop("top5_of", None)) not in (None, 5):
        total = {f"top-{best} %" if key == "top5" else key: total[key] for key in total}
    last = [(f"all: {HEADINGS.get(key, key)}", _cell(value)) for key, value in total.items()]
    heads = [HEADINGS.get(key, key) for key in next(iter(each.values()))]
    print_table(("", *heads), [*rows, (), *last], f"{result['weights']} on {title}")


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
