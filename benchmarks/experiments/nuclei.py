"""Does pretraining pay off for masks and for numbers? Nuclei in microscopy images.

Segments nuclei, and counts them, after FCMAE on the unlabelled training images and from scratch,
with 10 % and with all of the labels. Images are cut to at most SIDE × SIDE pixels at their centre:
whole ones take hours. Both sides get the same search on val with one seed: the rate at the shortest
length, then longer ones while they are better. The best setting runs with all seeds, which draw the
same crops on both sides, and is evaluated on test.

    python -m benchmarks.experiments.nuclei --data FOLDER

FOLDER has train, val and test, each with `images` and `instances`: see docs/labels.md.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.experiments.folders import built, mask_share
from benchmarks.experiments.study import Study, arguments, tune
from fcmae.data.file_list import find_images

SHARES = (10, 100)
SIDES = ("pretrained", "scratch")
SEEDS = range(5)
WHOLE_CROPS = ["--augment.crop_scale", "[1,1]", "--augment.crop_ratio", "[1,1]"]


class Question(NamedTuple):
    """What is learned.

    Attributes:
        score: what `evaluate --json` says of it.
        unit: the score's name.
        rates: first rates of the search: base_lr, for a batch of 256.
        epochs: lengths to try, by the share of the labels in percent.
        options: of `fcmae finetune`.
    """

    score: Callable[[dict[str, Any]], float]
    unit: str
    rates: tuple[float, ...]
    epochs: dict[int, tuple[int, ...]]
    options: list[object]


QUESTIONS = {
    "masks": Question(
        lambda found: float(found["per_class"]["object"]["iou"]), "IoU of nuclei, %",
        (1.6e-2, 3.2e-2, 6.4e-2), {10: (40, 80, 160), 100: (8, 16, 32)},
        ["--augment.vflip", "true", "--decoder_channels", 40],
    ),
    "numbers": Question(
        lambda found: float(found["r2"]["nuclei"]), "R² of the number of nuclei",
        (8e-3, 1.6e-2, 3.2e-2), {10: (60, 120, 240), 100: (10, 20, 40)},
        # A crop would hide some of the nuclei that the number counts.
        ["--augment.vflip", "true", *WHOLE_CROPS, "--augment.crop_pct", 1],
    ),
}  # fmt: skip


def main() -> int:
    parser = arguments(__doc__ or "", "nuclei", img_size=128, epochs=600, side=256)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=[*QUESTIONS])
    parser.add_argument("--shares", type=int, nargs="+", choices=SHARES, default=SHARES)
    options = parser.parse_args()
    study = Study(options)
    data = cut(options.data, study.out / "cut", options.side)
    size = ["--img_size", options.img_size, "--precision", options.precision]
    run = study.out / f"pretrain-{options.epochs}"
    crops = ["--augment.crop_scale", "[0.08,0.6]", "--augment.vflip", "true"]
    lock = Lock()

    def pretrained() -> Path:
        """The run that every pretrained side starts from: the first one that asks trains it."""
        with lock:
            if not (run / "exported" / "config.json").is_file():
                study.pretrain(
                    run.name, data / "train" / "images", *size, "--epochs", options.epochs,
                    "--batch_size", 32, "--decoder.dim", 128, "--engine", "patch",
                    "--picture_epochs", 0, *crops,
                )  # fmt: skip
        return run

    cells = {}
    for share in options.shares:
        masks = mask_share(data, share, study.out / f"labels-{share}")
        places = {"masks": masks, "numbers": counted(masks, study.out / f"counts-{share}.csv")}
        for question in options.questions:
            for side, weights in zip(SIDES, (pretrained, lambda: "none"), strict=True):
                cells[question, share, side] = partial(
                    _side, study, question, share, side, places[question], weights, size
                )
    found = study.together(cells)
    print("| | labels | rate, epochs: pretrained | scratch | test: pretrained | scratch | gain |")
    print("|---|---:|---|---|---:|---:|---:|")
    for question in options.questions:
        for share in options.shares:
            sides = [found[question, share, side] for side in SIDES]
            settings = [f"{side['rate']:g}, {side['epochs']}" for side in sides]
            tests = [np.array(side["test"]) for side in sides]
            gains = tests[0] - tests[1]
            digits = 1 if question == "masks" else 3
            scores = [f"{t.mean():.{digits}f} ± {t.std(ddof=1):.{digits}f}" for t in tests]
            error = gains.std(ddof=1) / np.sqrt(len(gains))
            gain = f"{gains.mean():+.{digits}f}, standard error {error:.{digits}f}"
            cells_of_row = [QUESTIONS[question].unit, f"{share} %", *settings, *scores, gain]
            print(f"| {' | '.join(cells_of_row)} |")
    return 0


def cut(data: Path, out: Path, side: int) -> Path:
    """Copy images and their masks, of each at most `side` × `side` pixels at the centre."""
    if out.is_dir():
        return out
    files = find_images(str(data))
    with built(out) as folder:
        for index in range(len(files)):
            target = folder / os.fsdecode(files.key(index))
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(files.path(index)) as image:
                left, top = (max(0, length - side) // 2 for length in image.size)
                box = left, top, min(left + side, image.width), min(top + side, image.height)
                image.crop(box).save(target, quality=95)
    return out


def counted(data: Path, out: Path) -> Path:
    """A CSV file with the number of objects in each image of a folder with masks."""
    if out.is_file():
        return out
    rows = []
    for split in ("train", "val", "test"):
        for mask in sorted((data / split / "instances").glob("*.png")):
            with Image.open(mask) as image:
                objects = np.count_nonzero(np.unique(np.array(image)))
            (picture,) = (data / split / "images").glob(f"{mask.stem}.*")
            rows.append([os.path.abspath(picture), objects, split])
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "nuclei", "split"], *rows])
    return out


def _side(
    study: Study,
    question: str,
    share: int,
    side: str,
    data: Path,
    weights: Callable[[], object],
    size: list[object],
) -> dict[str, Any]:
    """Search, then repeat the best with all seeds; return its settings and scores."""
    asked = QUESTIONS[question]
    common = [*size, "--weights", weights()]

    def tried(rate: float, epochs: int, seed: int = SEEDS[0]) -> dict[str, float]:
        name = f"{question}/{share}/{side}/rate-{rate:g}-epochs-{epochs}-seed-{seed}"
        given = [
            *common, *asked.options, "--batch_size", 16, "--optim.base_lr", rate,
            "--epochs", epochs, "--val_epochs", max(1, epochs // 2), "--seed", seed,
        ]  # fmt: skip
        found: dict[str, float] = study.once(
            name, lambda: study.finetune(f"runs/{name}", data, *given, score=asked.score)
        )
        return found

    rate, epochs, _ = tune(study, asked.rates, asked.epochs[share], tried)
    seeds = study.together({seed: partial(tried, rate, epochs, seed) for seed in SEEDS})
    scores = {split: [found[split] for found in seeds.values()] for split in ("val", "test")}
    return {"rate": rate, "epochs": epochs, **scores}


if __name__ == "__main__":
    raise SystemExit(main())
