"""Does pretraining pay off? Fine-tuning after FCMAE against from scratch, with few and many labels.

Both sides get the same search, each for its own best learning rate and length on val with one seed:
rates a factor of two apart at the shortest length until neither neighbour of the best is better,
then the best at longer lengths while they are better. The best setting runs with further seeds, and
is evaluated on test and on the training images whose labels it has not seen: these are many more,
so a point is distinguishable from chance, but pretraining has seen them, without labels. With all
labels one run of each side at twice the longest length shows the effect of longer training.

    python -m benchmarks.experiments.label_shares --data FOLDER

FOLDER has train, val and optionally test; without test, half of val is used for it. Pretraining
uses all of train, without labels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.folders import label_share, shrink, with_test
from benchmarks.experiments.study import JUDGES, Study, arguments, curve, plot, tune

SHARES = (10, 30, 100)
RATES = (8e-3, 1.6e-2, 3.2e-2)
"""First rates of the search: base_lr, for a batch of 256."""
EPOCHS = {10: (60, 150), 30: (20, 40, 80), 100: (6, 12, 24)}
BEYOND = {100: 48}
"""A length that is run with one seed, to extend the curve over the lengths."""
SEEDS = (0, 1, 2)
SIDES = ("pretrained", "scratch")
FROZEN = {"probe_knn5": "5 nearest", "probe_knn20": "20 nearest", "probe_linear": "linear"}


def main() -> int:
    parser = arguments(__doc__ or "", "label_shares", img_size=128, epochs=200, side=256)
    parser.add_argument("--batch_size", type=int, default=64, help="of pretraining")
    parser.add_argument("--shares", type=int, nargs="+", choices=SHARES, default=SHARES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    options = parser.parse_args()
    study = Study(options, named=["epochs"])
    data = shrink(options.data, study.out / "pictures", options.side)
    data = with_test(data, study.out / "splits")
    common = ["--img_size", options.img_size, "--precision", options.precision]

    labelled = {
        share: label_share(data, share, study.out / f"labels-{share}") for share in options.shares
    }

    def tuned(name: str, weights: str | Path) -> dict[int, dict[str, Any]]:
        given = [*common, "--model", "atto", "--weights", weights]
        return study.together(
            {
                share: partial(_side, study, f"{share}/{name}", share, folder, given)
                for share, folder in labelled.items()
            }
        )

    def pretrained() -> dict[int, dict[str, Any]]:
        name = f"pretrain-{options.epochs}"
        weights = study.out / name

        def trained() -> dict[str, list[list[float]]]:
            study.pretrain(
                name, data / "train", *common, "--epochs", options.epochs,
                "--batch_size", options.batch_size, "--probe.data", data,
                "--probe.epochs", max(1, options.epochs // 5),
            )  # fmt: skip
            return {key: curve(weights, key) for key in ("holdout_loss", *FROZEN)}

        curves = study.once(name, trained)
        probed = study.once(
            f"probe/{options.epochs}",
            lambda: study.probe(weights, data, "--baseline", "--near_duplicates", data / "train"),
        )
        _show_frozen(study, curves, probed["random"])
        return tuned(name, weights)

    sides = {"pretrained": pretrained, "scratch": lambda: tuned("scratch", "none")}
    _show(study, study.together({name: sides[name] for name in options.sides}))
    return 0


def _side(study: Study, place: str, share: int, data: Path, common: list[Any]) -> dict[str, Any]:
    """Search, then repeat the best; return its settings and the top-1 of all seeds, and as
    `lengths` the top-1 of the first seed at every length tried."""

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

    best, length, lengths = tune(study, RATES, EPOCHS[share], tried)
    seeds = study.together({seed: partial(tried, best, length, seed) for seed in SEEDS})
    if share in BEYOND:
        lengths[BEYOND[share]] = tried(best, BEYOND[share])
    return {
        "rate": best,
        "epochs": length,
        "lengths": lengths,
        **{
            split: [found[split] for found in seeds.values()]
            for split in JUDGES
            if split in seeds[0]
        },
    }


def _show(study: Study, sides: dict[str, dict[int, dict[str, Any]]]) -> None:
    print("| labels | | rate, epochs | val top-1 % | test top-1 % | rest of train, top-1 % |")
    print("|---|---|---|---:|---:|---:|")
    for share in next(iter(sides.values())):
        for side, shares in sides.items():
            found = shares[share]
            compared = "scratch" in sides and side != "scratch"
            against = sides["scratch"][share] if compared else {}
            scores = [_score(found.get(split), against.get(split)) for split in JUDGES]
            settings = f"{found['rate']:g}, {found['epochs']}"
            print(f"| {share} % | {side} | {settings} | {' | '.join(scores)} |")
    print("\nTop-1 of the first seed, by epochs:\n")
    print("| labels | | epochs | val | test | rest |")
    print("|---|---|---:|---:|---:|---:|")
    for share in next(iter(sides.values())):
        for side, shares in sides.items():
            for epochs, found in shares[share]["lengths"].items():
                tops = (f"{found[split]:.1f}" if split in found else "" for split in JUDGES)
                print(f"| {share} % | {side} | {epochs} | {' | '.join(tops)} |")
    lines = []
    for side, shares in sides.items():
        tests = [found["test"] for found in shares.values()]
        means, spread = np.mean(tests, axis=1), np.std(tests, axis=1, ddof=1)
        lines.append((side, [*shares], means.tolist(), spread.tolist()))
    plot(lines, ("labels, % of train", "test top-1 %"), study.out / "label_shares.png", log_x=True)


def _score(tops: list[float] | None, against: list[float] | None) -> str:
    """Mean and standard deviation over the seeds, and the gain of the mean over `against`."""
    if tops is None:
        return ""
    gain = "" if against is None else f" ({np.mean(tops) - np.mean(against):+.1f})"
    return f"{np.mean(tops):.1f} ± {np.std(tops, ddof=1):.1f}{gain}"


def _show_frozen(study: Study, curves: dict[str, Any], random: dict[str, Any]) -> None:
    """Plot top-1 of frozen features over pretraining, starting from random weights."""
    lines = []
    for key, name in FROZEN.items():
        begin = random[key.removeprefix("probe_")]["top1"]
        epochs, values = zip((0, begin), *curves[key], strict=True)
        lines.append((name, epochs, values, None))
    plot(lines, ("epochs of pretraining", "val top-1 %"), study.out / "frozen_features.png")


if __name__ == "__main__":
    raise SystemExit(main())
