"""What frozen features are worth: nearest neighbours and a linear classifier on a labelled folder.

Nearest neighbours vote with weight exp(cosine / 0.07) (Wu et al., arXiv 1805.01978, section 3.4).
The linear probe is multinomial logistic regression on standardised features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcmae.config.values import MAX_PIXELS
from fcmae.console import tracked
from fcmae.data.labelled import LabelledData, split_by_hash
from fcmae.inspect.features import extract
from fcmae.train.processes import ALONE, World
from fcmae.weights.load import Backbone
from sparse.errors import RunError

TEMPERATURE = 0.07
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Weight penalties tried, strongest first."""

KEPT_BACK = 0.2
"""Share of the training images that decides between them."""

_Z95 = 1.959964
_AT_ONCE = 1 << 24
_CPU = torch.device("cpu")


class NothingToRead(RunError):
    """No image of a split can be read."""


class Labelled(NamedTuple):
    """Features (N, C) and classes (N,) of the images to learn from and of those to measure on.

    chosen: places among the training images that decide on the penalty; maybe none.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    classes: int
    chosen: Tensor


def labelled_features(
    backbone: Backbone,
    data: LabelledData,
    batch_size: int,
    workers: int,
    world: World = ALONE,
    stop: Callable[[], bool] = lambda: False,
    shown: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Labelled, list[tuple[str, str]]]:
    """Extract the features of a labelled folder; also returns what could not be read.

    Args:
        backbone: the encoder.
        data: the labelled images.
        batch_size, workers, world, stop, max_pixels: see `fcmae.inspect.features.extract`.
        shown: with progress bars, on terminals.

    Raises:
        Interrupted: `stop()` turned true.
        NothingToRead: nothing to learn from, or to measure on.
        RunError: a process that reads images died.
    """
    parts, labels, bad = [], [], []
    for split, what in ((data.train, "train"), (data.val, "val")):
        found = extract(
            backbone, split, batch_size, workers, world, stop,
            f"features of {what}" if shown else None, max_pixels,
        )  # fmt: skip
        bad += found.bad
        if not len(found.indices):
            name, reason = found.bad[0]
            raise NothingToRead(
                f"none of the {len(found.bad)} images can be read ({name}: {reason})"
            )
        parts.append(found)
        assert split.labels is not None
        labels.append(torch.from_numpy(split.labels[found.indices]))
    read = data.train.source.select(parts[0].indices)
    chosen = torch.empty(0, dtype=torch.int64)
    if int(torch.bincount(labels[0]).max()) > 1:
        chosen = torch.from_numpy(split_by_hash(read, labels[0].numpy(), KEPT_BACK)[1])
    names = len(data.names)
    return Labelled(parts[0].values, labels[0], parts[1].values, labels[1], names, chosen), bad


def measure(
    features: Labelled, neighbours: Sequence[int], device: torch.device = _CPU, shown: bool = False
) -> dict[str, dict[str, float]]:
    """Top-1 in percent with its 95 % interval, of `knnK` for each K and of `linear`.

    `linear` also has the penalty that was chosen.

    Args:
        features: of the images to learn from and to measure on.
        neighbours: each K.
        device: where the linear probe is fitted.
        shown: with a progress bar, on terminals.
    """
    result = {}
    guesses = knn(features.train, features.train_labels, features.val, neighbours, features.classes)
    for k, guess in zip(neighbours, guesses, strict=True):
        result[f"knn{k}"] = _score(guess, features.val_labels)
    guess, penalty = linear_probe(features, device, shown)
    result["linear"] = {**_score(guess, features.val_labels), "penalty": penalty}
    return result


def knn(
    train_NC: Tensor, labels_N: Tensor, val_MC: Tensor, neighbours: Sequence[int], classes: int
) -> list[Tensor]:
    """Classes (M,) by the K training images of the largest cosine, for each K in `neighbours`."""
    most = min(max(neighbours), len(train_NC))
    # In double: where features share a large offset, their cosines are all next to 1.
    train = F.normalize(train_NC.double(), dim=1)
    guesses: list[list[Tensor]] = [[] for _ in neighbours]
    for some in F.normalize(val_MC.double(), dim=1).split(_rows(len(train) + classes)):
        near = (some @ train.T).topk(most)
        weights, voted = (near.values / TEMPERATURE).exp(), labels_N[near.indices]
        for k, into in zip(neighbours, guesses, strict=True):
            votes = near.values.new_zeros(len(some), classes)
            into.append(votes.scatter_add_(1, voted[:, :k], weights[:, :k]).argmax(1))
    return [torch.cat(parts) for parts in guesses]


def linear_probe(
    features: Labelled, device: torch.device = _CPU, shown: bool = False
) -> tuple[Tensor, float]:
    """Classes (M,) of a linear classifier, and the weight penalty it was fitted with.

    The penalty is the one with the lowest loss on a fifth of the training images, the first that
    the next weaker one does not better; or 0.01 where every class has a single image.
    """
    std, mean = torch.std_mean(features.train, dim=0, correction=0)
    scale = torch.where(std > 0, 1 / std, 0.0)
    train, val = (((part - mean) * scale).to(device) for part in (features.train, features.val))
    labels, classes = features.train_labels.to(device), features.classes
    penalty, best = 0.01, None
    if len(features.chosen):
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[features.chosen] = False
        fitted, held = (train[kept], labels[kept]), (train[~kept], labels[~kept])
        least = math.inf
        what = "linear probe" if shown else None
        for candidate in tracked(PENALTIES, len(PENALTIES), what):
            found = fit_linear(*fitted, classes, candidate, best)
            loss = _cross_entropy(*held, *found)
            if loss >= least:
                break
            penalty, best, least = candidate, found, loss
    weight, bias = fit_linear(train, labels, classes, penalty, best)
    guesses = [torch.addmm(bias, some, weight).argmax(1) for some in val.split(_rows(classes))]
    return torch.cat(guesses).cpu(), penalty


def fit_linear(
    x_NC: Tensor, labels_N: Tensor, classes: int, penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Minimise mean cross-entropy + penalty / 2 · |W|² by L-BFGS → W (C, classes), b (classes,)."""
    weight, bias = start or (x_NC.new_zeros(x_NC.shape[1], classes), x_NC.new_zeros(classes))
    weight, bias = (t.clone().requires_grad_() for t in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-9, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        shrinkage = penalty / 2 * weight.square().sum()
        shrinkage.backward()
        return shrinkage.item() + _cross_entropy(x_NC, labels_N, weight, bias, backward=True)

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def _cross_entropy(
    x_NC: Tensor, labels_N: Tensor, weight: Tensor, bias: Tensor, backward: bool = False
) -> float:
    """The mean; a million images of a thousand classes have 4 GB of logits: some at a time."""
    rows = _rows(weight.shape[1])
    mean = 0.0
    for x, labels in zip(x_NC.split(rows), labels_N.split(rows), strict=True):
        logits = torch.addmm(bias, x, weight)
        part = F.cross_entropy(logits, labels, reduction="sum") / len(x_NC)
        if backward:
            part.backward()
        mean += part.item()
    return mean


def _rows(columns: int) -> int:
    return max(1, _AT_ONCE // columns)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, in percent."""
    share, square = hits / n, _Z95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return 100 * (middle - half), 100 * (middle + half)


def _score(guess: Tensor, labels: Tensor) -> dict[str, Any]:
    hits, n = int((guess == labels).sum()), len(labels)
    low, high = wilson(hits, n)
    return {"top1": 100 * hits / n, "low": max(low, 0.0), "high": min(high, 100.0)}
