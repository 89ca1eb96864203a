"""A step of training in this checkout beside the same step in another, such as an earlier commit.

    git worktree add ../before COMMIT
    .venv/bin/python -m benchmarks.compare ../before [--command finetune] [--rounds 30]

Both train on the same sample images through the command line, one process each. They take turns:
while one runs, the other is stopped, so that a machine whose speed drifts slows both equally. A
turn lasts until a number of further steps is logged. Prints the median ratio of the turns' times
and its 95 % interval from resampled rounds.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ratios import summary

HERE = Path(__file__).resolve().parent.parent
WARM_UP = 5
OPTIONS = {
    "pretrain": ["--data", "samples/train", "--img_size", "128", "--batch_size", "16"],
    "finetune": [
        "--data",
        "samples",
        "--img_size",
        "128",
        "--batch_size",
        "16",
        "--val_epochs",
        "999",
    ],
}
COMMON = ["--epochs", "999", "--workers", "0", "--log_steps", "1", "--checkpoint_minutes", "0"]


class Run:
    """A run of training that is stopped except during its turns.

    Args:
        checkout: the code that it runs.
        command: `pretrain` or `finetune`.
        folder: where `samples` are and `name` is written.
        name: of the run.
    """

    def __init__(self, checkout: Path, command: str, folder: Path, name: str) -> None:
        self._metrics = folder / name / "metrics.jsonl"
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fcmae", command, *OPTIONS[command], *COMMON, "--out", name],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, steps: int) -> float:
        """Run until `steps` further steps are logged, and return the seconds that it took."""
        until, began = self._count() + steps, time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        while self._count() < until:
            if self._process.poll() is not None:
                raise SystemExit(f"a run ended: see {self._log.name}")
            time.sleep(0.001)
        self._process.send_signal(signal.SIGSTOP)
        return time.perf_counter() - began

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _count(self) -> int:
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--command", choices=sorted(OPTIONS), default="pretrain")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = [sys.executable, "-m", "fcmae", "samples", "samples", "--per_class_train", "16"]
        subprocess.run(samples, cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE)}, check=True)
        runs = [
            Run(checkout, options.command, folder, side)
            for checkout, side in ((HERE, "here"), (options.other.resolve(), "other"))
        ]
        for run in runs:
            run.turn(WARM_UP)
        ratios = []
        for number in range(options.rounds):
            order = runs if number % 2 else runs[::-1]
            seconds = {id(run): run.turn(options.steps) for run in order}
            ratios.append(seconds[id(runs[0])] / seconds[id(runs[1])])
        for run in runs:
            run.end()
    print(
        f"{options.command}: the time of {options.steps} steps here ÷ in the other checkout: "
        f"{summary(ratios)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
