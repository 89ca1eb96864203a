"""Other models from scratch and ours after pretraining, with the same fine-tuning recipe.

    python -m benchmarks.experiments.baselines --data FOLDER --weights RUN

FOLDER has train, val and optionally test; RUN is a pretraining run, such as that of label_shares.
Each model searches its own learning rate on val with one seed. Speeds are measured at the end, one
model after the other.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import timm

from benchmarks.experiments.folders import label_share, shrink, with_test
from benchmarks.experiments.study import JUDGES, Study, arguments, search

OURS = "atto"
RATES = (2e-3, 8e-3, 3.2e-2)
"""First rates of the search: base_lr, for a batch of 256."""
ROWS = {
    "pretrained": OURS,
    **{name: name for name in (OURS, "convnext_atto", "resnet50", "swin_tiny_patch4_window7_224")},
}
"""Row name → model; all but the first from scratch."""


def main() -> int:
    parser = arguments(__doc__ or "", "baselines", img_size=128, epochs=20, side=256)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--share", type=int, default=30, help="labels, in percent of train")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    study = Study(options)
    data = with_test(shrink(options.data, study.out / "pictures", options.side), study.out / "all")
    data = label_share(data, options.share, study.out / f"labels-{options.share}")
    common = ["--img_size", options.img_size, "--precision", options.precision, "--val_epochs", 2]

    def tried(row: str, rate: float) -> dict[str, float]:
        weights = options.weights if row == "pretrained" else "none"
        given = [*common, "--model", ROWS[row], "--weights", weights, "--optim.base_lr", rate]
        given += ["--epochs", options.epochs]
        found: dict[str, float] = study.once(
            f"{row}/{rate:g}", lambda: study.finetune(f"runs/{row}-{rate:g}", data, *given)
        )
        return found

    def speed(model: str) -> float:
        given = [*common, "--model", model, "--weights", "none", "--epochs", 2]
        found: float = study.once(
            f"speed/{model}",
            lambda: study.finetune(f"runs/speed-{model}", data, *given)["images_per_s"],
        )
        return found

    def best(row: str) -> dict[str, Any]:
        rate, found = search(study, RATES, partial(tried, row))
        return {"rate": rate, **found}

    rows = study.together({row: partial(best, row) for row in options.only})
    speeds = {row: speed(ROWS[row]) for row in rows}
    print("| model | weights M | images/s | rate | val top-1 % | test top-1 % | rest of train |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row, found in rows.items():
        name = f"{ROWS[row]}, {'pretrained' if row == 'pretrained' else 'from scratch'}"
        tops = (f"{found[split]:.1f}" for split in JUDGES)
        print(
            f"| {name} | {_millions(ROWS[row]):.1f} | {speeds[row]:.0f} | {found['rate']:g} | "
            f"{' | '.join(tops)} |"
        )
    return 0


def _millions(model: str) -> float:
    full = f"convnextv2_{model}" if model == OURS else model
    return sum(p.numel() for p in timm.create_model(full, num_classes=10).parameters()) / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
