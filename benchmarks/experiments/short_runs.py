"""Is the default fine-tuning recipe safe in short runs? Many seeds of few epochs, and the worst.

    python -m benchmarks.experiments.short_runs --data FOLDER --share 20

FOLDER has train and val. Pretraining uses all training images, fine-tuning SHARE percent of them. A
run is at chance if its top-1 on val is that of always answering the most frequent class, within one
standard error. All runs are trained in this process, one after the other: starting a process takes
as long as a short run. `--recipes before` uses the former default warm-up, a tenth of the steps;
`clipped` also clips gradients.
"""

from __future__ import annotations

import logging
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.experiments.folders import label_share, shrink, with_test
from benchmarks.experiments.study import Study, arguments, logged
from fcmae.config.parsing import parse
from fcmae.data.labelled import at_chance, find_classes, labels_of, majority_share
from finetune.config import FinetuneConfig
from finetune.train import finetune

LENGTHS = (3, 10)
STARTS = ("pretrained", "scratch")
RECIPES = ("defaults", "before", "clipped")
"""The defaults; the former defaults; and the former defaults with clipped gradients."""


def main() -> int:
    parser = arguments(__doc__ or "", "short_runs", img_size=64, epochs=20, side=80)
    parser.add_argument("--share", type=int, default=20, help="labels, in percent of train")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in epochs")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["defaults"])
    options = parser.parse_args()
    study = Study(options)
    whole = with_test(shrink(options.data, study.out / "pictures", options.side), study.out / "all")
    data = label_share(whole, options.share, study.out / f"labels-{options.share}")
    common = ["--img_size", options.img_size, "--precision", options.precision]
    weights: dict[str, str | Path] = {"scratch": "none"}
    if "pretrained" in options.starts:
        name = f"pretrain-{options.epochs}"
        weights["pretrained"] = study.out / name
        given = ["--epochs", options.epochs, "--engine", "patch", "--picture_epochs", 0]
        study.once(name, lambda: bool(study.pretrain(name, whole / "train", *common, *given)))

    def trained(start: str, epochs: int, recipe: str, seed: int) -> dict[str, float]:
        given = [*common, "--weights", weights[start], "--epochs", epochs, "--seed", seed]
        return one_run(study.out / "run", data, [*given, *changes(recipe, epochs)])

    files, names = find_classes(data / "val")
    labels = labels_of(files, names)
    print(f"always answering the most frequent class: {majority_share(labels):.1f} %\n")
    print("| recipe | start | epochs | seeds | at chance | lowest top-1 % | median | highest |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for recipe, epochs, start in product(options.recipes, options.lengths, options.starts):
        tops = []
        for seed in range(options.seeds):
            step = partial(trained, start, epochs, recipe, seed)
            tops.append(study.once(f"{recipe}/{start}/{epochs}/seed-{seed}", step)["top1"])
        chance = sum(at_chance(top1, labels) for top1 in tops)
        print(
            f"| {recipe} | {start} | {epochs} | {len(tops)} | {chance} | "
            f"{min(tops):.1f} | {median(tops):.1f} | {max(tops):.1f} |", flush=True,
        )  # fmt: skip
    return 0


def changes(recipe: str, epochs: int) -> list[object]:
    """Options of `fcmae finetune` that turn the defaults into a recipe."""
    if recipe == "defaults":
        return []
    tenth = ["--optim.warmup_epochs", epochs / 10]
    return [*tenth, "--optim.clip_grad", 1] if recipe == "clipped" else tenth


def one_run(run: Path, data: Path, given: list[Any]) -> dict[str, float]:
    """Top-1 in percent on val of the final weights, averaged and not."""
    shutil.rmtree(run, ignore_errors=True)
    more = ["--workers", 0, "--val_epochs", given[given.index("--epochs") + 1]]
    config = parse(
        FinetuneConfig, [str(x) for x in ["--data", data, "--out", run, *more, *given]], ""
    )
    assert config is not None
    if finetune(config):
        raise KeyboardInterrupt
    (last,) = logged(run, "ema_top1")
    return {"top1": last["ema_top1"], "top1_model": last["val_top1"]}


if __name__ == "__main__":
    logging.disable(logging.INFO)
    raise SystemExit(main())
