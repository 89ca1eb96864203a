"""Does pretraining pay off for masks, numbers and objects? Nuclei in microscopy images.

Segments nuclei, counts them, and finds each with its mask, after FCMAE on the unlabelled training
images and from scratch, with 10 % and with all of the labels. Images are cut to at most SIDE × SIDE
pixels at their centre: whole ones take hours. Both sides get the same search: see
`benchmarks.experiments.sides`.

    python -m benchmarks.experiments.nuclei --data FOLDER

FOLDER has train, val and test, each with `images` and `instances`: see docs/labels.md.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.experiments.folders import built, mask_share
from benchmarks.experiments.sides import SIDES, Question, both_sides, pretraining, print_table
from benchmarks.experiments.study import Study, arguments
from fcmae.data.file_list import find_images

SHARES = (10, 100)
WHOLE_CROPS = ["--augment.crop_scale", "[1,1]", "--augment.crop_ratio", "[1,1]"]
VFLIP = ["--augment.vflip", "true"]

QUESTIONS = {
    "masks": Question(
        lambda found: float(found["per_class"]["object"]["iou"]), "IoU of nuclei, %",
        (1.6e-2, 3.2e-2, 6.4e-2), {10: (40, 80, 160), 100: (8, 16)},
        ["--task", "segment", *VFLIP, "--decoder_channels", 40],
    ),
    "numbers": Question(
        lambda found: float(found["r2"]["nuclei"]), "R² of the number of nuclei",
        (8e-3, 1.6e-2, 3.2e-2), {10: (60, 120, 240), 100: (10, 20)},
        # A crop would hide some of the nuclei that the number counts.
        [*VFLIP, *WHOLE_CROPS, "--augment.crop_pct", 1], digits=3,
    ),
    "objects": Question(
        lambda found: float(found["ap50"]), "AP50 of nuclei's masks, %",
        (1.6e-2, 3.2e-2, 6.4e-2), {10: (40, 80, 160), 100: (8, 16)},
        ["--task", "instances", *VFLIP],
    ),
}  # fmt: skip


def main() -> int:
    parser = arguments(__doc__ or "", "nuclei", img_size=128, epochs=600, side=256)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=["masks", "numbers"])
    parser.add_argument("--shares", type=int, nargs="+", choices=SHARES, default=SHARES)
    parser.add_argument("--longest", type=int, help="epochs of fine-tuning; longer is not tried")
    parser.add_argument("--rate", type=float, help="base_lr found by an earlier search, for all")
    options = parser.parse_args()
    study = Study(options)
    data = cut(options.data, study.out / "cut", options.side)
    size = ["--img_size", options.img_size, "--precision", options.precision]
    pretrained = pretraining(study, options.epochs, data / "train" / "images", size)
    questions = {}
    for share in options.shares:
        masks = mask_share(data, share, study.out / f"labels-{share}")
        counts = counted(masks, study.out / f"counts-{share}.csv")
        for name in options.questions:
            place = counts if name == "numbers" else masks
            questions[name, share] = QUESTIONS[name], place
    sides = dict(zip(SIDES, (pretrained, None), strict=True))
    found = both_sides(study, questions, sides, size, options.longest, options.rate)
    print_table(found, questions)
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


if __name__ == "__main__":
    raise SystemExit(main())
