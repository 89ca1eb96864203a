"""Processes that are killed, signalled, or lose a worker or a rank."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from fcmae.train.checkpoint import damage, list_checkpoints, newest_good
from sparse import available_engines
from tests.cli import (
    TINY,
    begin,
    family,
    has_steps,
    kill_all,
    metrics,
    start,
    until,
    wait_for_steps,
    weights,
)
from tests.conftest import write_classes, write_masks, write_pictures
from tests.faults.campaign import Generator, Row, Unavailable

EPOCHS = 16
STEPS = 48
SETTINGS = [*TINY, "--checkpoint_steps", "2"]
SHARED_MEMORY = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'


@cache
def home() -> Path:
    """A folder that all trials share, removed when this process ends."""
    keep = tempfile.TemporaryDirectory(prefix="fcmae-faults-")
    home_folders.append(keep)
    return Path(keep.name)


home_folders: list[tempfile.TemporaryDirectory[str]] = []


@cache
def pictures() -> Path:
    return write_pictures(home() / "pictures", 24)


@cache
def classes() -> Path:
    return write_classes(home() / "classes")


def pretrain(out: Path, *options: object) -> list[str]:
    arguments = ["pretrain", "--data", pictures(), "--out", out, *SETTINGS, *options]
    if "--epochs" not in options:
        arguments += ["--epochs", EPOCHS]
    return list(map(str, arguments))


@cache
def discs(masks: str = "masks") -> Path:
    """Twelve images of a disc to segment, and four to validate on; or to find, in `instances`."""
    for split, count in (("train", 12), ("val", 4)):
        write_masks(home() / f"discs-{masks}" / split, masks, count)
    return home() / f"discs-{masks}"


def segment(out: Path, *options: object) -> list[str]:
    """Fine-tuning on masks with the steps of `pretrain`."""
    return tuned(out, discs(), "segment", *options)


def instances(out: Path, *options: object) -> list[str]:
    """Fine-tuning on objects with masks, with the steps of `pretrain`."""
    return tuned(out, discs("instances"), "instances", *options)


def tuned(out: Path, data: Path, task: str, *options: object) -> list[str]:
    given = {
        "data": data, "task": task, "out": out, "model": "test_convnext", "weights": "none",
        "img_size": 64, "batch_size": 4, "decoder_channels": 16, "epochs": EPOCHS,
        "val_epochs": EPOCHS, "workers": 0, "log_steps": 1, "checkpoint_steps": 2,
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    return ["finetune", *map(str, [*words, *options])]


Command = Callable[..., list[str]]
"""A run to disturb: from its folder and further options to the arguments of `fcmae`."""


def launch(command: list[str], processes: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    """Start `fcmae …`, under torchrun if there are several processes."""
    if processes == 1:
        return start(*command)
    torchrun = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
        "--standalone", f"--nproc_per_node={processes}", f"--max_restarts={restarts}",
        "-m", "fcmae", *command,
    ]  # fmt: skip
    return begin(torchrun)


def finish(command: list[str], processes: int = 1) -> str:
    """Run a command to its end; return its stderr."""
    process = launch(command, processes)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    return err


def undisturbed(processes: int = 1, *options: str, train: Command = pretrain) -> tuple[Path, float]:
    """A run never stopped, and its duration in seconds; the same for all trials."""
    return _undisturbed(processes, options, train)


@cache
def _undisturbed(processes: int, options: tuple[str, ...], train: Command) -> tuple[Path, float]:
    out = home() / "-".join(["undisturbed", train.__name__, str(processes), *options])
    began = time.monotonic()
    finish(train(out, *options), processes)
    return out, time.monotonic() - began


def assert_same(out: Path, reference: Path) -> None:
    """Compare weights bit for bit, and every loss."""
    assert weights(out) == weights(reference), "weights differ from the run never stopped"
    assert metrics(out) == metrics(reference), "losses differ from the run never stopped"


def inside_save(out: Path, process: subprocess.Popen[str], random: Generator) -> bool:
    """Wait until a save, one of the next few, has begun."""
    seen: set[str] = set()
    wanted = int(random.integers(1, 8))

    def begun() -> bool:
        seen.update(path.name for path in (out / "checkpoints").glob(".partial-*"))
        return len(seen) >= wanted

    found = until(begun, process)
    time.sleep(float(random.uniform(0, 0.004)))
    return found


def killed(number: int, random: Generator, folder: Path, train: Command = pretrain) -> str:
    """SIGKILL twice, perhaps in the same epoch; then resume with another number of workers."""
    processes = 2 if number % 10 == 9 else 1
    minkowski = train is pretrain and number % 10 == 4 and has_minkowski()
    engine = ["--engine", "minkowski"] if minkowski else []
    reference, seconds = undisturbed(processes, *engine, train=train)
    out = folder / "run"
    did = []
    for _ in range(2):
        workers = int(random.choice([0, 2, 4]))
        process = launch(train(out, *engine, "--workers", workers), processes)
        if number % 2:
            inside_save(out, process, random)
        elif random.random() < 0.2:  # most likely while it starts
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=float(random.uniform(0, seconds)))
        else:
            steps = len(metrics(out)) + int(random.integers(1, STEPS // 2))
            until(partial(has_steps, out, steps), process)
            time.sleep(float(random.uniform(0, 0.02)))
        done = len(metrics(out))
        kill_all(process)
        did.append(f"after step {done}, {workers} workers")
        checkpoints = list_checkpoints(out / "checkpoints")
        assert all(damage(path) is None for path in checkpoints), "a damaged checkpoint in place"
        assert len(checkpoints) >= min(2, max(done - 1, 0) // 2), f"{checkpoints} after {done}"
    finish(train(out, *engine, "--workers", int(random.choice([0, 2, 4]))), processes)
    assert_same(out, reference)
    where = "in a save" if number % 2 else "anywhere"
    return f"{where}, {processes} × {engine[-1] if minkowski else 'patch'}: {'; '.join(did)}"


def has_minkowski() -> bool:
    return "minkowski" in available_engines()


def signalled(number: int, random: Generator, folder: Path, train: Command = pretrain) -> str:
    """SIGTERM or SIGUSR1: saved, exit 143, no step lost, and the same weights on resume."""
    moment = ("before the first step", "warm-up", "anywhere", "in a save", "evaluation")[number % 5]
    sent = (signal.SIGTERM, signal.SIGUSR1)[number // 5 % 2]
    processes = 2 if number % 10 == 7 else 1
    out = folder / "run"
    command = train(out)
    if moment == "evaluation" and train is not pretrain:
        command = train(out, "--val_epochs", 1, "--epochs", 4)
    elif moment == "evaluation":
        finetune = ["finetune", "--data", classes(), "--out", out, "--epochs", 4, "--img_size", 32,
                   "--batch_size", 8, "--workers", 0, "--log_steps", 1, "--weights", "none",
                   "--model", "atto"]  # fmt: skip
        command = list(map(str, finetune))
    process = launch(command, processes)
    if moment == "before the first step":
        until(lambda: (out / "train.log").exists(), process)
    elif moment == "in a save":
        inside_save(out, process, random)
    else:
        most = {"warm-up": 3, "anywhere": STEPS - 6, "evaluation": 9}[moment]
        steps = int(random.integers(1, most + 1))
        if moment == "evaluation":
            steps = steps // 3 * 3 + 3 if steps < 9 else 9  # the end of an epoch
        until(partial(has_steps, out, steps), process)
    targets = [process.pid]
    if processes == 2:  # torchrun forwards no SIGUSR1: a scheduler signals every process
        targets = [pid for pid in family(process.pid)[1:] if is_rank(pid)]
    for pid in targets:
        os.kill(pid, sent)
    _, err = process.communicate(timeout=60)
    if processes == 1:
        assert process.returncode == 143, f"exit {process.returncode}: {err[-1500:]}"
    good = newest_good(out / "checkpoints")
    assert good is not None, "nothing was saved"
    assert int(good.name[5:]) >= len(metrics(out)), "a completed step is lost"
    if moment != "evaluation":
        finish(command, processes)
        assert_same(out, undisturbed(processes, train=train)[0])
    else:
        finish(command)
    return f"{sent.name} {moment}, {processes} processes, saved at {good.name}"


def is_rank(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return b"fcmae" in command and b"torch.distributed.run" not in command


def not_finite(number: int, random: Generator, folder: Path, train: Command = pretrain) -> str:
    """One image makes one rank's loss overflow: no update on any, stop; then skip to the end."""
    processes = 1 + number % 2
    data, out = folder / "data", folder / "run"
    name, images = f"{int(random.integers(1000, 10000)):05d}.tif", data
    if train is segment:
        shutil.copytree(discs(), data)
        images = data / "train" / "images"
        mask = Image.fromarray(np.zeros((80, 80), np.uint8))
        mask.save(data / "train" / "masks" / f"{Path(name).stem}.png")
    else:
        shutil.copytree(pictures(), data)
    Image.fromarray(np.full((80, 80), 3e38, np.float32)).save(images / name)
    command = train(out, "--data", data, "--augment.std", "[0.1,0.1,0.1]", "--epochs", "4")
    began = time.monotonic()
    process = launch(command, processes)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err[-1500:]
    assert "not finite at step" in err
    assert name in (out / "nonfinite.jsonl").read_text()
    good = newest_good(out / "checkpoints")
    if good is not None:
        assert all(t.isfinite().all() for t in load_file(good / "model.safetensors").values())
    seconds = time.monotonic() - began
    finish([*command, "--nonfinite", "skip"], processes)
    for file in (out / "exported").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
    return f"{processes} processes, stopped in {seconds:.0f} s, then skipped"


