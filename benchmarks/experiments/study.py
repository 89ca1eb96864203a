"""Code shared by all experiments: steps computed once, runs side by side, plots.

An experiment is a list of steps, each a few `fcmae` commands and a result. Results are kept in
`OUT/results.json`: an experiment can be stopped at any moment and resumes when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fcmae.atomic import atomic_write

JUDGES = ("val", "test", "rest")
"""Folders that a fine-tuned model is evaluated on, if they exist."""
SETTINGS = "settings"
DECISIVE = ("img_size", "epochs", "precision", "side", "batch_size", "share")
"""Options that change the result of a step of the same name."""
K = TypeVar("K")
V = TypeVar("V")


def arguments(
    description: str, out: str, *, img_size: int, epochs: int, side: int
) -> argparse.ArgumentParser:
    """Options of every experiment, with the defaults of this one."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS, val/CLASS, …")
    parser.add_argument("--out", type=Path, default=Path("build/experiments") / out)
    parser.add_argument("--img_size", type=int, default=img_size)
    parser.add_argument(
        "--epochs", type=int, default=epochs, help="of pretraining, if the experiment has any"
    )
    parser.add_argument("--side", type=int, default=side, help="shorter side of the copies read")
    parser.add_argument("--precision", default="fp32", help="of all training: fp32 or bf16")
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="parallel runs; two with one thread each do more on two cores than one with two",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="fine-tuning; needs a compiler")
    return parser


def search(
    study: Study, rates: Sequence[float], tried: Callable[[float], dict[str, float]]
) -> tuple[float, dict[str, float]]:
    """The best learning rate on val, and its result: tries `rates`, a constant factor apart, then
    further rates down or up by that factor while the best is at an end. A single rate is taken."""
    if len(rates) == 1:
        return rates[0], tried(rates[0])
    found = study.together({rate: partial(tried, rate) for rate in rates})
    while (best := max(found, key=lambda rate: found[rate]["val"])) in (min(found), max(found)):
        low, *_, high = sorted(found)
        step = rates[1] / rates[0]
        rate = low / step if best == low else high * step
        found[rate] = tried(rate)
    return best, found[best]


def tune(
    study: Study,
    rates: Sequence[float],
    lengths: Sequence[int],
    tried: Callable[[float, int], dict[str, float]],
) -> tuple[float, int, dict[int, dict[str, float]]]:
    """The best rate at the first length, the best length at that rate, and the results by length:
    longer ones are tried in order until one is not better than the one before."""
    short, *longer = lengths
    rate, found = search(study, rates, lambda rate: tried(rate, short))
    best, results = short, {short: found}
    for length in longer:
        results[length] = tried(rate, length)
        if results[length]["val"] <= results[best]["val"]:
            break
        best = length
    return rate, best, results


