"""Running the command line in a separate process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
"""A pretraining run with steps of milliseconds."""


def environment(**extra: str) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **extra}


_begun: list[subprocess.Popen[str]] = []


def begin(command: list[str], log: Path | None = None, **extra: str) -> subprocess.Popen[str]:
    """Start a command in its own session; see `reaped`.

    Its output goes to pipes, which hold 64 kB until they are read, or to `log` for long runs.
    """
    output: Any = subprocess.PIPE if log is None else log.open("w")
    process = subprocess.Popen(
        command, stdout=output, stderr=output, text=True, env=environment(**extra),
        start_new_session=True,
    )  # fmt: skip
    if log is not None:
        output.close()
    _begun.append(process)
    return process


def start(*arguments: object, **extra: str) -> subprocess.Popen[str]:
    """Start `fcmae …`."""
    return begin([sys.executable, "-W", "ignore", "-m", "fcmae", *map(str, arguments)], **extra)


@contextmanager
def reaped() -> Iterator[None]:
    """Clean up after commands begun inside: leave no process and no open pipe."""
    before = len(_begun)
    try:
        yield
    finally:
        for process in _begun[before:]:
            kill_all(process)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what outlived its parent
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        del _begun[before:]


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a process and all its descendants, and wait for it."""
    if process.poll() is None:
        for pid in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)


def family(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [pid], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def run(*arguments: object, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `fcmae …` to its end and check its exit code."""
    process = start(*arguments, **extra)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait for a condition; return False if the process ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.0005)
    return True


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged `steps` steps; it must not end before."""
    assert until(lambda: has_steps(out, steps), process), process.communicate()[1]


def has_steps(out: Path, steps: int) -> bool:
    return len(metrics(out)) >= steps


def metrics(out: Path, key: str = "loss") -> list[tuple[int, Any]]:
    """Return (step, value) of the logged steps that have `key`."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:  # a run that starts removes the files of an earlier one
        lines = []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record[key]) for record in records if key in record]


def weights(out: Path) -> bytes:
    """The bytes of all exported weights."""
    files = sorted((out / "exported").rglob("*.safetensors"))
    return b"".join(file.read_bytes() for file in files)
