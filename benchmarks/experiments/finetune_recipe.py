"""A search for the fine-tuning recipe with few labels: one change at a time, from given weights.

    python -m benchmarks.experiments.finetune_recipe --data FOLDER --weights RUN

FOLDER is a folder of classes: use train, never val or test. A tenth of it is used for training, the
rest to evaluate the final weights (averaged, if averaging is on): no choice depends on it. RUN is a
pretraining run, or `none` for training from scratch, with another --out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.experiments.folders import shrink, tenth
from benchmarks.experiments.study import Study, arguments

CHANGES: dict[str, list[object]] = {
    "the defaults": [],
    "rate 8e-3": ["--optim.base_lr", 8e-3],
    "rate 3.2e-2": ["--optim.base_lr", 3.2e-2],
    "layer decay 0.9": ["--optim.layer_decay", 0.9],
    "layer decay 0.75": ["--optim.layer_decay", 0.75],
    "no average of the weights": ["--ema_decay", "null"],
    "a shorter average, 0.99": ["--ema_decay", 0.99],
    "no drop path": ["--drop_path", 0],
    "drop path 0.2": ["--drop_path", 0.2],
    "crops from 8 %": ["--augment.crop_scale", "[0.08,1]"],
    "crops from 60 %": ["--augment.crop_scale", "[0.6,1]"],
    "no label smoothing": ["--augment.label_smoothing", 0],
    "weight decay 0.3": ["--optim.weight_decay", 0.3],
    "mixup 0.2": ["--augment.mixup", 0.2],
    "random erasing 0.25": ["--augment.random_erasing", 0.25],
    "colour jitter 0.3": ["--augment.color_jitter", 0.3],
    "batches of 16": ["--batch_size", 16],
    "head not scaled down": ["--head_init_scale", 1],
}


def main() -> int:
    parser = arguments(__doc__ or "", "finetune_recipe", img_size=128, epochs=60, side=256)
    parser.add_argument("--weights", type=Path, required=True, help="a pretraining run")
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    options = parser.parse_args()
    study = Study(options)
    data = shrink(options.data, study.out / "pictures", options.side)
    labelled = tenth(data, study.out / "tenth")
    common = [
        "--img_size", options.img_size, "--precision", options.precision,
        "--weights", options.weights, "--epochs", options.epochs, "--val_epochs", options.epochs,
    ]  # fmt: skip

    def tried(name: str) -> float:
        return study.finetune(f"runs/{name}", labelled, *common, *CHANGES[name])["val"]

    steps = {name: partial(study.once, name, partial(tried, name)) for name in options.only}
    print("| | top-1 % |")
    print("|---|---:|")
    for name, top1 in study.together(steps).items():
        print(f"| {name} | {top1:.1f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
