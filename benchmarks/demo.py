"""`make demo`: every step of the pipeline on the sample images, and a table of the results.

It calls the command line as a user would. Repeated on the same folder, it resumes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

PRETRAIN = ["--img_size", "96", "--epochs", "20", "--picture_epochs", "10"]
FINETUNE = ["--model", "atto", "--img_size", "96", "--epochs", "5"]
PICTURES = 8


@dataclass(frozen=True)
class Paths:
    """The demo's output paths, all in one folder."""

    out: Path

    @property
    def samples(self) -> Path:
        return self.out / "samples"

    @property
    def pretrained(self) -> Path:
        return self.out / "pretrain"

    @property
    def timm(self) -> Path:
        return self.out / "timm"

    @property
    def pictures(self) -> Path:
        return self.out / "pictures"

    @property
    def reconstruction(self) -> Path:
        return self.out / "reconstruction.png"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def finetuned(self, start: str) -> Path:
        return self.out / f"finetune-{start}"


def fcmae(*arguments: str | Path) -> str:
    """Run one fcmae command, shown as a user would type it; return its standard output."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ fcmae {' '.join(words)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "fcmae", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def run(paths: Paths) -> dict[str, float]:
    """Run all steps; return the top-1 in percent by where fine-tuning started."""
    fcmae("samples", paths.samples)
    fcmae("pretrain", "--data", paths.samples / "train", "--out", paths.pretrained, *PRETRAIN)
    fcmae("convert", paths.pretrained, "--out", paths.timm)
    top1 = {}
    for start, weights in (("pretrained", paths.timm), ("scratch", "none")):
        out = paths.finetuned(start)
        where = ["--data", str(paths.samples), "--weights", str(weights), "--out", str(out)]
        fcmae("finetune", *where, *FINETUNE)
        result = json.loads(fcmae("evaluate", out, "--data", paths.samples, "--json"))
        top1[start] = float(result["top1"])
    choose_pictures(paths)
    where = ["--images", str(paths.pictures), "--out", str(paths.reconstruction)]
    fcmae("reconstruct", paths.pretrained, *where, "--count", str(PICTURES))
    fcmae("report", paths.pretrained, *map(paths.finetuned, top1), "--out", paths.report)
    return top1


def choose_pictures(paths: Paths) -> None:
    """Copy one validation image from each of a few classes: the most detailed one (most bytes)."""
    paths.pictures.mkdir(exist_ok=True)
    for folder in sorted((paths.samples / "val").iterdir())[:PICTURES]:
        detailed = max(sorted(folder.glob("*.jpg")), key=lambda path: path.stat().st_size)
        shutil.copyfile(detailed, paths.pictures / f"{folder.name}.jpg")


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the logged training steps of a run."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def results_table(paths: Paths, top1: dict[str, float]) -> Table:
    """Return a table of losses, top-1 and speeds."""
    table = Table(title="Sample images, ConvNeXt V2 atto, 96 px")
    table.add_column("step")
    for column in ("loss, start", "loss, end", "top-1 %", "images/s"):
        table.add_column(column, justify="right")
    rows: list[tuple[str, Path, float | None]] = [("pretrain", paths.pretrained, None)]
    for start, percent in top1.items():
        rows.append((f"finetune, {start}", paths.finetuned(start), percent))
    for name, folder, result in rows:
        steps = read_metrics(folder)
        speed = median(entry["images_per_s"] for entry in steps)
        losses = (f"{steps[0]['loss']:.3f}", f"{steps[-1]['loss']:.3f}")
        table.add_row(name, *losses, "" if result is None else f"{result:.1f}", f"{speed:.0f}")
    return table


def main() -> int:
    """Run the demo; return the exit code of the step that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (demo)")
    paths = Paths(parser.parse_args().out)
    paths.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        top1 = run(paths)
    except subprocess.CalledProcessError as error:
        print(f"demo: `fcmae {error.cmd[3]}` failed; see above", file=sys.stderr)
        return int(error.returncode)
    console = Console(highlight=False)
    console.print()
    console.print(results_table(paths, top1))
    console.print("Predicting each patch's mean gives a pretraining loss of 1.0.")
    for name, path in (
        ("Reconstructions", paths.reconstruction),
        ("timm folder", paths.timm),
        ("TensorBoard log", paths.pretrained / "tb"),
        ("A page about it", paths.report),
    ):
        console.print(f"{name:16} {path}", soft_wrap=True)
    console.print(f"Took {(time.monotonic() - begin) / 60:.1f} minutes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
