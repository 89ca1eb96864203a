"""A long run on every engine: memory and open files stay as they were."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from sparse import available_engines
from tests.cli import family, kill_all, metrics
from tests.conftest import write_pictures
from tests.faults.campaign import Generator, Row, Unavailable
from tests.faults.processes import home, launch

ENGINES = ("patch", "minkowski", "dense")
MINUTES = 30
SETTLED = 5
"""Minutes after which nothing may grow any more."""

GROWTH = 1.02
"""Most that memory may grow by, from the minutes after it settled to the last ones."""


@cache
def many_pictures() -> Path:
    return write_pictures(home() / "many", 600)


def resources(pid: int) -> tuple[int, int]:
    """Bytes of memory, each shared page divided among its users, and open files of a family."""
    memory = files = 0
    for member in family(pid):
        with suppress(OSError):
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            memory += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            files += len(os.listdir(f"/proc/{member}/fd"))
    return memory, files


def soak(number: int, random: Generator, folder: Path) -> str:
    """Train atto with two workers, a save every 15 seconds and pictures after every epoch."""
    engine = ENGINES[number]
    if engine not in available_engines():
        raise Unavailable(f"{engine} is not installed")
    out = folder / "run"
    command = [
        "pretrain", "--data", many_pictures(), "--out", out, "--engine", engine, "--img_size", 64,
        "--batch_size", 16, "--workers", 2, "--epochs", 100_000, "--checkpoint_minutes", 0.25,
        "--picture_epochs", 1,
    ]  # fmt: skip
    process = launch(list(map(str, command)))
    began = time.monotonic()
    saves: set[str] = set()
    samples: list[tuple[float, int, int]] = []
    while (minutes := (time.monotonic() - began) / 60) < MINUTES:
        assert process.poll() is None, process.communicate()[1][-1500:]
        saves.update(path.name for path in (out / "checkpoints").glob("step-*"))
        samples.append((minutes, *resources(process.pid)))
        time.sleep(1)
    kill_all(process)
    early = np.array([sample for sample in samples if SETTLED < sample[0] < 2 * SETTLED])
    late = np.array([sample for sample in samples if sample[0] > MINUTES - SETTLED])
    (memory, files), (memory_late, files_late) = (
        np.median(x[:, 1:], axis=0) for x in (early, late)
    )
    said = (
        f"{engine}: {metrics(out)[-1][0]} steps, {len(saves)} saves, "
        f"{memory / 1e6:.0f} → {memory_late / 1e6:.0f} MB, {files:.0f} → {files_late:.0f} files"
    )
    assert len(saves) >= MINUTES * 4 * 0.8, said
    assert memory_late <= GROWTH * memory, said
    assert files_late <= files, said
    return said


ROWS = (
    Row("soak", f"{MINUTES} minutes on each engine with a save every 15 s: memory and open files "
        "stay as they were", len(ENGINES), soak, short=0),
)  # fmt: skip
