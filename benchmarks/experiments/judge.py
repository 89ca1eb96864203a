"""Short pretraining runs side by side, each evaluated by the quality of its weights.

Labels are used only for evaluation: thousands of training images instead of a val of hundreds, so
that a point or two is distinguishable from chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiments.folders import shrink, tenth
from benchmarks.experiments.study import Study, last_holdout_loss, logged, speed
from fcmae.inspect.probing import Labelled, knn, linear_probe

FOLDS = 10
NOTHING = "no pretraining"


def compare(
    study: Study,
    options: argparse.Namespace,
    runs: Mapping[str, Sequence[object]],
    module: Callable[[str], str] = lambda _: "fcmae",
) -> dict[str, dict[str, Any]]:
    """Pretrain with each of the settings and evaluate each run.

    Args:
        options: from `arguments`; `data` is a folder of classes.
        runs: name → options of `fcmae pretrain` after the common ones.
        module: from a name to the module that takes these options.

    Returns:
        By name: `tuned`, top-1 in percent on nine tenths of the images after fine-tuning on the
        other tenth; `knn20` and `linear`, of frozen features; `holdout_loss` and `diversity` of
        every block, both at the end of pretraining; its `images_per_s`. `NOTHING` comes first and
        has only `tuned`.
    """
    data = shrink(options.data, study.out / "pictures", options.side)
    labelled = tenth(data, study.out / "tenth")
    size = ["--img_size", options.img_size]
    trained = [*size, "--precision", options.precision]

    def tuned(name: str, weights: str | Path) -> float:
        return study.finetune(
            f"runs/{name}-tenth", labelled, *trained, "--weights", weights, "--epochs", 30,
            "--val_epochs", 30,
        )["val"]  # fmt: skip

    def judged(name: str) -> dict[str, Any]:
        if name == NOTHING:
            return {"tuned": tuned(name, "none")}
        run = study.pretrain(
            name, data, *trained, "--epochs", options.epochs, *runs[name], module=module(name)
        )
        return {
            "tuned": tuned(name, run),
            **_frozen(study, run, data, size),
            "holdout_loss": last_holdout_loss(run),
            "diversity": diversity(run),
            "images_per_s": speed(run),
        }

    return study.together(
        {name: partial(study.once, name, partial(judged, name)) for name in (NOTHING, *runs)}
    )


def diversity(run: Path) -> dict[str, float]:
    """Diversity of every block, as pretraining last logged it."""
    last = (logged(run, "holdout_loss") or [{}])[-1]
    return {key: value for key, value in last.items() if key.startswith("diversity/")}


def _frozen(study: Study, run: Path, data: Path, size: Sequence[object]) -> dict[str, float]:
    values, paths = study.embed(run, data, *size)
    names, labels = np.unique([Path(path).parts[0] for path in paths], return_inverse=True)
    folds = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)) % FOLDS)
    return across(values, torch.from_numpy(labels), len(names), folds)


def across(values_NC: Tensor, labels_N: Tensor, classes: int, folds_N: Tensor) -> dict[str, float]:
    """Cross-validated top-1 in percent of `knn20` and `linear`, over the given folds."""
    hits = {"knn20": 0, "linear": 0}
    for fold in range(FOLDS):
        one = folds_N == fold
        held = torch.arange(int((~one).sum())) % 5 == 0
        some = Labelled(
            values_NC[~one], labels_N[~one], values_NC[one], labels_N[one], classes, held
        )
        near = knn(some.train, some.train_labels, some.val, (20,), classes)[0]
        for name, guess in (("knn20", near), ("linear", linear_probe(some)[0])):
            hits[name] += int((guess == some.val_labels).sum())
    return {name: 100 * count / len(labels_N) for name, count in hits.items()}
