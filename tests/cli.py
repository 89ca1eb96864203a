"""Running the command line in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TINY = [
    "--depths",
    "[1,1,1,1]",
    "--dims",
    "[8,16,24,32]",
    "--decoder.dim",
    "16",
    "--img_size",
    "64",
    "--batch_size",
    "8",
    "--log_steps",
    "1",
    "--checkpoint_steps",
    "5",
    "--workers",
    "0",
    "--engine",
    "patch",
]
"""A pretraining run of milliseconds a step."""


def environment(**extra: str) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **extra}


def start(*arguments: object, **extra: str) -> subprocess.Popen[str]:
    """Start `fcmae …` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fcmae", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**extra),
        start_new_session=True,
    )  # fmt: skip


def run(*arguments: object, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `fcmae …` to its end and check its exit code."""
    process = start(*arguments, **extra)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged so many steps."""
    deadline = time.monotonic() + 120
    while len(metrics(out)) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(out: Path, key: str = "loss") -> list[tuple[int, Any]]:
    """(step, value) of the logged steps that have `key`."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record[key]) for record in records if key in record]


def weights(out: Path) -> bytes:
    return (out / "exported" / "model.safetensors").read_bytes()
