"""Does pretraining pay off for boxes? Blood cells in photographs of smears.

Finds red and white cells and platelets with 10 % and with all of the labelled training photographs,
after FCMAE on all of them without labels and from scratch. Both sides get the same search: see
`benchmarks.experiments.sides`.

    python -m benchmarks.experiments.blood --data FOLDER

FOLDER has Pascal VOC's layout, with train, val and test in ImageSets/Main.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from benchmarks.experiments.folders import built
from benchmarks.experiments.sides import SIDES, Question, both_sides, pretraining, print_table
from benchmarks.experiments.study import Study, arguments
from fcmae.data.file_list import FileList
from fcmae.data.labelled import split_by_hash

SHARES = (10, 100)
BOXES = Question(
    lambda found: float(found["ap50"]), "AP50, %",
    (1.6e-2, 3.2e-2, 6.4e-2), {10: (60, 120, 240), 100: (8, 16, 32)},
    ["--task", "detect", "--augment.vflip", "true", "--augment.short_side", 240],
)  # fmt: skip


def main() -> int:
    parser = arguments(__doc__ or "", "blood", img_size=256, epochs=600, side=480)
    parser.add_argument("--shares", type=int, nargs="+", choices=SHARES, default=[10])
    parser.add_argument("--longest", type=int, help="epochs of fine-tuning; longer is not tried")
    parser.add_argument("--rate", type=float, help="base_lr found by an earlier search, for all")
    options = parser.parse_args()
    study, data = Study(options), options.data.resolve()
    size = ["--img_size", options.img_size, "--precision", options.precision]
    pretrained = pretraining(
        study, options.epochs, photographs(data, study.out / "train.txt"), size
    )
    questions = {
        ("boxes", share): (BOXES, label_share(data, share, study.out / f"labels-{share}"))
        for share in options.shares
    }
    sides = dict(zip(SIDES, (pretrained, None), strict=True))
    found = both_sides(study, questions, sides, size, options.longest, options.rate)
    print_table(found, questions)
    return 0


def names_of(data: Path, split: str) -> list[str]:
    return (data / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def photographs(data: Path, out: Path) -> Path:
    """A text file of the paths of the training photographs."""
    paths = [str(data / "JPEGImages" / f"{name}.jpg") for name in names_of(data, "train")]
    out.write_text("\n".join(paths) + "\n")
    return out


def label_share(data: Path, percent: int, out: Path) -> Path:
    """A folder of links in which train has `percent` of its photographs, chosen by a hash of their
    names; val and test are unchanged."""
    if percent == 100:
        return data
    if out.is_dir():
        return out
    names = names_of(data, "train")
    files = FileList.of("", map(os.fsencode, names))
    _, part = split_by_hash(files, np.zeros(len(names), np.int64), percent / 100)
    with built(out) as folder:
        for name in ("Annotations", "JPEGImages"):
            (folder / name).symlink_to(data / name)
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True)
        for split in ("val", "test"):
            (lists / f"{split}.txt").write_text("\n".join(names_of(data, split)) + "\n")
        (lists / "train.txt").write_text("\n".join(names[n] for n in part.tolist()) + "\n")
    return out


if __name__ == "__main__":
    raise SystemExit(main())
