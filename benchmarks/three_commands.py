"""Pretrain, fine-tune and predict as in docs/labels.md and docs/objects.md, timed, with a picture.

    .venv/bin/python -m benchmarks.three_commands masks nuclei --out RUNS --picture docs/nuclei.png
    .venv/bin/python -m benchmarks.three_commands boxes blood --out RUNS --picture docs/blood.png

`masks` needs train, val and test, each with `images` and `instances`; `boxes` Pascal VOC's folders
with a list of test photographs. The picture has test images as they are and with what was found.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

SHOWN = 6
SIDE = 256
MASKS = [
    "pretrain {data}/train/images --img_size 128 --epochs 80 --augment.vflip true "
    "--augment.crop_scale [0.08,0.6] --out {out}/cells",
    "finetune {data} --task segment --weights {out}/cells --img_size 128 --epochs 15 "
    "--val_epochs 5 --augment.vflip true --out {out}/masks",
    "predict {out}/masks --images {data}/test/images --out {out}/predicted --overlay {out}/drawn",
]
BOXES = [
    "pretrain {data}/JPEGImages --img_size 128 --epochs 80 --augment.vflip true "
    "--augment.crop_scale [0.08,0.6] --out {out}/smears",
    "finetune {data} --weights {out}/smears --img_size 256 --epochs 10 --batch_size 16 "
    "--optim.base_lr 0.032 --val_epochs 5 --augment.short_side 240 --augment.vflip true "
    "--out {out}/boxes",
    "predict {out}/boxes --images {out}/test.txt --out {out}/found.json --overlay {out}/drawn",
]


def run(command: str) -> float:
    """Run a command of fcmae; return how many seconds it took."""
    print(f"\n$ fcmae {command}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fcmae", *command.split()], check=True)
    return time.perf_counter() - began


def picture(pairs: Sequence[tuple[Path, Path]], out: Path) -> None:
    """Write images, and below each what was found in it."""
    columns = []
    for pair in pairs:
        column = []
        for path in pair:
            with Image.open(path) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert("RGB").crop((left, top, left + side, top + side))
            column.append(np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
        columns.append(np.concatenate(column))
    Image.fromarray(np.concatenate(columns, axis=1)).save(out, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("labels", choices=["masks", "boxes"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.labels == "boxes":
        names = (data / "ImageSets/Main/test.txt").read_text().split()
        images = [data / "JPEGImages" / f"{name}.jpg" for name in names]
        (out / "test.txt").write_text("".join(f"{path}\n" for path in images))
    else:
        images = sorted((data / "test/images").iterdir())
    commands = MASKS if options.labels == "masks" else BOXES
    seconds = [run(command.format(data=data, out=out)) for command in commands]
    drawn = {path.stem: path for path in (out / "drawn").rglob("*.png")}
    even = np.linspace(0, len(images) - 1, SHOWN).astype(int)
    picture([(images[n], drawn[images[n].stem]) for n in even], options.picture)
    console = Console(highlight=False)
    for command, took in zip(commands, seconds, strict=True):
        console.print(f"{took / 60:.1f} min: {command.split()[0]}")
    console.print(f"{sum(seconds) / 60:.1f} minutes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
