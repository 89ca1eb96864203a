"""`fcmae probe --curve`: the score over the number of labels, and what more labels would bring.

The error of a classifier falls roughly as a power of the number n of its labels (Hestness et al.,
arXiv 1712.00409): error = b · n^-c, fitted to the largest sets of labels by least squares in the
logarithms, weighted by how the sets of one size scatter. A constant added to the law forecasts
worse (docs/evaluation.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fcmae import rng
from fcmae.console import tracked
from fcmae.inspect.prologue import print_table
from sparse.errors import InputError

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

PER_CLASS = (1, 2, 5)
"""Labels per class, times 1, 10, 100, …"""

DRAWS = 5
"""Sets of labels of each size."""

FITTED = 5
"""Largest sizes that the power law is fitted to."""

MISFIT = 0.01
"""Standard deviation of the error around the power law, besides the scatter of the sets."""

LEAST = 1e-3
"""Smallest error that is fitted: that of 0 has no logarithm."""

TIMES = (2, 4)
"""Forecasts, in multiples of the labels."""

TOO_WIDE = 15.0
"""Width in points of an interval that says nothing."""

_Z90 = 1.644854


class Curve(NamedTuple):
    """The share of errors over the number of labels.

    Attributes:
        sizes: numbers of labels (S,), ascending; the last is all.
        errors: of each draw (D, S); of all labels that of the first draw, else NaN.
    """

    sizes: Sequence[int]
    errors: Floats

    def mean(self) -> Floats:
        """Mean error of each size (S,)."""
        return np.nanmean(self.errors, 0)

    def scatter(self) -> Floats:
        """Standard deviation of the error between sets of one size (S,).

        All labels are one set: it counts as scattered as those of the size before.
        """
        fewer = np.std(self.errors[:, :-1], 0, ddof=1)
        return np.append(fewer, fewer[-1])


class PowerLaw(NamedTuple):
    """error = b · n^-c.

    Attributes:
        law: logarithm of b, and c (2,).
        covariance: of both (2, 2).
        scatter: standard deviation of the error between sets of labels, at the largest size.
        misfit: weighted mean square of the residuals, 1 if they are as large as expected.
    """

    law: Floats
    covariance: Floats
    scatter: float
    misfit: float

    def forecast(self, labels: int) -> tuple[float, float, float]:
        """Top-1 in percent with `labels` labels, and its 90 % interval for one set of labels."""
        x = np.array([1.0, -math.log(labels)])
        error = min(math.exp(x @ self.law), 1.0)
        half = _Z90 * math.hypot(error * math.sqrt(x @ self.covariance @ x), self.scatter)
        return _percent(error, half)


def fit(curve: Curve) -> PowerLaw | None:
    """Fit the power law to the largest sizes; None with fewer than three."""
    if len(curve.sizes) < 3:
        return None
    last = slice(-FITTED, None)
    sizes, scatter, mean = np.array(curve.sizes)[last], curve.scatter()[last], curve.mean()[last]
    mean = np.maximum(mean, LEAST)
    draws = (~np.isnan(curve.errors)).sum(0)[last]
    weight = mean**2 / (scatter**2 / draws + MISFIT**2)
    x = np.stack([np.ones(len(sizes)), -np.log(sizes)], 1)
    covariance = np.linalg.inv(x.T @ (weight[:, None] * x))
    law = covariance @ x.T @ (weight * np.log(mean))
    misfit = (weight * (np.log(mean) - x @ law) ** 2).sum() / (len(sizes) - 2)
    return PowerLaw(law, covariance * max(1.0, misfit), float(scatter[-1]), float(misfit))


def sizes_of(labels: int, classes: int) -> list[int]:
    """Numbers of labels of a curve: 1, 2, 5, 10, … per class on average, and all.

    The last one before all is at most 80 % of them, so that its sets differ.

    Raises:
        InputError: fewer than two labels per class on average.
    """
    if labels < 2 * classes:
        raise InputError(
            f"curve needs at least two labels per class, and {labels} images of {classes} classes "
            f"are fewer: label {2 * classes} or more"
        )
    steps = [part * 10**power for power in range(len(str(labels))) for part in PER_CLASS]
    return [step * classes for step in steps if step * classes <= 0.8 * labels] + [labels]


def order_of(labels_N: Places, draw: int, seed: int = 0) -> Places:
    """A random order of the images in which every beginning is stratified.

    The first images have one of each class; from then on classes have their shares of all images,
    up to these first ones.
    """
    shuffled = rng.permutation(seed, draw, len(labels_N))
    place = np.empty(len(labels_N))
    for label, count in enumerate(np.bincount(labels_N)):
        place[labels_N[shuffled] == label] = np.arange(count) / max(count, 1)
    return shuffled[np.argsort(place, kind="stable")]


def label_curve(
    labels_N: Places,
    classes: int,
    error_of: Callable[[Places, Places], float],
    all_error: float,
    shown: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Curve:
    """Measure a classifier with fewer labels.

    Args:
        labels_N: classes of the images to learn from.
        classes: number of classes.
        error_of: maps positions of images, and the places in them that are held out to choose
            settings, to the share of errors.
        all_error: share of errors with all labels.
        shown: the name of a progress bar on terminals; None shows none.
        draws: sets of labels of each size; those of one draw contain each other.
        seed: of the draws.

    Raises:
        InputError: there are too few labels, or none of a class.
    """
    sizes = sizes_of(len(labels_N), classes)
    if missing := classes - len(np.unique(labels_N)):
        raise InputError(
            f"curve needs a training image of every class, and {missing} of {classes} classes have "
            "none that can be read: replace their images"
        )
    errors = np.full((draws, len(sizes)), np.nan)
    errors[0, -1] = all_error
    orders = [order_of(labels_N, draw, seed) for draw in range(draws)]
    cells = [(draw, place) for draw in range(draws) for place in range(len(sizes) - 1)]
    for draw, place in tracked(cells, len(cells), shown):
        chosen = orders[draw][: sizes[place]]
        # The first image of each class is fitted; of the others every fourth is held out.
        errors[draw, place] = error_of(chosen, np.arange(classes, len(chosen), 4))
    return Curve(sizes, errors)


def summary(curve: Curve) -> dict[str, Any]:
    """A curve as `fcmae probe --json` gives it: `points`, `fit` and `forecast`.

    Intervals are 90 %, of one set of labels measured on the same images.
    """
    draws = (~np.isnan(curve.errors)).sum(0).tolist()
    spread = zip(curve.sizes, draws, curve.mean(), _Z90 * curve.scatter(), strict=True)
    points = [
        {"labels": size, "draws": count, **_named(_percent(error, half))}
        for size, count, error, half in spread
    ]
    law = fit(curve)
    if law is None:
        return {"points": points, "fit": None, "forecast": []}
    forecast = []
    for labels in (times * curve.sizes[-1] for times in TIMES):
        found = _named(law.forecast(labels))
        certain = found["high"] - found["low"] <= TOO_WIDE
        forecast.append({"labels": labels, **found, "certain": certain})
    c_std = math.sqrt(law.covariance[1, 1])
    return {
        "points": points,
        "fit": {"b": math.exp(law.law[0]), "c": float(law.law[1]), "c_std": c_std},
        "forecast": forecast,
    }


def print_curves(curves: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Print top-1 by the number of labels, measured and forecast.

    Args:
        curves: the `summary` of each kind of features, and `chance`.
        names: headings by kind.
    """
    shown = {name: curves[kind] for kind, name in names.items() if kind in curves}
    rows: list[list[str]] = []
    for part, note in (("points", ""), ("forecast", " (forecast)")):
        for row in zip(*(curve[part] for curve in shown.values()), strict=True):
            rows.append([f"{row[0]['labels']}{note}", *map(_cell, row)])
        rows.append([])
    title = f"linear probe, top-1 % and 90 % interval; chance {curves['chance']:.1f}"
    print_table(("labels", *shown), rows[:-1], title)


def _cell(entry: dict[str, Any]) -> str:
    if not entry.get("certain", True):
        return "can't tell"
    return "{top1:.1f} ({low:.1f}–{high:.1f})".format(**entry)


def _percent(error: float, half: float) -> tuple[float, float, float]:
    """Top-1, and the ends of its interval, in percent."""
    low, high = max(1 - error - half, 0.0), min(1 - error + half, 1.0)
    return 100 * (1 - float(error)), 100 * float(low), 100 * float(high)


def _named(score: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("top1", "low", "high"), score, strict=True))