def worker_lost(number: int, random: Generator, folder: Path, train: Command = pretrain) -> str:
    """A data worker is killed, or /dev/shm is too small: one line within 30 s; the run resumes."""
    out = folder / "run"
    command = train(out, "--workers", 2, "--epochs", 500)
    if number % 2:
        if os.geteuid() != 0:
            raise Unavailable("mounting a small /dev/shm requires root")
        shell = ["unshare", "-m", "sh", "-c", SHARED_MEMORY, "sh"]
        process = begin([*shell, sys.executable, "-W", "ignore", "-m", "fcmae", *command])
        began = time.monotonic()
    else:
        process = launch(command)
        wait_for_steps(out, int(random.integers(1, 30)), process)
        workers = family(process.pid)[1:]
        assert len(workers) >= 2, workers
        os.kill(workers[int(random.integers(len(workers)))], signal.SIGKILL)
        began = time.monotonic()
    _, err = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    last = err.strip().splitlines()[-1]
    assert process.returncode == 1, f"exit {process.returncode}: {err[-1500:]}"
    assert "Traceback" not in err, err[-1500:]
    assert "--workers" in " ".join(err.split()), last
    assert seconds <= 30, f"{seconds:.0f} s"
    process = launch([*command, "--workers", "0"])
    wait_for_steps(out, len(metrics(out)) + 2, process)
    kill_all(process)
    return f"{'/dev/shm of 64 kB' if number % 2 else 'worker killed'}, ended in {seconds:.1f} s"


