"""The run folder: where things are in it, who may write to it, and what is recorded in it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fcmae.config.files import save_yaml
from fcmae.train.checkpoint import SavedCheckpoint, forget_after
from fcmae.train.trackers import Trackers
from sparse.errors import InputError, RunError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPaths:
    """Where things are in a run folder, `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """What was asked, for `--config`."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A JSON object for each logged step."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "train.log"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tb"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def exported(self) -> Path:
        """The model for timm, written when the run ends."""
        return self.root / "exported"

    @property
    def best(self) -> Path:
        """The best weights so far of fine-tuning, as a timm folder."""
        return self.root / "best"

    @property
    def bad_images(self) -> Path:
        """Each image that could not be read, and why."""
        return self.root / "bad_images.jsonl"

    @property
    def nonfinite(self) -> Path:
        """Each batch whose loss or gradient was not finite, with its images."""
        return self.root / "nonfinite.jsonl"

    @property
    def near_duplicates(self) -> Path:
        return self.root / "near_duplicates.jsonl"

    def images(self, part: str) -> Path:
        """The list of the images of one part of the run: `all`, `train` or `val`."""
        return self.root / f"images-{part}.npz"


class RunFolder:
    """Everything that one process, the main one, writes for a run.

    Args:
        config: the config, written as `config.yaml`.
        command: `pretrain` or `finetune`.
        start: the checkpoint that the run resumes from, if any; what is recorded and saved beyond
            it is cut off.

    Raises:
        InputError: another process is writing to the folder.
    """

    def __init__(self, config: Any, command: str, start: SavedCheckpoint | None) -> None:
        self.paths, self.command = RunPaths(Path(config.out)), command
        paths, step = self.paths, start.state["step"] if start else 0
        paths.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(paths.root)
        if step == 0:
            for file in (paths.metrics, paths.log, paths.bad_images, paths.nonfinite):
                file.unlink(missing_ok=True)
            shutil.rmtree(paths.tensorboard, ignore_errors=True)
        if config.resume not in ("auto", "never"):  # else only damaged ones can be beyond
            forget_after(paths.checkpoints, step)
        save_yaml(config, paths.config)
        _cut_metrics(paths.metrics, step, bool(start and start.state["epoch_end_due"]))
        self._metrics = paths.metrics.open("ab", buffering=0)
        self._unwritten: list[str] = []
        self._bad = {entry["path"] for entry in read_lines(paths.bad_images) if "path" in entry}
        self._handler = logging.FileHandler(paths.log, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in ("fcmae", "sparse", "finetune"):
            logging.getLogger(name).addHandler(self._handler)
        self.trackers = Trackers(paths.root, step + 1)

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Append a line to metrics.jsonl and its numbers to the trackers.

        Lines that the disk does not take now are kept and tried again with those that follow.
        """
        self._unwritten.append(json.dumps({"step": step, **metrics}) + "\n")
        try:
            self._write_metrics()
        except OSError as error:
            _log.warning("could not write %s: %s", self._metrics.name, error.strerror)
        self.trackers.log(metrics, step)

    def _write_metrics(self) -> None:
        while self._unwritten:
            line = self._unwritten[0].encode()
            written = self._metrics.write(line)
            if written != len(line):  # the disk is full: take back the part that it took
                self._metrics.truncate(self._metrics.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten.pop(0)

    def record_bad(self, bad: Iterable[tuple[str, str]]) -> int:
        """Note unreadable images, each once, and return how many distinct ones there are."""
        new = {path: reason for path, reason in bad if path not in self._bad}
        for path, reason in new.items():
            _append(self.paths.bad_images, {"path": path, "reason": reason})
            _log.warning("skipped an unreadable image: %s: %s", path, reason)
        self._bad.update(new)
        return len(self._bad)

    def record_nonfinite(self, step: int, loss: float, norm: float, names: list[str]) -> None:
        """Note an update that was not applied, with the images of its batch."""
        entry = {"step": step, "loss": f"{loss:g}", "grad_norm": f"{norm:g}", "paths": names}
        _append(self.paths.nonfinite, entry)

    def sync(self) -> None:
        """Make sure that what was logged is on the disk before a checkpoint refers to it.

        Raises:
            OSError: it is not, or the folder was moved or removed.
        """
        self._write_metrics()
        if not os.path.samestat(os.fstat(self._metrics.fileno()), os.stat(self._metrics.name)):
            raise OSError(f"{self.paths.root} is another folder than the one this run began in")
        os.fsync(self._metrics.fileno())
        self.trackers.flush()

    def close(self) -> None:
        self.trackers.finish()
        self._metrics.close()
        for name in ("fcmae", "sparse", "finetune"):
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        self._lock.close()


@contextmanager
def open_run(
    config: Any, command: str, start: SavedCheckpoint | None, main: bool
) -> Iterator[RunFolder | None]:
    """The folder of a run while it lasts; None on processes other than the main one."""
    folder = RunFolder(config, command, start) if main else None
    try:
        yield folder
    finally:
        if folder is not None:
            folder.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; what a crash cut short is skipped."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
    return found


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def check_bad_share(distinct_bad: int, total: int, most: float) -> None:
    """Stop a run whose data is broken.

    Raises:
        RunError: more than the share `most` of all files could not be read.
    """
    if distinct_bad > most * total:
        raise RunError(
            f"{distinct_bad} of {total} images could not be read, more than max_bad = "
            f"{most:.0%}: see bad_images.jsonl in the run folder, fix the data or raise --max_bad"
        )


def check_skips(what: str, skipped: int, nonfinite: str, most: int) -> None:
    """Stop a run whose loss is not finite, unless it may continue without that update.

    Args:
        what: says what happened, at which step.
        skipped: updates not applied so far, this one included.

    Raises:
        RunError: `nonfinite` is not `skip`, or more than `most` were skipped.
    """
    if nonfinite == "skip" and skipped <= most:
        return
    fix = "resume with --nonfinite skip, which skips such updates"
    if nonfinite == "skip":
        fix = f"--max_nonfinite {most} were skipped already"
    raise RunError(
        f"{what} and the last checkpoint is good; nonfinite.jsonl lists its images: {fix}, or "
        "repeat in a new --out with a lower --optim.base_lr, with --optim.clip_grad 1.0 or with "
        "--precision fp32"
    )


def _take_lock(folder: Path) -> TextIO:
    """Hold a POSIX record lock: it ends with this process and no child inherits it."""
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"out {str(folder)!r} is being written by {holder}: wait for it, or give another --out"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _cut_metrics(path: Path, step: int, end_due: bool) -> None:
    """Keep the whole lines up to `step`: what follows will be computed again, with `end_due` also
    the line that the end of its epoch has left, which is none of a step's own."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            if entry["step"] > step or (end_due and entry["step"] == step and "lr" not in entry):
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
