"""`fcmae probe`: the accuracy of frozen features on labelled images.

Nearest neighbours vote with weight exp(cosine / 0.07) (Wu et al., arXiv 1805.01978, section 3.4).
The linear probe is multinomial logistic regression on standardised features.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from fcmae.atomic import out_file
from fcmae.commands.probe import ProbeConfig
from fcmae.console import tracked
from fcmae.data.duplicates import report_duplicates
from fcmae.data.file_list import refuse_to_replace
from fcmae.data.find import find_source
from fcmae.data.labelled import LabelledData, Split, check_known, find_labelled, split_by_hash
from fcmae.data.sample import Batch
from fcmae.data.table import find_in_table, labels_file, read_classes, read_table
from fcmae.inspect import figures
from fcmae.inspect.embedding import collect, pooled
from fcmae.inspect.histogram import histograms, require_skimage
from fcmae.inspect.label_curve import (
    Curve,
    Places,
    label_curve,
    print_curves,
    sizes_of,
    summary,
)
from fcmae.inspect.prologue import Setting, print_result, print_table, set_up
from fcmae.train.processes import ALONE, World
from fcmae.weights.load import Backbone, load_backbone, random_backbone
from sparse import SparseConvNeXtV2
from sparse.errors import InputError, RunError

_log = logging.getLogger(__name__)

TEMPERATURE = 0.07
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Weight penalties to try, strongest first."""

KEPT_BACK = 0.2
"""Share of the training images that chooses between them."""

PRETRAINED = "pretrained"
CONTROLS = {"random": "random weights", "histogram": "histograms"}
"""What pretraining must beat, and the names in tables."""

NAMES = {PRETRAINED: PRETRAINED, **CONTROLS}

TO_TRY = (
    "Try more epochs or more unlabelled images, or an --img_size at which a person recognises the "
    "classes; a frozen network may still be ahead after fine-tuning."
)

_Z95 = 1.959964
_AT_ONCE = 1 << 24


class NothingToRead(RunError):
    """No image of a split can be read."""