def rank_lost(number: int, random: Generator, folder: Path) -> str:
    """A rank is killed under torchrun --max-restarts: the job finishes as if undisturbed."""
    reference, _ = undisturbed(2)
    out = folder / "run"
    process = launch(pretrain(out), 2, restarts=3)
    steps = int(random.integers(1, STEPS - 8))
    until(partial(has_steps, out, steps), process)
    ranks = [pid for pid in family(process.pid)[1:] if is_rank(pid)]
    assert len(ranks) == 2, ranks
    os.kill(ranks[int(random.integers(2))], signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    assert_same(out, reference)
    return f"killed after step {steps}"


def lock(number: int, random: Generator, folder: Path) -> str:
    """A second run on one folder is refused by host and process; an orphan does not hold it."""
    out = folder / "run"
    first = launch(pretrain(out, "--epochs", 500, "--workers", 2))
    wait_for_steps(out, 2, first)
    second = start(*pretrain(out, "--epochs", 500))
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2, err[-1500:]
    said = " ".join(err.split())
    assert f"process {first.pid} on {socket.gethostname()}" in said, said[-500:]
    os.kill(first.pid, signal.SIGKILL)
    first.wait(timeout=60)  # its workers may outlive it for a moment
    third = start(*pretrain(out, "--epochs", 500))
    wait_for_steps(out, len(metrics(out)) + 1, third)
    kill_all(third)
    return "refused, then free"


ROWS = (
    Row("kill", "SIGKILL at a random moment, half of them inside a save, twice in a row, with 0, 2 "
        "or 4 workers, some with 2 processes or on minkowski: weights and losses bit-equal to the "
        "run never stopped", 300, killed, short=2),
    Row("signal", "SIGTERM or SIGUSR1 before the first step, in warm-up, anywhere, in a save, in "
        "evaluation: saved on all ranks, exit 143, no step lost, bit-equal on resume", 100,
        signalled, short=1),
    Row("nonfinite", "a loss that overflows on one rank: no update on any, stop within 60 s, no "
        "poisoned checkpoint, files listed; --nonfinite skip finishes", 50, not_finite, short=2),
    Row("worker", "a data worker killed, or /dev/shm too small: the run ends within 30 s with one "
        "line that names a fix, and resumes", 50, worker_lost, short=1),
    Row("rank", "a rank killed under torchrun --max-restarts: the job finishes, bit-equal", 50,
        rank_lost),
    Row("lock", "two runs on one folder: the second is refused with the first one's host and "
        "process; orphaned workers hold nothing", 10, lock),
)  # fmt: skip
