"""Fine-tuning after pretraining and from scratch: the same search for both, then paired seeds.

The rate at the shortest length, then longer ones while they are better, on val with one seed. The
best setting runs with all seeds, which draw the same crops on both sides, and is evaluated on test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from benchmarks.experiments.study import Study, tune

SIDES = ("pretrained", "scratch")
SEEDS = range(5)


class Question(NamedTuple):
    """What is learned.

    Attributes:
        score: what `evaluate --json` says of it.
        unit: the score's name.
        rates: first rates of the search: base_lr, for a batch of 256.
        epochs: lengths to try, by the share of the labels in percent.
        options: of `fcmae finetune`.
        digits: of the score in the table.
    """

    score: Callable[[dict[str, Any]], float]
    unit: str
    rates: tuple[float, ...]
    epochs: Mapping[int, tuple[int, ...]]
    options: list[object]
    digits: int = 1


Name = tuple[str, int]
"""Of a question, and the share of the labels in percent."""


def both_sides(
    study: Study,
    questions: Mapping[Name, tuple[Question, Path]],
    sides: Mapping[str, Callable[[], Path] | None],
    common: list[object],
    longest: int | None = None,
    rate: float | None = None,
) -> dict[tuple[Name, str], dict[str, Any]]:
    """The settings and scores of each side for each question.

    Args:
        study: runs the steps.
        questions: with the data that each is about.
        sides: a function that gives the weights of each, when they are needed; None for none.
        common: options of all runs.
        longest: no longer runs are tried, in epochs; None for all lengths.
        rate: of both sides, from an earlier search; None searches.
    """
    if rate is not None:
        questions = {n: (asked._replace(rates=(rate,)), d) for n, (asked, d) in questions.items()}
    cells = {
        (name, side): partial(_side, study, name, *questions[name], side, weights, common, longest)
        for name in questions
        for side, weights in sides.items()
    }
    return study.together(cells)


def pretraining(
    study: Study, epochs: int, images: Path, common: list[object]
) -> Callable[[], Path]:
    """A function that returns the run that every pretrained side starts from: the first one that
    asks trains it.

    Args:
        study: runs it.
        epochs: passes over the images.
        images: unlabelled, a folder or a list of paths.
        common: options of all runs.
    """
    run, lock = study.out / f"pretrain-{epochs}", Lock()

    def pretrained() -> Path:
        with lock:
            if not (run / "exported" / "config.json").is_file():
                study.pretrain(
                    run.name, images, *common, "--epochs", epochs, "--batch_size", 32,
                    "--decoder.dim", 128, "--engine", "patch", "--picture_epochs", 0,
                    "--augment.crop_scale", "[0.08,0.6]", "--augment.vflip", "true",
                )  # fmt: skip
        return run

    return pretrained


def print_table(
    found: Mapping[tuple[Name, str], Mapping[str, Any]], questions: Mapping[Name, Any]
) -> None:
    """Print the results of `both_sides` as Markdown."""
    print("| | labels | rate, epochs: pretrained | scratch | test: pretrained | scratch | gain |")
    print("|---|---:|---|---|---:|---:|---:|")
    for name, (asked, _) in questions.items():
        sides = [found[name, side] for side in SIDES]
        settings = [f"{side['rate']:g}, {side['epochs']}" for side in sides]
        tests = [np.array(side["test"]) for side in sides]
        gains, digits = tests[0] - tests[1], asked.digits
        scores = [f"{t.mean():.{digits}f} ± {t.std(ddof=1):.{digits}f}" for t in tests]
        error = gains.std(ddof=1) / np.sqrt(len(gains))
        gain = f"{gains.mean():+.{digits}f}, standard error {error:.{digits}f}"
        print(f"| {' | '.join([asked.unit, f'{name[1]} %', *settings, *scores, gain])} |")


def _side(
    study: Study,
    name: Name,
    asked: Question,
    data: Path,
    side: str,
    weights: Callable[[], Path] | None,
    common: list[object],
    longest: int | None,
) -> dict[str, Any]:
    """Search, then repeat the best with all seeds; return its settings and scores."""
    start = weights() if weights else "none"

    def tried(rate: float, epochs: int, seed: int = SEEDS[0]) -> dict[str, float]:
        step = f"{name[0]}/{name[1]}/{side}/rate-{rate:g}-epochs-{epochs}-seed-{seed}"
        given = [
            *common, "--weights", start, *asked.options, "--batch_size", 16,
            "--optim.base_lr", rate, "--epochs", epochs, "--val_epochs", max(1, epochs // 2),
            "--seed", seed,
        ]  # fmt: skip
        found: dict[str, float] = study.once(
            step, lambda: study.finetune(f"runs/{step}", data, *given, score=asked.score)
        )
        return found

    lengths = [epochs for epochs in asked.epochs[name[1]] if longest is None or epochs <= longest]
    rate, epochs, _ = tune(study, asked.rates, lengths, tried)
    seeds = study.together({seed: partial(tried, rate, epochs, seed) for seed in SEEDS})
    scores = {split: [found[split] for found in seeds.values()] for split in ("val", "test")}
    return {"rate": rate, "epochs": epochs, **scores}