class Study:
    """Results by name, written to disk as soon as they are computed."""

    def __init__(self, options: argparse.Namespace, named: Sequence[str] = ()) -> None:
        """named: options that are part of the names of the steps they change."""
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self._jobs: int = options.jobs
        self._compiled = ["--compile", "true"] if options.compile else []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(options.jobs)
        self._failed = threading.Event()
        self._file = self.out / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )
        decisive = set(DECISIVE) - set(named)
        self._check({key: value for key, value in vars(options).items() if key in decisive})

    def _check(self, given: dict[str, Any]) -> None:
        """Check that the stored results use the same decisive options."""
        for key, value in self.once(SETTINGS, lambda: given).items():
            if given.get(key, value) != value:
                raise SystemExit(
                    f"{self._file} holds results of --{key} {value}, not {given[key]}: give "
                    f"--{key} {value}, or another folder as --out"
                )

    def once(self, name: str, step: Callable[[], Any]) -> Any:
        """The result of a step, computed if it is not stored yet."""
        if name not in self.results:
            found = step()
            with self._lock:
                self.results[name] = found
                with atomic_write(self._file) as path:
                    path.write_text(json.dumps(self.results, indent=1))
        return self.results[name]

    def together(self, steps: Mapping[K, Callable[[], V]]) -> dict[K, V]:
        """The results of all steps. At most `jobs` of their runs are active at a time, first come
        first served, however the steps are nested; after a failure no more are started."""
        with ThreadPoolExecutor(len(steps)) as pool:
            try:
                begun = {name: pool.submit(step) for name, step in steps.items()}
                return {name: future.result() for name, future in begun.items()}
            except BaseException:
                self._failed.set()
                raise

    def pretrain(self, name: str, data: Path, *options: object, module: str = "fcmae") -> Path:
        """Run pretraining, or resume it; return the run folder.

        module: a module that takes the options of `fcmae pretrain`, if it is not fcmae.
        """
        run = self._folder(name)
        command = [module, "pretrain"] if module == "fcmae" else [module]
        self._run([*command, "--data", data, "--out", run, *self._readers(), *options])
        return run

    def embed(self, source: Path, data: Path, *options: object) -> tuple[Tensor, list[str]]:
        """Features (N, C) of the images of a folder, and their paths in it."""
        out = self.out / f"features-{source.name}.npz"
        given = ["--images", data, "--out", out, *self._readers(), *options]
        self._run(["fcmae", "embed", source, *given])
        with np.load(out) as file:
            found = torch.from_numpy(file["features"]), file["paths"].tolist()
        out.unlink()
        return found

    def finetune(
        self,
        name: str,
        data: Path,
        *options: object,
        score: Callable[[dict[str, Any]], float] = lambda found: found["top1"],
        module: str = "fcmae",
    ) -> dict[str, float]:
        """The score of the weights that are best on val, on each of `JUDGES` that exists; and the
        median of `images_per_s`.

        data: a folder of splits, or a CSV file with the splits val and test.
        score: from the output of `fcmae evaluate --json`, by default top-1 in percent.
        module: a module with fcmae's commands, if it is not fcmae.
        """
        run = self._folder(name)
        given = ["--data", data, "--out", run, *self._readers(), *self._compiled, *options]
        splits = [split for split in JUDGES if (data / split).is_dir()] or ["val", "test"]
        evaluate = [module, "evaluate", run, "--data", data, "--json", "--split"]
        _, *said = self._run(
            [module, "finetune", *given], *([*evaluate, split] for split in splits)
        )
        found = {split: score(json.loads(words)) for split, words in zip(splits, said, strict=True)}
        found["images_per_s"] = speed(run)
        for part in ("checkpoints", "exported", "best"):
            shutil.rmtree(run / part)
        return found

    def probe(self, source: Path, data: Path, *options: object) -> dict[str, Any]:
        """The output of `fcmae probe`, as `{"knn5": …, "knn20": …, "linear": …}`, without the path
        of the weights, which depends on the machine."""
        (said,) = self._run(["fcmae", "probe", source, "--data", data, "--json", *options])
        found: dict[str, Any] = json.loads(said)
        for measured in (found, found.get("random", {})):
            measured.pop("weights", None)
        return found

    def _folder(self, name: str) -> Path:
        return self.out / name.replace(" ", "-").replace("%", "percent")

    def _readers(self) -> list[object]:
        return ["--workers", 0] if self._jobs > 1 else []

    def _run(self, *commands: Sequence[object]) -> list[str]:
        """Run commands one after the other as a user would; return the output of each."""
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs)
        shared = {"OMP_NUM_THREADS": str(threads)} if self._jobs > 1 else {}
        with self._slots:
            try:
                return [self._output(command, shared) for command in commands]
            except BaseException:
                self._failed.set()
                raise

    def _output(self, command: Sequence[object], environment: dict[str, str]) -> str:
        if self._failed.is_set():
            raise RuntimeError("not started: another run failed")
        words = ["-m", *map(str, command)]
        print(f"\n$ python {' '.join(words)}", file=sys.stderr, flush=True)
        return subprocess.run(
            [sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True,
            env=os.environ | environment,
        ).stdout  # fmt: skip


def logged(run: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics that have `key`."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if key in entry]


def curve(run: Path, key: str, over: str = "epoch") -> list[list[float]]:
    """The values of `key` that a run logged, as [epoch or step, value]."""
    return [[entry[over], entry[key]] for entry in logged(run, key)]


def speed(run: Path) -> float:
    """The median of the images/s that a run logged."""
    return float(np.median([line["images_per_s"] for line in logged(run, "images_per_s")]))


def last_holdout_loss(run: Path) -> float:
    """The last held-out loss; NaN if nothing was held out, as with fewer than 500 images."""
    held = curve(run, "holdout_loss")
    return held[-1][1] if held else float("nan")


def plot(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float] | None]],
    labels: tuple[str, str],
    out: Path,
    log_x: bool = False,
    nested: bool = False,
) -> None:
    """Draw lines (name, x, y, standard deviations or None) as a PNG.

    nested: draw each line narrower than the one before, for lines that may coincide.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, x, y, deviations) in enumerate(lines):
        marker = "o" if len(x) < 30 else None
        width = 1 + 2.5 * (len(lines) - 1 - index) if nested else 1.5
        axes.errorbar(
            x, y, deviations, label=name, marker=marker, markersize=4, capsize=3, linewidth=width
        )
    if log_x:
        axes.set_xscale("log")
        ticks = sorted({value for _, x, _, _ in lines for value in x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
