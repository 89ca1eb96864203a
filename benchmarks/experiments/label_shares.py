"""Does pretraining pay? Fine-tuning after FCMAE against from scratch, with few and many labels.

Both sides get the same search, each for its own best learning rate and length, judged on val with
one seed. The best of each then runs with further seeds, and test is measured.

    python -m benchmarks.experiments.label_shares --data FOLDER

FOLDER has train, val and test. Everything of train is pretrained on, without labels.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.study import (
    Study,
    arguments,
    label_share,
    logged,
    plot,
    probe,
    shrink,
)

SHARES = (10, 30, 100)
RATES = (4e-3, 8e-3, 1.6e-2)
EPOCHS = {10: (60, 150), 30: (40, 90), 100: (20, 40)}
SEEDS = (0, 1, 2)
SIDES = ("pretrained", "scratch")


def main() -> int:
    parser = arguments(__doc__ or "", "label_shares")
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=300, help="of pretraining")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the copies read")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES)
    options = parser.parse_args()
    study = Study(options.out)
    data = shrink(options.data, study.out / "pictures", options.side)
    common = ["--img_size", options.img_size, "--precision", options.precision]
    weights = study.pretrain(
        f"pretrain-{options.epochs}", data / "train", *common, "--epochs", options.epochs,
        "--probe.data", data, "--probe.epochs", max(1, options.epochs // 12),
    )  # fmt: skip
    study.once(
        f"probe/{options.epochs}",
        lambda: probe(weights, data, "--baseline", "--near_duplicates", data / "train"),
    )
    common += ["--model", "atto", "--val_epochs", 5]
    table: dict[int, dict[str, Any]] = {}
    for share in options.shares:
        labelled = label_share(data, share, study.out / f"labels-{share}")
        table[share] = {
            side: _side(study, side, share, labelled, weights if side == SIDES[0] else None, common)
            for side in SIDES
        }
    _show(study, table, weights)
    return 0


def _side(
    study: Study, side: str, share: int, labelled: Path, weights: Path | None, common: list[Any]
) -> dict[str, Any]:
    """Search, then repeat the best; returns its settings and top-1 of all seeds."""

    def tried(rate: float, epochs: int, seed: int) -> dict[str, float]:
        name = f"{share}/{side}/rate-{rate:g}-epochs-{epochs}-seed-{seed}"
        given = [
            "--weights", weights or "none", "--optim.base_lr", rate, "--epochs", epochs,
            "--seed", seed,
        ]  # fmt: skip
        found: dict[str, float] = study.once(
            name, lambda: study.finetune(f"runs/{name}", labelled, *common, *given)
        )
        return found

    cells = list(itertools.product(RATES, EPOCHS[share]))
    rate, epochs = max(cells, key=lambda cell: tried(cell[0], cell[1], SEEDS[0])["val"])
    seeds = [tried(rate, epochs, seed) for seed in SEEDS]
    return {
        "rate": rate,
        "epochs": epochs,
        **{split: [found[split] for found in seeds] for split in ("val", "test")},
    }


def _show(study: Study, table: dict[int, dict[str, Any]], weights: Path) -> None:
    print("| labels | | rate, epochs | val top-1 % | test top-1 % | gain on test |")
    print("|---:|---|---|---:|---:|---:|")
    lines = []
    for share, sides in table.items():
        gain = np.mean(sides["pretrained"]["test"]) - np.mean(sides["scratch"]["test"])
        for side, found in sides.items():
            val, test = (
                f"{np.mean(found[split]):.1f} ± {np.std(found[split], ddof=1):.1f}"
                for split in ("val", "test")
            )
            shown = f"{gain:+.1f}" if side == "pretrained" else ""
            print(
                f"| {share} % | {side} | {found['rate']:g}, {found['epochs']} | {val} | {test} | "
                f"{shown} |"
            )
    for side in SIDES:
        tests = [sides[side]["test"] for sides in table.values()]
        means, spread = np.mean(tests, axis=1), np.std(tests, axis=1, ddof=1)
        lines.append((side, [*table], means.tolist(), spread.tolist()))
    plot(lines, ("labels, % of train", "test top-1 %"), study.out / "label_shares.png", log_x=True)
    curves = []
    for key in ("probe_knn5", "probe_knn20", "probe_linear"):
        found = logged(weights, key)
        epochs, values = ([entry[name] for entry in found] for name in ("epoch", key))
        curves.append((key.removeprefix("probe_"), epochs, values, None))
    plot(curves, ("epochs of pretraining", "val top-1 %"), study.out / "frozen_features.png")


if __name__ == "__main__":
    raise SystemExit(main())
