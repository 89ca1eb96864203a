"""Damaged checkpoints, and disks that are full, read-only or removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from fcmae.train.checkpoint import (
    damage,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    save_checkpoint,
)
from sparse.errors import InputError
from tests.cli import environment, kill_all, metrics, wait_for_steps
from tests.faults.campaign import Generator, Row, Unavailable
from tests.faults.processes import (
    assert_same,
    finish,
    home,
    launch,
    pretrain,
    undisturbed,
)

ROOM = 24
"""Size of the small disk in megabytes: about ten checkpoints."""


@cache
def two_checkpoints() -> Path:
    folder = home() / "checkpoints"
    state = {"epoch_end_due": False, "threads": 1, "asked": {}, "settings": {}, "images": {}}
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        tensors = {
            "model": {"weight": torch.randn(40, 40, generator=generator)},
            "optimizer": {"weight/exp_avg": torch.randn(40, 40, generator=generator)},
        }
        save_checkpoint(folder, step, tensors, state, keep=2)
    return folder


def damaged(
    number: int, random: Generator, folder: Path, source: Callable[[], Path] = two_checkpoints
) -> str:
    """A flipped bit or a truncated file: detected, skipped automatically, refused when named."""
    copy = folder / "checkpoints"
    shutil.copytree(source(), copy)
    newest, older = list_checkpoints(copy)[:2]
    files = sorted(newest.iterdir())
    file = files[number % len(files)]
    content = bytearray(file.read_bytes())
    place = int(random.integers(len(content)))
    if random.random() < 0.5:
        content[place] ^= 1 << int(random.integers(8))
        did = f"bit flipped in {file.name}"
    else:
        del content[place:]
        did = f"{file.name} cut to {place} bytes"
    file.write_bytes(content)
    if harmless_json(file, source() / newest.name / file.name):
        return f"{did}: same content"
    assert damage(newest) is not None, f"{did} at {place}: not detected"
    assert newest_good(copy) == older
    with pytest.raises(InputError, match="can't be used"):
        load_checkpoint(newest)
    return did


def harmless_json(file: Path, original: Path) -> bool:
    """Return whether a damaged manifest still names every file with its size and hash.

    The manifest has no hash of its own: whitespace in it may change.
    """
    if file.name != "manifest.json":
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return bool(found == json.loads(original.read_text()))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        raise Unavailable("mounting a small disk requires root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-R", "-l", str(disk)], check=True)


def no_room(number: int, random: Generator, folder: Path) -> str:
    """Full, read-only or removed during a run: checkpoints stay intact, and the run resumes."""
    kind = ("full", "read-only", "removed")[number % 3]
    with small_disk(folder) as disk:
        out = disk / "run"
        process = launch(pretrain(out, "--epochs", 400))
        wait_for_steps(out, int(random.integers(3, 40)), process)
        filler = disk / "filler"
        if kind == "full":
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(65536))
                except OSError:
                    pass
        elif kind == "read-only":
            checkpoints = str(out / "checkpoints")
            subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
            remount = ["mount", "-o", "remount,bind,ro", checkpoints]
            while subprocess.run(remount, capture_output=True).returncode:
                assert process.poll() is None  # a save in progress keeps it busy
        else:
            (disk / "run").rename(disk / "elsewhere")
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
        seconds = time.monotonic() - began
        said = " ".join(err.split())
        assert process.returncode == 1, f"exit {process.returncode}: {err[-1500:]}"
        assert "Traceback" not in err, err[-2500:]
        assert "error:" in said.rsplit("fcmae pretrain:", 1)[-1]
        if kind == "full":
            filler.unlink()
        elif kind == "read-only":
            subprocess.run(["umount", "-l", str(out / "checkpoints")], check=True)
        else:
            shutil.rmtree(out, ignore_errors=True)
            (disk / "elsewhere").rename(out)
        left = list((out / "checkpoints").glob(".partial-*"))
        # A partial save can't be removed from a disk that has become read-only.
        assert kind == "read-only" or not left, left
        good = list_checkpoints(out / "checkpoints")
        assert good, "no checkpoint is left"
        assert all(damage(path) is None for path in good)
        again = launch(pretrain(out, "--epochs", 400))
        wait_for_steps(out, len(metrics(out)) + 3, again)
        kill_all(again)
    return f"{kind}: ended after {seconds:.1f} s with {len(good)} good checkpoints"


def clock_and_place(number: int, random: Generator, folder: Path) -> str:
    """The clock set back, a locale without UTF-8, no HOME, no terminal, a closed stdout."""
    out = folder / "run"
    kind = ("clock", "locale", "HOME", "stdout", "stdin")[number % 5]
    command = pretrain(out)
    if kind == "clock":
        process = launch(command)
        wait_for_steps(out, 10, process)
        kill_all(process)
        ahead = time.time() + 10 * 365 * 86400
        for path in out.rglob("*"):
            os.utime(path, (ahead, ahead))
        finish(command)
    else:
        env = environment(LC_ALL="C", LANG="C") if kind == "locale" else environment()
        if kind == "HOME":
            env.pop("HOME", None)
        arguments = [sys.executable, "-W", "ignore", "-m", "fcmae", *command]
        shell = {"stdout": 'exec "$@" >&-', "stdin": 'exec "$@" <&-'}.get(kind, 'exec "$@"')
        done = subprocess.run(
            ["sh", "-c", shell, "sh", *arguments], env=env, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-1500:]
    assert_same(out, undisturbed()[0])
    return kind


ROWS = (
    Row("damage", "a bit flipped or a file truncated anywhere in a checkpoint: detected, skipped "
        "by the automatic resume, refused when named", 200, damaged, short=20),
    Row("disk", "disk full, read-only or the folder removed while running: one line, exit 1, the "
        "earlier checkpoints intact, no partial files; resumes once fixed", 50, no_room, short=1),
    Row("place", "files from the future, a locale without UTF-8, no HOME, closed stdout or stdin: "
        "works, bit-equal", 5, clock_and_place, short=2),
)  # fmt: skip
