"""Does pretraining pay? Fine-tuning after FCMAE against from scratch, with few and many labels.

Both sides get the same search, each for its own best learning rate and length, judged on val with
one seed: rates a factor of two apart at the shorter length until neither neighbour of the best is
better, then the best and half of it at the longer. The best of all runs with further seeds, and
test is measured.

    python -m benchmarks.experiments.label_shares --data FOLDER

FOLDER has train and val, and test, else half of val is kept for it. Everything of train is
pretrained on, without labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.study import (
    Study,
    arguments,
    label_share,
    logged,
    plot,
    shrink,
    with_test,
)

SHARES = (10, 30, 100)
RATES = (8e-3, 1.6e-2, 3.2e-2)
"""Where the search begins: base_lr, for a batch of 256."""
EPOCHS = {10: (60, 150), 30: (30, 60), 100: (12, 24)}
SEEDS = (0, 1, 2)
SIDES = ("pretrained", "scratch")


def main() -> int:
    parser = arguments(__doc__ or "", "label_shares")
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=300, help="of pretraining")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the copies read")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    options = parser.parse_args()
    study = Study(options)
    data = shrink(options.data, study.out / "pictures", options.side)
    data = with_test(data, study.out / "splits")
    common = ["--img_size", options.img_size, "--precision", options.precision]
    name = f"pretrain-{options.epochs}"

    def pretrained() -> Path:
        weights = study.pretrain(
            name, data / "train", *common, "--epochs", options.epochs,
            "--probe.data", data, "--probe.epochs", max(1, options.epochs // 5),
        )  # fmt: skip
        study.once(
            f"probe/{options.epochs}",
            lambda: study.probe(weights, data, "--baseline", "--near_duplicates", data / "train"),
        )
        return weights

    labelled = {
        share: label_share(data, share, study.out / f"labels-{share}") for share in options.shares
    }

    def side(side: str, share: int) -> dict[str, Any]:
        given = ["--model", "atto", "--weights", weights.result() if side == SIDES[0] else "none"]
        place = f"{share}/{name if side == SIDES[0] else side}"
        return _side(study, place, EPOCHS[share], labelled[share], [*common, *given])

    with study.pool() as pool:
        if SIDES[0] in options.sides:
            weights = pool.submit(pretrained)
        order = [(name, share) for share in options.shares for name in reversed(options.sides)]
        found = {key: pool.submit(side, *key) for key in order}
        table = {
            share: {name: found[name, share].result() for name in options.sides}
            for share in options.shares
        }
    _show(study, table)
    if SIDES[0] in options.sides:
        _show_frozen(study, weights.result())
    return 0


def _side(
    study: Study, place: str, epochs: tuple[int, int], data: Path, common: list[Any]
) -> dict[str, Any]:
    """Search, then repeat the best; returns its settings and top-1 of all seeds."""

    def tried(rate: float, epochs: int, seed: int = SEEDS[0]) -> dict[str, float]:
        name = f"{place}/rate-{rate:g}-epochs-{epochs}-seed-{seed}"
        given = [
            "--optim.base_lr", rate, "--epochs", epochs, "--seed", seed,
            "--val_epochs", max(1, epochs // 10),
        ]  # fmt: skip
        found: dict[str, float] = study.once(
            name, lambda: study.finetune(f"runs/{name}", data, *common, *given)
        )
        return found

    short, long = epochs
    values = {rate: tried(rate, short)["val"] for rate in RATES}
    while (best := max(values, key=lambda rate: values[rate])) in (min(values), max(values)):
        rate = best / 2 if best == min(values) else best * 2
        values[rate] = tried(rate, short)["val"]
    cells = {(rate, short): value for rate, value in values.items()}
    cells |= {(rate, long): tried(rate, long)["val"] for rate in (best, best / 2)}
    rate, length = max(cells, key=lambda cell: cells[cell])
    seeds = [tried(rate, length, seed) for seed in SEEDS]
    return {
        "rate": rate,
        "epochs": length,
        **{split: [found[split] for found in seeds] for split in ("val", "test")},
    }


def _show(study: Study, table: dict[int, dict[str, Any]]) -> None:
    print("| labels | | rate, epochs | val top-1 % | test top-1 % | gain on test |")
    print("|---|---|---|---:|---:|---:|")
    lines = []
    for share, sides in table.items():
        for side, found in sides.items():
            val, test = (
                f"{np.mean(found[split]):.1f} ± {np.std(found[split], ddof=1):.1f}"
                for split in ("val", "test")
            )
            gain = (
                np.mean(found["test"]) - np.mean(sides[SIDES[1]]["test"]) if len(sides) > 1 else 0
            )
            shown = f"{gain:+.1f}" if gain else ""
            print(
                f"| {share} % | {side} | {found['rate']:g}, {found['epochs']} | {val} | {test} | "
                f"{shown} |"
            )
    for side in next(iter(table.values())):
        tests = [sides[side]["test"] for sides in table.values()]
        means, spread = np.mean(tests, axis=1), np.std(tests, axis=1, ddof=1)
        lines.append((side, [*table], means.tolist(), spread.tolist()))
    plot(lines, ("labels, % of train", "test top-1 %"), study.out / "label_shares.png", log_x=True)


def _show_frozen(study: Study, weights: Path) -> None:
    curves = []
    for key in ("probe_knn5", "probe_knn20", "probe_linear"):
        found = logged(weights, key)
        epochs, values = ([entry[name] for entry in found] for name in ("epoch", key))
        curves.append((key.removeprefix("probe_"), epochs, values, None))
    plot(curves, ("epochs of pretraining", "val top-1 %"), study.out / "frozen_features.png")


if __name__ == "__main__":
    raise SystemExit(main())
