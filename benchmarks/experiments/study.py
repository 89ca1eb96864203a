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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from fcmae.atomic import atomic_write
from fcmae.data.files import find_images
from fcmae.data.labelled import find_classes, labels_of, split_by_hash


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """Options that every experiment has."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS, val/CLASS, …")
    parser.add_argument("--out", type=Path, default=Path("build/experiments") / out)
    parser.add_argument("--precision", default="fp32", help="of all training: fp32 or bf16")
    return parser


class Study:
    """Results by name, on disk as soon as they are there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def once(self, name: str, step: Callable[[], Any]) -> Any:
        """The result of a step, computed now if it was not before."""
        if name not in self.results:
            self.results[name] = step()
            with atomic_write(self._file) as path:
                path.write_text(json.dumps(self.results, indent=1))
        return self.results[name]

    def pretrain(self, name: str, data: Path, *options: object) -> Path:
        """A run of pretraining; one that was stopped goes on."""
        run = self.out / name
        fcmae("pretrain", "--data", data, "--out", run, *options)
        return run

    def finetune(self, name: str, data: Path, *options: object) -> dict[str, float]:
        """Top-1 in percent on val and, where there is one, on test, of the best weights on val."""
        run = self.out / name
        fcmae("finetune", "--data", data, "--out", run, *options)
        found = {}
        for split in ("val", "test"):
            if (data / split).is_dir():
                said = fcmae("evaluate", run, "--data", data, "--split", split, "--json")
                found[split] = json.loads(said)["top1"]
        speeds = [line["images_per_s"] for line in logged(run, "images_per_s")]
        found["images_per_s"] = float(np.median(speeds))
        for part in ("checkpoints", "exported", "best"):
            shutil.rmtree(run / part)
        return found


def fcmae(*arguments: object) -> str:
    """Run one command as a user would, and return what it printed."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ fcmae {' '.join(words)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "fcmae", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def logged(run: Path, key: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics that have `key`."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if key in entry]


def probe(source: Path, data: Path, *options: object) -> dict[str, Any]:
    """What `fcmae probe` says, as `{"knn5": …, "knn20": …, "linear": …}`."""
    found: dict[str, Any] = json.loads(fcmae("probe", source, "--data", data, "--json", *options))
    return found


def shrink(data: Path, out: Path, side: int) -> Path:
    """Copy a folder of pictures, the shorter sides of larger ones reduced to `side` pixels.

    Decoding is most of what reading costs: small copies make a hundred epochs cheaper.
    """
    if out.is_dir():
        return out
    partial = out.with_name(f"{out.name}.partial")
    files = find_images(str(data))
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
    partial.rename(out)
    return out


def label_share(data: Path, percent: int, out: Path) -> Path:
    """A folder of links with `percent` of the training pictures of each class, chosen by a hash of
    their paths; the other splits as they are."""
    if percent == 100:
        return data
    if out.is_dir():
        return out
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split in ("val", "test"):
        if (data / split).is_dir():
            (partial / split).symlink_to((data / split).resolve())
    files, names = find_classes(data / "train")
    kept = split_by_hash(files, labels_of(files, names), percent / 100)[1]
    for index in kept.tolist():
        target = partial / "train" / os.fsdecode(files.relative(index))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.fsdecode(files.path(index)))
    partial.rename(out)
    return out


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
