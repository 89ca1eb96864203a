"""Do the forecasts of `fcmae probe --curve` hold? From half and a quarter of the labels to all.

For every folder and kind of features, several stratified halves and quarters of the training labels
each give a curve and a forecast, which is compared with the score measured with twice and four
times as many. The same curves are also fitted with a constant, error = a + b · n^-c.

    python -m benchmarks.experiments.forecasts --data FOLDER… [--weights RUN]

A FOLDER has train/CLASS and val/CLASS. Without --weights there are the controls alone: random
weights of an atto and histograms.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.experiments.study import Study
from fcmae.commands.probe import ProbeConfig
from fcmae.data.labelled import find_labelled
from fcmae.inspect.label_curve import TOO_WIDE, Curve, fit, order_of
from fcmae.inspect.probing import (
    CONTROLS,
    PRETRAINED,
    Labelled,
    curve_of,
    features_by_kind,
    linear_probe,
)
from fcmae.inspect.prologue import set_up
from fcmae.weights.load import load_backbone
from sparse import SparseConvNeXtV2

PARTS = (2, 4)
"""A half and a quarter of the labels."""

CONSTANTS = np.linspace(0, 0.98, 50)
"""Values of the constant to try, as shares of the smallest error."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--out", type=Path, default=Path("build/experiments/forecasts"))
    parser.add_argument("--img_size", type=int, default=96)
    parser.add_argument("--draws", type=int, default=5, help="halves, and quarters, of each folder")
    options = parser.parse_args()
    study = Study(argparse.Namespace(**vars(options), jobs=1, compile=False))
    kinds = [PRETRAINED, *CONTROLS] if options.weights else [*CONTROLS]

    def case(folder: Path, kind: str, part: int, draw: int) -> dict[str, Any]:
        return _case(_load(study, options, folder, kind), part, draw)

    cases = {
        f"{folder.name}, {kind}": [
            study.once(f"{folder.name}/{kind}/{p}/{draw}", partial(case, folder, kind, p, draw))
            for p in PARTS
            for draw in range(options.draws)
        ]
        for folder in options.data
        for kind in kinds
    }
    _show(cases)
    return 0


def _load(study: Study, options: argparse.Namespace, folder: Path, kind: str) -> Labelled:
    """Features of a folder, computed once."""
    file = study.out / f"{folder.name}.pt"
    if not file.exists():
        weights = options.weights
        if weights is None:
            weights = study.out / "random.safetensors"
            save_file(SparseConvNeXtV2.from_size("atto", engine="dense").state_dict(), weights)
        config = ProbeConfig(str(weights), str(folder), baseline=True, img_size=options.img_size)
        setting = set_up(config, config.source, load_backbone)
        found = features_by_kind(setting, find_labelled(config.data, 0))
        torch.save({name: features._asdict() for name, features in found.items()}, file)
    return Labelled(**torch.load(file, weights_only=True)[kind])


def _case(features: Labelled, part: int, draw: int) -> dict[str, Any]:
    """The curve of a share of the labels, and the scores measured with more."""
    order = torch.from_numpy(order_of(features.train_labels.numpy(), draw, seed=part))

    def few(count: int) -> Labelled:
        chosen = order[:count].sort().values
        parts = (features.train[chosen], features.train_labels[chosen], features.held[chosen])
        return features._replace(train=parts[0], train_labels=parts[1], held=parts[2])

    def top1(some: Labelled) -> float:
        return 100 * float((linear_probe(some)[0] == some.val_labels).float().mean())

    given = few(len(order) // part)
    curve = curve_of(given, top1(given))
    errors = [[None if np.isnan(e) else e for e in row] for row in curve.errors.tolist()]
    measured = {
        str(times): top1(few(times * (len(order) // part))) for times in PARTS if times <= part
    }
    return {"sizes": [*curve.sizes], "errors": errors, "measured": measured}


def _show(cases: dict[str, list[dict[str, Any]]]) -> None:
    print(
        "| | labels × | cases | inside | within 15 points | half width | off by | with a constant |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    every = [case for found in cases.values() for case in found]
    for name, found in {**cases, "all": every}.items():
        for times in PARTS:
            rows = [
                _compare(case, times, case["measured"][str(times)])
                for case in found
                if str(times) in case["measured"]
            ]
            inside, width, off, constant = np.array(rows).T
            certain = width <= TOO_WIDE
            print(
                f"| {name} | {times} | {len(rows)} | {100 * inside[certain].mean():.0f} % "
                f"| {100 * certain.mean():.0f} % | {np.median(width) / 2:.1f} | {off.mean():.1f} "
                f"| {constant.mean():.1f} |"
            )


def _compare(case: dict[str, Any], times: int, measured: float) -> tuple[float, ...]:
    """Whether the score is in the interval, its width, and how far the forecasts are off."""
    curve = Curve(case["sizes"], np.array(case["errors"], np.float64))
    labels = times * curve.sizes[-1]
    law = fit(curve)
    assert law is not None
    top1, low, high = law.forecast(labels)
    other = _with_constant(curve, labels)
    return low <= measured <= high, high - low, abs(top1 - measured), abs(other - measured)


def _with_constant(curve: Curve, labels: int) -> float:
    """Top-1 in percent by error = a + b · n^-c, with the a that fits best."""
    tried = []
    for constant in CONSTANTS * curve.mean().min():
        law = fit(curve._replace(errors=curve.errors - constant))
        assert law is not None
        tried.append((law.misfit, law.forecast(labels)[0] - 100 * constant))
    return min(tried)[1]


if __name__ == "__main__":
    raise SystemExit(main())
