"""Trials, their results on disk, and the table of them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.cli import reaped

Generator = np.random.Generator


class Unavailable(Exception):
    """This machine cannot inject the fault; the message says why."""


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        name: for `make faults ROW=name`.
        what: the fault, and what must hold.
        count: trials of the full campaign.
        trial: takes the trial's number, its own random generator and an empty folder; raises
            AssertionError if something does not hold, else returns a short description.
        short: trials in the tests.
    """

    name: str
    what: str
    count: int
    trial: Callable[[int, Generator, Path], str]
    short: int = 1


def run_trial(row: Row, number: int) -> str:
    """Run one trial in a folder that is removed afterwards."""
    seed = [number, *row.name.encode()]
    with tempfile.TemporaryDirectory(prefix=f"fcmae-{row.name}-") as folder, reaped():
        return row.trial(number, np.random.default_rng(seed), Path(folder))


def run_campaign(row: Row, results: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Run the trials that `results` does not hold yet, and store each as soon as it is done."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{row.name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = [json.loads(line) for line in lines]
    known = {entry["trial"] for entry in done}
    for number in range(min(row.count, count or row.count)):
        if number in known:
            continue
        began = time.monotonic()
        try:
            entry: dict[str, Any] = {"trial": number, "ok": True, "did": run_trial(row, number)}
        except Unavailable as reason:
            entry = {"trial": number, "ok": None, "did": str(reason)}
        except Exception as error:  # noqa: BLE001  # any failure is a result
            entry = {"trial": number, "ok": False, "did": f"{type(error).__name__}: {error}"[:2000]}
        entry["seconds"] = round(time.monotonic() - began, 1)
        done.append(entry)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{row.name} {number + 1}/{row.count}: {entry['ok']} {entry['did']}", flush=True)
    return done


def table(rows: Iterable[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| row | fault, and what must hold | trials | held | failed | not possible | median s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        done = results.get(row.name, [])
        if not done:
            continue
        counts = [sum(entry["ok"] is value for entry in done) for value in (True, False, None)]
        seconds = float(np.median([entry["seconds"] for entry in done]))
        lines.append(
            f"| `{row.name}` | {row.what} | {len(done)} of {row.count} | "
            f"{' | '.join(map(str, counts))} | {seconds:.1f} |"
        )
    return "\n".join(lines)
