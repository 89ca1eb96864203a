"""Smaller patches on small images: 32, 16 and 8 pixels, three seeds of pretraining each.

    python -m benchmarks.experiments.patch_sizes --data FOLDER [--sizes 32 16]

FOLDER is a folder of classes, whose labels are used only for evaluation: fine-tuning on a tenth of
them, and frozen features. All runs see the same images equally often; a patch half as wide is four
times the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.experiments.judge import NOTHING, compare
from benchmarks.experiments.study import Study, arguments

SIZES, SEEDS = (32, 16, 8), range(3)
SCORES = ("linear", "knn20", "tuned")


def main() -> int:
    parser = arguments(__doc__ or "", "patch_sizes", img_size=64, epochs=60, side=80)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES)
    options = parser.parse_args()
    runs = {
        name_of(size, seed): ["--engine", "patch", "--patch_size", size, "--seed", seed]
        for size in options.sizes
        for seed in SEEDS
    }
    found = compare(Study(options), options, runs)
    print(f"{NOTHING}: fine-tuned {found[NOTHING]['tuned']:.1f} %, patches of 32\n")
    print(f"| patch | {' | '.join(SCORES)} | images/s |")
    print("|---|---:|---:|---:|---:|")
    for size in options.sizes:
        print(row(size, [found[name_of(size, seed)] for seed in SEEDS]))
    return 0


def name_of(size: int, seed: int) -> str:
    return f"patch-{size}-seed-{seed}"


def row(size: int, judged: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each score, in percent."""
    cells = []
    for score in SCORES:
        values = np.array([one[score] for one in judged])
        cells.append(f"{values.mean():.1f} ± {values.std(ddof=1):.1f}")
    speed = np.median([one["images_per_s"] for one in judged])
    return f"| {size} | {' | '.join(cells)} | {speed:.0f} |"


if __name__ == "__main__":
    raise SystemExit(main())
