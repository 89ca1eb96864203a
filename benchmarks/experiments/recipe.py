"""A search for the recipe of pretraining on small data: one change at a time, judged by fine-tuning
on a tenth of the labels, and by what the frozen features are worth.

    python -m benchmarks.experiments.recipe --data FOLDER

FOLDER is one of classes, whose labels are used to judge alone: take train, never val or test.
"""

from __future__ import annotations

from benchmarks.experiments.judge import compare
from benchmarks.experiments.study import Study, arguments

CHANGES: dict[str, list[object]] = {
    "the defaults": [],
    "40 % hidden": ["--mask_ratio", 0.4],
    "75 % hidden": ["--mask_ratio", 0.75],
    "crops from 8 %": ["--augment.crop_scale", "[0.08,1]"],
    "crops from 50 %": ["--augment.crop_scale", "[0.5,1]"],
    "rate 2e-3": ["--optim.base_lr", 2e-3],
    "rate 1.2e-2": ["--optim.base_lr", 1.2e-2],
    "batches of 32": ["--batch_size", 32],
    "decoder 128 wide": ["--decoder.dim", 128],
    "decoder 256 wide": ["--decoder.dim", 256],
    "pixels as they are": ["--norm_pix_loss", "false"],
    "init 0.02": ["--init", "model"],
    "weight decay 0.3": ["--optim.weight_decay", 0.3],
    "twice the epochs": ["--epochs", 50],
    "four times the epochs": ["--epochs", 100],
    "224 px": ["--img_size", 224],
}


def main() -> int:
    parser = arguments(__doc__ or "", "recipe", img_size=128, epochs=25, side=256)
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    options = parser.parse_args()
    runs = {name: CHANGES[name] for name in options.only}
    print("| | fine-tuned, a tenth of the labels | linear | kNN 20 | held-out loss |")
    print("|---|---:|---:|---:|---:|")
    for name, row in compare(Study(options), options, runs).items():
        print(
            f"| {name} | {row['tuned']:.1f} | {row['linear']:.1f} | {row['knn20']:.1f} | "
            f"{row['holdout_loss']:.3f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
