"""What all experiments share: steps that are done once, folders of pictures, plots.

An experiment is a list of steps, each a few `fcmae` commands and a result. Results are kept in
`OUT/results.json`: stopped at any moment and started again, an experiment goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from fcmae.atomic import atomic_write
from fcmae.data.files import find_images
from fcmae.data.labelled import find_classes, labels_of, split_by_hash
from fcmae.probing import Labelled, knn, linear_probe

FOLDS = 10
JUDGES = ("val", "test", "rest")
"""Folders that a fine-tuned model is measured on, where they are."""
K = TypeVar("K")
V = TypeVar("V")


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """Options that every experiment has."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS, val/CLASS, …")
    parser.add_argument("--out", type=Path, default=Path("build/experiments") / out)
    parser.add_argument("--precision", default="fp32", help="of all training: fp32 or bf16")
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="runs at the same time; two of one thread do more on two cores than one of two",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="fine-tuning; needs a compiler")
    return parser


class Study:
    """Results by name, on disk as soon as they are there."""

    def __init__(self, options: argparse.Namespace) -> None:
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

    def once(self, name: str, step: Callable[[], Any]) -> Any:
        """The result of a step, computed now if it was not before."""
        if name not in self.results:
            found = step()
            with self._lock:
                self.results[name] = found
                with atomic_write(self._file) as path:
                    path.write_text(json.dumps(self.results, indent=1))
        return self.results[name]

    def together(self, steps: Mapping[K, Callable[[], V]]) -> dict[K, V]:
        """What all steps return. Of the runs in them, `jobs` go at a time, first come first served,
        however the steps are nested; after one that fails, no more are begun."""
        with ThreadPoolExecutor(len(steps)) as pool:
            try:
                begun = {name: pool.submit(step) for name, step in steps.items()}
                return {name: future.result() for name, future in begun.items()}
            except BaseException:
                self._failed.set()
                raise

    def pretrain(self, name: str, data: Path, *options: object, module: str = "fcmae") -> Path:
        """A run of pretraining; one that was stopped goes on.

        module: takes the options of `fcmae pretrain`, where it is another.
        """
        run = self.out / name.replace(" ", "-").replace("%", "percent")
        command = [module, "pretrain"] if module == "fcmae" else [module]
        self._run([*command, "--data", data, "--out", run, *self._readers(), *options])
        return run

    def finetune(self, name: str, data: Path, *options: object) -> dict[str, float]:
        """Top-1 in percent on each of `JUDGES` that there is, of the best weights on val; and the
        median of `images_per_s`."""
        run = self.out / name
        given = ["--data", data, "--out", run, *self._readers(), *self._compiled, *options]
        splits = [split for split in JUDGES if (data / split).is_dir()]
        evaluate = ["fcmae", "evaluate", run, "--data", data, "--json", "--split"]
        _, *said = self._run(
            ["fcmae", "finetune", *given], *([*evaluate, split] for split in splits)
        )
        found = {
            split: json.loads(words)["top1"] for split, words in zip(splits, said, strict=True)
        }
        speeds = [line["images_per_s"] for line in logged(run, "images_per_s")]
        found["images_per_s"] = float(np.median(speeds))
        for part in ("checkpoints", "exported", "best"):
            shutil.rmtree(run / part)
        return found

    def probe(self, source: Path, data: Path, *options: object) -> dict[str, Any]:
        """What `fcmae probe` says, as `{"knn5": …, "knn20": …, "linear": …}`."""
        (said,) = self._run(["fcmae", "probe", source, "--data", data, "--json", *options])
        found: dict[str, Any] = json.loads(said)
        return found

    def frozen(self, source: Path, data: Path, *options: object) -> dict[str, float]:
        """Top-1 in percent of frozen features within one folder of classes, each picture judged by
        others: `knn20` and `linear` by nine tenths of them.

        With thousands of pictures to judge instead of a val of hundreds, a point or two can be told
        from chance.
        """
        out = self.out / f"features-{source.name}.npz"
        given = ["--images", data, "--out", out, *self._readers(), *options]
        self._run(["fcmae", "embed", source, *given])
        with np.load(out) as file:
            values, paths = torch.from_numpy(file["features"]), file["paths"]
        out.unlink()
        names, labels = np.unique([Path(path).parts[0] for path in paths], return_inverse=True)
        folds = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)) % FOLDS)
        return across(values, torch.from_numpy(labels), len(names), folds)

    def few_labels(self, run: Path, data: Path, *options: object) -> float:
        """Top-1 in percent after fine-tuning on a folder made by `tenth`."""
        name = f"runs/{run.name}-tenth"
        given = ["--weights", run, "--epochs", 30, "--val_epochs", 30, *options]
        return self.finetune(name, data, *given)["val"]

    def judged(self, run: Path, data: Path, labelled: Path, img_size: int, precision: str) -> Any:
        """`few_labels` as `tuned`, `frozen`, and the last held-out loss of a run."""
        size = ["--img_size", img_size]
        held = logged(run, "holdout_loss")
        return {
            "tuned": self.few_labels(run, labelled, *size, "--precision", precision),
            **self.frozen(run, data, *size),
            "holdout_loss": held[-1]["holdout_loss"] if held else float("nan"),
        }

    def _readers(self) -> list[object]:
        return ["--workers", 0] if self._jobs > 1 else []

    def _run(self, *commands: Sequence[object]) -> list[str]:
        """Run commands one after the other as a user would, and return what each printed."""
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
            raise RuntimeError("not begun: another run failed")
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