class Labelled(NamedTuple):
    """Features (N, C) and classes (N,) of the images to learn from and of those to measure on.

    held: whether a training image is held out to choose the penalty (N,), bool; may be all False.
    bad: (name, reason) of the images that can't be read.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    classes: int
    held: Tensor
    bad: Sequence[tuple[str, str]] = ()


def labelled_features(
    encoder: SparseConvNeXtV2,
    data: LabelledData,
    read: Callable[[Split], Iterable[tuple[Batch, Tensor]]],
    world: World = ALONE,
) -> Labelled:
    """Extract the features of a labelled folder.

    Args:
        encoder: in evaluation mode.
        data: the labelled images.
        read: gives the batches of a split; see `fcmae.inspect.embedding.extract`.
        world: the processes that share the work.

    Raises:
        NothingToRead: no image to learn from, or to measure on.
    """
    return collect_labelled(lambda _, images: pooled(encoder, images), data, read, world)


def collect_labelled(
    describe: Callable[[Batch, Tensor], Tensor],
    data: LabelledData,
    read: Callable[[Split], Iterable[tuple[Batch, Tensor]]],
    world: World = ALONE,
) -> Labelled:
    """As `labelled_features`, of any kind; see `fcmae.inspect.embedding.collect`."""
    parts, labels = [], []
    for split in (data.train, data.val):
        found = collect(describe, read(split), world)
        if not len(found.indices):
            raise NothingToRead(f"none of the images can be read ({': '.join(found.bad[0])})")
        parts.append(found)
        assert split.labels is not None
        labels.append(torch.from_numpy(split.labels[found.indices]))
    train, val = parts
    held = torch.zeros(len(train.indices), dtype=torch.bool)
    if int(torch.bincount(labels[0]).max()) > 1:
        kept = data.train.source.select(train.indices)
        held[split_by_hash(kept, labels[0].numpy(), KEPT_BACK)[1]] = True
    classes, bad = len(data.names), train.bad + val.bad
    return Labelled(train.values, labels[0], val.values, labels[1], classes, held, bad)


def measure(
    features: Labelled,
    neighbours: Sequence[int],
    device: torch.device | str = "cpu",
    shown: bool = False,
) -> dict[str, dict[str, float]]:
    """Top-1 in percent with its 95 % interval, of `knnK` for each K and of `linear`.

    `linear` also has the chosen penalty.

    Args:
        features: of the images to learn from and to measure on.
        neighbours: each K.
        device: where the linear probe is fitted.
        shown: show a progress bar on terminals.
    """
    labels = features.val_labels
    guesses = knn(features.train, features.train_labels, features.val, neighbours, features.classes)
    scores = {f"knn{k}": _score(each, labels) for k, each in zip(neighbours, guesses, strict=True)}
    guess, penalty = linear_probe(features, device, shown)
    return {**scores, "linear": {**_score(guess, labels), "penalty": penalty}}


def knn(
    train_NC: Tensor, labels_N: Tensor, val_MC: Tensor, neighbours: Sequence[int], classes: int
) -> list[Tensor]:
    """Classes (M,) by the K training images of the largest cosine, for each K in `neighbours`."""
    most = min(max(neighbours), len(train_NC))
    # In double: if features share a large offset, all their cosines are close to 1.
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
    features: Labelled, device: torch.device | str = "cpu", shown: bool = False
) -> tuple[Tensor, float]:
    """Classes (M,) of a linear classifier, and the weight penalty it was fitted with.

    The penalty has the lowest loss on a fifth of the training images: the search stops at the first
    that the next weaker one does not improve. It is 0.01 if every class has a single image.
    """
    std, mean = torch.std_mean(features.train, dim=0, correction=0)
    scale = torch.where(std > 0, 1 / std, 0.0)
    train, val = (((part - mean) * scale).to(device) for part in (features.train, features.val))
    labels, classes = features.train_labels.to(device), features.classes
    penalty, best, least = 0.01, None, math.inf
    if features.held.any():
        fitted, held = ((train[part], labels[part]) for part in (~features.held, features.held))
        for candidate in tracked(PENALTIES, len(PENALTIES), "linear probe" if shown else None):
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
    """The mean, in parts: a million images of a thousand classes have 4 GB of logits."""
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


def _score(guess: Tensor, labels: Tensor) -> dict[str, float]:
    hits, n = int((guess == labels).sum()), len(labels)
    low, high = wilson(hits, n)
    return {"top1": 100 * hits / n, "low": max(low, 0.0), "high": min(high, 100.0)}


def probe(config: ProbeConfig, show: bool = True) -> dict[str, Any]:
    """Measure frozen features, and print a table, or with `config.json` one JSON object.

    Args:
        config: what was asked for.
        show: False prints nothing.

    Returns:
        For each of `knn5`, `knn20` (or other `neighbours`) and `linear`: `top1` in percent and its
        95 % interval, `low` to `high`; of `linear` also its `penalty`. With `baseline`, the same
        for random weights, `random`, and for histograms of colours and gradients, `histogram`; and
        `advice`, sentences to print if the network does not beat them. With `curve`, the curve of
        each kind of features, see `fcmae.inspect.label_curve.summary`, and the level of `chance`.
        The numbers of images, `train` and `val`, of `classes` and of `unreadable` ones; `weights`,
        `img_size`; `near_duplicates`, where asked for, each
        with `path`, `of` and `bits`.

    Raises:
        InputError: the weights or the data are wrong.
        RunError: no image could be read.
    """
    if config.baseline:
        require_skimage()
    if config.out is not None and not config.curve:
        raise InputError(f"out {config.out!r} is a figure of the curve: add --curve")
    setting = set_up(config, config.source, load_backbone, ".png", ".svg")
    if (file := labels_file(config)) is None:
        data = find_labelled(config.data, config.val_fraction, exclude=config.source)
    else:
        data = find_in_table(read_table(file), config.val_fraction, read_classes)
    for split in (data.train, data.val):
        refuse_to_replace(setting.out, split.source)
    if config.curve:  # before any work
        sizes_of(len(data.train.source), len(data.names))
    names = setting.model.label_names
    if names and not config.other_classes:
        try:
            check_known(
                Path(config.labels or config.data), data.names, names, "the fine-tuned model"
            )
        except InputError as error:
            raise InputError(f"{error}; to probe on other classes, use --other_classes") from error
    result: dict[str, Any] = {}
    if config.near_duplicates is not None:  # first, since a wrong folder ends the command
        suspects = find_source(config.near_duplicates, setting="near_duplicates")
        world = World(device=setting.device)
        duplicates = report_duplicates(suspects, data, config.workers, world)
        result["near_duplicates"] = [entry._asdict() for entry in duplicates]
    kinds = features_by_kind(setting, data)
    read = len(data.train.source) + len(data.val.source)
    for kind, features in kinds.items():
        train, val = len(features.train), len(features.val)
        scores = {
            **measure(features, config.neighbours, setting.device, shown=True),
            "train": train,
            "val": val,
            "classes": features.classes,
            "unreadable": read - train - val,
            "weights": setting.model.origin if kind == PRETRAINED else CONTROLS[kind],
            "img_size": list(setting.images.img_size),
        }
        result |= scores if kind == PRETRAINED else {kind: scores}
    if config.baseline:
        result["advice"] = advice(result)
    if config.curve:
        tops = {kind: result if kind == PRETRAINED else result[kind] for kind in kinds}
        curves = {
            kind: summary(curve_of(features, tops[kind]["linear"]["top1"], setting.device, True))
            for kind, features in kinds.items()
        }
        result["curve"] = {"chance": _chance(kinds[PRETRAINED]), **curves}
    print_result(result, config.json, show, _print_table)
    if (out := setting.out) is not None:
        with out_file(out) as path:
            drawn = {NAMES[kind]: curve for kind, curve in curves.items()}
            figure = figures.label_curves(drawn, result["curve"]["chance"])
            figure.savefig(path, format=out.suffix[1:], dpi=150)
        _log.info("plot: %s", out)
    return result


def curve_of(
    features: Labelled,
    top1: float,
    device: torch.device | str = "cpu",
    shown: bool = False,
    seed: int = 0,
) -> Curve:
    """The curve of the linear probe over the number of labels.

    Args:
        features: of the images to learn from and to measure on.
        top1: in percent, with all labels.
        device: where the probe is fitted.
        shown: show a progress bar on terminals.
        seed: of the sets of labels.

    Raises:
        InputError: there are too few labels, or none of a class.
    """

    def error_of(chosen: Places, held: Places) -> float:
        part = torch.from_numpy(chosen)
        few = features._replace(
            train=features.train[part], train_labels=features.train_labels[part],
            held=torch.isin(torch.arange(len(part)), torch.from_numpy(held)),
        )  # fmt: skip
        return 1 - _score(linear_probe(few, device)[0], features.val_labels)["top1"] / 100

    labels, name = features.train_labels.numpy(), "label curve" if shown else None
    return label_curve(labels, features.classes, error_of, 1 - top1 / 100, name, seed=seed)


def _chance(features: Labelled) -> float:
    """Top-1 in percent of always naming the most frequent class of the training images."""
    common = torch.bincount(features.train_labels).argmax()
    return _score(common.expand(len(features.val_labels)), features.val_labels)["top1"]


def features_by_kind(setting: Setting[Backbone], data: LabelledData) -> dict[str, Labelled]:
    """Features of the network, and with `config.baseline` of both controls; images are read once.

    Raises:
        InputError: the network's features are not finite, or all the same.
        RunError: no image could be read.
    """
    model, controls = setting.model, setting.config.baseline
    encoders = [model.encoder] + ([random_backbone(model).encoder] if controls else [])

    def describe(batch: Batch, images: Tensor) -> Tensor:
        found = [pooled(encoder, images).cpu() for encoder in encoders]
        return torch.cat([*found, histograms(batch)] if controls else found, 1)

    found = collect_labelled(describe, data, lambda split: setting.batches(split, "features"))
    width = model.encoder.dims[-1]
    ends = [width, 2 * width] if controls else []
    parts = zip(found.train.tensor_split(ends, 1), found.val.tensor_split(ends, 1), strict=True)
    kinds = {
        kind: found._replace(train=train, val=val)
        for kind, (train, val) in zip((PRETRAINED, *CONTROLS), parts, strict=False)
    }
    check_features(kinds[PRETRAINED], model.origin)
    return kinds


def check_features(features: Labelled, origin: str) -> None:
    """Raise InputError if features (N, C) are not finite, or those to learn from all the same."""
    for part in (features.train, features.val):
        if broken := int((~part.isfinite()).any(1).sum()):
            raise InputError(
                f"{origin!r} gives NaN or infinite features for {broken} of {len(part)} images: "
                "give weights of a run without skipped updates, or an earlier checkpoint"
            )
    if len(features.train) > 1 and bool((features.train == features.train[0]).all()):
        raise InputError(
            f"the features of all {len(features.train)} training images are the same: give images "
            "that differ, or weights that have not collapsed (`fcmae diversity`)"
        )


def advice(result: dict[str, Any]) -> list[str]:
    """A sentence for each control that the linear probe does not beat, and what to try."""
    low, high = result["linear"]["low"], result["linear"]["high"]
    found = [
        f"The network does not beat {name}: its linear probe is between {low:.1f} and "
        f"{high:.1f} %, theirs {result[kind]['linear']['top1']:.1f} %."
        for kind, name in CONTROLS.items()
        if result[kind]["linear"]["top1"] >= low
    ]
    return [*found, TO_TRY] if found else []


def _print_table(result: dict[str, Any]) -> None:
    out = Console(highlight=False)
    out.print(result["weights"], markup=False, soft_wrap=True)
    out.print("{train} training and {val} validation images, {classes} classes".format(**result))
    controls = {kind: name for kind, name in CONTROLS.items() if kind in result}
    rows = []
    for name, entry in result.items():
        if isinstance(entry, dict) and "top1" in entry:
            row = [name, f"{entry['top1']:.1f}", f"{entry['low']:.1f} to {entry['high']:.1f}"]
            rows.append([*row, *(f"{result[kind][name]['top1']:.1f}" for kind in controls)])
    print_table(("probe", "top-1 %", "95 %", *controls.values()), rows)
    for sentence in result.get("advice", ()):
        out.print(sentence, soft_wrap=True)
    if "curve" in result:
        print_curves(result["curve"], NAMES)
