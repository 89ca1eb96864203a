"""The same run on minkowski, patch and dense, to compare their loss curves.

    python -m benchmarks.experiments.engines --data FOLDER

FOLDER is any folder of images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.experiments.folders import shrink
from benchmarks.experiments.study import Study, arguments, curve, last_holdout_loss, plot

ENGINES = ("patch", "minkowski", "dense")


def main() -> int:
    options = arguments(__doc__ or "", "engines", img_size=96, epochs=10, side=192).parse_args()
    study = Study(options)
    data = shrink(options.data, study.out / "pictures", options.side)
    common = [
        "--img_size", options.img_size, "--epochs", options.epochs, "--log_steps", 1,
        "--precision", options.precision,
    ]  # fmt: skip

    def trained(engine: str) -> dict[str, Any]:
        run = study.pretrain(engine, data, *common, "--engine", engine)
        return {
            "loss": [loss for _, loss in curve(run, "loss", over="step")],
            "holdout_loss": last_holdout_loss(run),
        }

    steps = {name: partial(study.once, name, partial(trained, name)) for name in ENGINES}
    found = study.together(steps)
    losses = {engine: np.array(run["loss"]) for engine, run in found.items()}
    print("| engine | last loss | held-out loss | largest difference of a step's loss from patch |")
    print("|---|---:|---:|---:|")
    for engine, values in losses.items():
        far = np.abs(values - losses["patch"]).max()
        print(
            f"| `{engine}` | {values[-1]:.6f} | {found[engine]['holdout_loss']:.6f} | {far:.1e} |"
        )
    lines = [(name, range(1, len(y) + 1), y.tolist(), None) for name, y in losses.items()]
    plot(lines, ("step", "loss"), study.out / "engines.png", nested=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
