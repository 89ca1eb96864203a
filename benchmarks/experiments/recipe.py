"""A search for the recipe of pretraining on small data: one change at a time, judged by fine-tuning
on a tenth of the labels, and by what the frozen features are worth.

    python -m benchmarks.experiments.recipe --data FOLDER

FOLDER is one of classes, whose labels are used to judge alone: take train, never val or test.
"""

from __future__ import annotations

from functools import partial

from benchmarks.experiments.study import Study, arguments, shrink, tenth

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
    parser = arguments(__doc__ or "", "recipe")
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--side", type=int, default=256, help="shorter side of the copies read")
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES))
    options = parser.parse_args()
    study = Study(options)
    data = shrink(options.data, study.out / "pictures", options.side)
    labelled = tenth(data, study.out / "tenth")
    common = ["--img_size", options.img_size, "--precision", options.precision]

    def tried(name: str) -> dict[str, float]:
        def measured() -> dict[str, float]:
            given = [*common, "--epochs", options.epochs, *CHANGES[name]]
            run = study.pretrain(name, data, *given)
            found: dict[str, float] = study.judged(
                run, data, labelled, options.img_size, options.precision
            )
            return found

        found: dict[str, float] = study.once(name, measured)
        return found

    found = study.together({name: partial(tried, name) for name in options.only})
    print("| | fine-tuned, a tenth of the labels | linear | kNN 20 | held-out loss |")
    print("|---|---:|---:|---:|---:|")
    for name, row in found.items():
        print(
            f"| {name} | {row['tuned']:.1f} | {row['linear']:.1f} | {row['knn20']:.1f} | "
            f"{row['holdout_loss']:.3f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
