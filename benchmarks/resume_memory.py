"""Resident memory of a resumed run after its first step, beside the run that was never stopped.

    .venv/bin/python benchmarks/resume_memory.py [--model base] [--img_size 64]

Both are read when step 4 is logged; the resumed run begins at the checkpoint of step 3. Linux only.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 3


def resident(arguments: list[str], folder: Path, steps: int) -> int:
    """Run `fcmae` until so many steps are logged, and return its resident memory in KiB.

    Args:
        arguments: of `fcmae pretrain`; the run folder is `run`.
        folder: where it is run.
        steps: lines of metrics.jsonl to wait for.
    """
    metrics = folder / "run" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "fcmae", *arguments], cwd=folder)
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        if process.poll() is not None:
            raise SystemExit("the run ended early")
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    process.kill()
    process.wait()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="base")
    parser.add_argument("--img_size", default="64")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = ["samples", "samples", "--per_class_train", "16"]
        subprocess.run([sys.executable, "-m", "fcmae", *samples], cwd=folder, check=True)
        run = ["pretrain", "--data", "samples/train", "--out", "run", "--model", options.model]
        run += ["--img_size", options.img_size, "--batch_size", "16", "--workers", "0"]
        run += ["--log_steps", "1", "--checkpoint_minutes", "0", "--epochs", "20"]
        whole = resident(run, folder, STEPS + 1)
        metrics = folder / "run" / "metrics.jsonl"
        metrics.unlink()
        resident([*run, "--checkpoint_steps", str(STEPS)], folder, STEPS + 1)
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics.write_text("".join(lines[:STEPS]), encoding="utf-8")
        resumed = resident([*run, "--checkpoint_steps", "999"], folder, STEPS + 1)
    print(
        f"{options.model}, {options.img_size} px: never stopped {whole / 1024:.0f} MB, resumed "
        f"{resumed / 1024:.0f} MB: {resumed / whole:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
