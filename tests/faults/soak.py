"""A long run on every engine: memory and open files do not grow."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from sparse import available_engines
from tests.cli import begin, family, kill_all, metrics
from tests.conftest import write_pictures
from tests.faults.campaign import Generator, Row, Unavailable
from tests.faults.processes import home

ENGINES = ("patch", "minkowski", "dense")
MINUTES = 30
SETTLED = 10
"""Minutes after which nothing may grow; measured every five minutes from then on."""

GROWTH = 1.02
"""Largest growth of memory, from the five minutes before it settled to the last five."""


@cache
def many_pictures() -> Path:
    return write_pictures(home() / "many", 600)


def resources(pid: int) -> tuple[int, int]:
    """Return the resident bytes and open files of a process and its descendants.

    Pages that the processes share count in each, so a copy on write does not change the sum.
    """
    memory = files = 0
    for member in family(pid):
        with suppress(OSError):
            pages = int(Path(f"/proc/{member}/statm").read_text().split()[1])
            memory += pages * os.sysconf("SC_PAGE_SIZE")
            files += len(os.listdir(f"/proc/{member}/fd"))
    return memory, files


def soak(number: int, random: Generator, folder: Path) -> str:
    """Train atto with two workers, a save every 15 seconds and figures after every epoch."""
    engine = ENGINES[number]
    if engine not in available_engines():
        raise Unavailable(f"{engine} is not installed")
    out = folder / "run"
    command = [
        "pretrain", "--data", many_pictures(), "--out", out, "--engine", engine, "--img_size", 64,
        "--batch_size", 16, "--workers", 2, "--epochs", 100_000, "--checkpoint_minutes", 0.25,
        "--checkpoint_steps", 30,
        "--picture_epochs", 1,
    ]  # fmt: skip
    log = folder / "log"
    process = begin([sys.executable, "-W", "ignore", "-m", "fcmae", *map(str, command)], log)
    began = time.monotonic()
    saves: set[str] = set()
    last_save = 0.0
    samples: list[tuple[float, int, int]] = []
    while (minutes := (time.monotonic() - began) / 60) < MINUTES:
        assert process.poll() is None, log.read_text()[-1500:]
        found = {path.name for path in (out / "checkpoints").glob("step-*")}
        last_save = last_save if found <= saves else minutes
        saves |= found
        samples.append((minutes, *resources(process.pid)))
        time.sleep(1)
    kill_all(process)
    medians = []
    for last in range(SETTLED, MINUTES + 1, 5):
        some = [sample[1:] for sample in samples if last - 5 <= sample[0] < last]
        medians.append(np.median(np.array(some), axis=0))
    said = (
        f"{engine}: {metrics(out)[-1][0]} steps, {len(saves)} saves, "
        f"{', '.join(f'{memory / 1e6:.0f}' for memory, _ in medians)} MB, "
        f"{', '.join(f'{files:.0f}' for _, files in medians)} files"
    )
    (memory, files), (memory_late, files_late) = medians[0], medians[-1]
    assert MINUTES - last_save < 1, f"no recent save: {said}"
    assert len(saves) >= 2 * MINUTES, said  # further apart where the disk is slow
    assert memory_late <= GROWTH * memory, said
    assert files_late <= files + 2, said
    return said


ROWS = (
    Row("soak", f"{MINUTES} minutes on each engine with a save every 15 s: memory and open files "
        "do not grow", len(ENGINES), soak, short=0),
)  # fmt: skip