def across(values_NC: Tensor, labels_N: Tensor, classes: int, folds_N: Tensor) -> dict[str, float]:
    """Top-1 in percent of `knn20` and `linear`, over all folds of the pictures."""
    hits = {"knn20": 0, "linear": 0}
    for fold in range(FOLDS):
        one = folds_N == fold
        chosen = torch.arange(0, int((~one).sum()), 5)
        some = Labelled(
            values_NC[~one], labels_N[~one], values_NC[one], labels_N[one], classes, chosen
        )
        near = knn(some.train, some.train_labels, some.val, (20,), classes)[0]
        for name, guess in (("knn20", near), ("linear", linear_probe(some)[0])):
            hits[name] += int((guess == some.val_labels).sum())
    return {name: 100 * count / len(labels_N) for name, count in hits.items()}


def shrink(data: Path, out: Path, side: int) -> Path:
    """Copy a folder of pictures, the shorter sides of larger ones reduced to `side` pixels.

    Decoding is most of what reading costs: small copies make a hundred epochs cheaper.
    """
    if out.is_dir():
        return out
    files = find_images(str(data))
    with _built(out) as partial:
        for index in range(len(files)):
            path = Path(os.fsdecode(files.path(index)))
            target = (partial / os.fsdecode(files.relative(index))).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as picture:
                image = ImageOps.exif_transpose(picture).convert("RGB")
            scale = side / min(image.size)
            if scale < 1:
                size = (round(image.width * scale), round(image.height * scale))
                image = image.resize(size, Image.Resampling.BICUBIC)
            image.save(target, quality=95)
    return out


def with_test(data: Path, out: Path) -> Path:
    """The folder itself if it has a test split, else one of links whose test is half of its val."""
    if (data / "test").is_dir():
        return data
    if out.is_dir():
        return out
    with _built(out) as partial:
        (partial / "train").symlink_to((data / "train").resolve())
        for split, chosen in zip(("val", "test"), _halves(data / "val", 0.5), strict=True):
            _link(chosen, partial / split)
    return out


def label_share(data: Path, percent: int, out: Path) -> Path:
    """A folder of links with `percent` of the training pictures of each class, chosen by a hash of
    their paths; val and test as they are, and as `rest` the training pictures left out."""
    if percent == 100:
        return data
    if out.is_dir():
        return out
    with _built(out) as partial:
        for split in ("val", "test"):
            (partial / split).symlink_to((data / split).resolve())
        for name, chosen in zip(
            ("rest", "train"), _halves(data / "train", percent / 100), strict=True
        ):
            _link(chosen, partial / name)
    return out


def tenth(data: Path, out: Path) -> Path:
    """A folder of links that trains on a tenth of a folder of classes and validates on the rest:
    with thousands of pictures to judge, a point or two can be told from chance."""
    if out.is_dir():
        return out
    with _built(out) as partial:
        for split, chosen in zip(("val", "train"), _halves(data, 0.1), strict=True):
            _link(chosen, partial / split)
    return out


def _halves(folder: Path, share: float) -> list[dict[str, str]]:
    """Pictures of a folder of classes, relative to real path, in two parts of 1 - share and share
    of each class."""
    files, names = find_classes(folder)
    return [
        {
            os.fsdecode(files.relative(index)): os.path.realpath(os.fsdecode(files.path(index)))
            for index in part.tolist()
        }
        for part in split_by_hash(files, labels_of(files, names), share)
    ]


def _link(chosen: dict[str, str], out: Path) -> None:
    for name, path in chosen.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(path)


@contextmanager
def _built(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all is in it."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(out)


def plot(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float] | None]],
    labels: tuple[str, str],
    out: Path,
    log_x: bool = False,
) -> None:
    """Draw lines (name, x, y, deviations or None) as a PNG."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, x, y, deviations in lines:
        marker = "o" if len(x) < 30 else None
        axes.errorbar(x, y, deviations, label=name, marker=marker, markersize=4, capsize=3)
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
