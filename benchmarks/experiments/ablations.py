"""The paper's ablations at small scale and, with `--search`, the search for the pretraining recipe
on small data: one change at a time, one seed, a fixed budget, evaluated with frozen features and
with fine-tuning on a tenth of the labels.

    python -m benchmarks.experiments.ablations --data FOLDER [--search]

FOLDER is a folder of classes, whose labels are used only for evaluation: use train, never val or
test. Held-out losses are comparable only for the same target and share of hidden patches.
"""

from __future__ import annotations

from typing import Any

from benchmarks.experiments.judge import NOTHING, compare
from benchmarks.experiments.study import Study, arguments, plot

UNMASKED = "unmasked convolutions"
DEFAULTS = "the defaults"
PAPER: dict[str, list[object]] = {
    DEFAULTS: [],
    "another seed": ["--seed", 1],
    "mask ratio 0.3": ["--mask_ratio", 0.3],
    "mask ratio 0.75": ["--mask_ratio", 0.75],
    "mask ratio 0.8": ["--mask_ratio", 0.8],
    UNMASKED: [],
    "no GRN": ["--use_grn", "false"],
    "ConvNeXt V1 blocks": ["--use_grn", "false", "--layer_scale", 1e-6],
    "V1 blocks, LayerScale from 0.1": ["--use_grn", "false", "--layer_scale", 0.1],
    "decoder of 4 blocks": ["--decoder.depth", 4],
    "pixels as they are": ["--norm_pix_loss", "false"],
}
"""Name → changed options. At 96 px there are 9 patches: ratios of 0.3, 0.6, 0.75 and 0.8 hide 3, 6,
7 and 8 of them, because the number of visible patches is rounded down."""
RECIPE: dict[str, list[object]] = {
    "crops from 8 %": ["--augment.crop_scale", "[0.08,1]"],
    "crops from 50 %": ["--augment.crop_scale", "[0.5,1]"],
    "decoder 128 wide": ["--decoder.dim", 128],
    "decoder 256 wide": ["--decoder.dim", 256],
    "rate 3e-3": ["--optim.base_lr", 3e-3],
    "rate 1.2e-2": ["--optim.base_lr", 1.2e-2],
    "batches of 32": ["--batch_size", 32],
    "weight decay 0.3": ["--optim.weight_decay", 0.3],
    "init 0.02": ["--init", "paper"],
}
RUNS = PAPER | RECIPE


def main() -> int:
    parser = arguments(__doc__ or "", "ablations", img_size=96, epochs=40, side=192)
    parser.add_argument("--search", action="store_true", help="run recipes instead of ablations")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="run only these")
    options = parser.parse_args()
    study = Study(options)
    chosen = options.only or ([DEFAULTS, *RECIPE] if options.search else PAPER)
    runs = {name: ["--engine", "patch", *RUNS[name]] for name in chosen}
    where = {UNMASKED: "benchmarks.experiments.unmasked"}
    _show(study, compare(study, options, runs, lambda name: where.get(name, "fcmae")))
    return 0


def _show(study: Study, results: dict[str, dict[str, Any]]) -> None:
    print("| | tuned | linear | kNN 20 | held-out loss | diversity, mean, least | images/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    lines = []
    for name, found in results.items():
        if name == NOTHING:
            print(f"| {name} | {found['tuned']:.1f} | | | | | |")
            continue
        spread = [*found["diversity"].values()] or [float("nan")]
        print(
            f"| {name} | {found['tuned']:.1f} | {found['linear']:.1f} | {found['knn20']:.1f} | "
            f"{found['holdout_loss']:.3f} | {sum(spread) / len(spread):.3f}, {min(spread):.3f} | "
            f"{found['images_per_s']:.0f} |"
        )
        if name in (DEFAULTS, "no GRN", "ConvNeXt V1 blocks", UNMASKED):
            lines.append((name, range(1, len(spread) + 1), spread, None))
    plot(lines, ("block", "mean cosine distance of channels"), study.out / "diversity.png")


if __name__ == "__main__":
    raise SystemExit(main())
