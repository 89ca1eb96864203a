"""The same run on minkowski, patch and dense: the same curve.

    python -m benchmarks.experiments.engines --data FOLDER

FOLDER is any folder of pictures.
"""

from __future__ import annotations

import numpy as np

from benchmarks.experiments.study import Study, arguments, logged, plot

ENGINES = ("patch", "minkowski", "dense")


def main() -> int:
    parser = arguments(__doc__ or "", "engines")
    parser.add_argument("--img_size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    study = Study(options)
    common = ["--img_size", options.img_size, "--epochs", options.epochs, "--log_steps", 1]
    losses, held = {}, {}
    for engine in ENGINES:
        run = study.pretrain(
            engine, options.data, *common, "--engine", engine, "--precision", options.precision
        )
        losses[engine] = np.array([entry["loss"] for entry in logged(run, "loss")])
        ends = logged(run, "holdout_loss")
        held[engine] = ends[-1]["holdout_loss"] if ends else float("nan")  # under 500 pictures
    print("| engine | last loss | held-out loss | largest difference of a step's loss to patch |")
    print("|---|---:|---:|---:|")
    for engine, values in losses.items():
        far = np.abs(values - losses["patch"]).max()
        print(f"| `{engine}` | {values[-1]:.6f} | {held[engine]:.6f} | {far:.1e} |")
    lines = [(name, range(1, len(y) + 1), y.tolist(), None) for name, y in losses.items()]
    plot(lines, ("step", "loss"), study.out / "engines.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
