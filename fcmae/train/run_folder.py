"""The run folder while a run writes to it: the lock, and what is recorded in it."""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fcmae import PACKAGES
from fcmae.atomic import atomic_write
from fcmae.config.values import flatten
from fcmae.train.checkpoint import SavedCheckpoint, forget_after
from fcmae.train.run_paths import RunPaths
from fcmae.train.trackers import Trackers
from sparse.errors import InputError

_log = logging.getLogger(__name__)


class RunFolder:
    """Everything that the main process writes for a run.

    Args:
        config: of the run.
        start: the checkpoint that the run resumes from, if any; later records and checkpoints are
            deleted.

    Raises:
        InputError: another process is writing to the folder.
    """

    def __init__(self, config: Any, start: SavedCheckpoint | None) -> None:
        paths = self.paths = RunPaths(Path(config.out))
        step = start.state["step"] if start else 0
        paths.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(paths.root)
        if step == 0:
            old = paths.metrics, paths.log, paths.bad_images, paths.nonfinite, paths.trackers
            for file in old:
                file.unlink(missing_ok=True)
            for folder in (paths.tensorboard, paths.best, paths.figures):
                shutil.rmtree(folder, ignore_errors=True)
        if config.resume not in ("auto", "never"):  # else only damaged ones can be later
            forget_after(paths.checkpoints, step)
        _cut_metrics(paths.metrics, step, bool(start and start.state["epoch_end_due"]))
        self._metrics = paths.metrics.open("ab", buffering=0)
        self._unwritten: list[str] = []
        self._bad = {entry["path"] for entry in read_lines(paths.bad_images) if "path" in entry}
        self._handler = logging.FileHandler(paths.log, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in PACKAGES:
            logging.getLogger(name).addHandler(self._handler)
        settings = flatten(asdict(config))
        self.trackers = Trackers(paths, step + 1, config.trackers, settings)

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Append a line to metrics.jsonl and its numbers to the trackers.

        Lines that can't be written now are kept and written with the next ones.
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
            if written != len(line):  # the disk is full: remove the part that was written
                self._metrics.truncate(self._metrics.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten.pop(0)

    def record_bad(self, bad: Iterable[tuple[str, str]]) -> int:
        """Record unreadable images, each once, and return the number of distinct ones."""
        for path, reason in dict(bad).items():
            if path not in self._bad:
                _append(self.paths.bad_images, {"path": path, "reason": reason})
                _log.warning("skipped an unreadable image: %s: %s", path, reason)
                self._bad.add(path)
        return len(self._bad)

    def record_nonfinite(self, step: int, loss: float, norm: float, names: list[str]) -> None:
        """Record an update that was not applied, with the images of its batch."""
        entry = {"step": step, "loss": f"{loss:g}", "grad_norm": f"{norm:g}", "paths": names}
        _append(self.paths.nonfinite, entry)

    def sync(self) -> None:
        """Make sure that all logged lines are on the disk before a checkpoint refers to them.

        Raises:
            OSError: they are not, or the folder was moved or removed.
        """
        self._write_metrics()
        if not os.path.samestat(os.fstat(self._metrics.fileno()), os.stat(self._metrics.name)):
            raise OSError(f"{self.paths.root} is not the folder that this run began in")
        os.fsync(self._metrics.fileno())
        self.trackers.flush()

    def close(self) -> None:
        self.trackers.finish()
        self._metrics.close()
        for name in PACKAGES:
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        self._lock.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a crash cut short is skipped."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


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
    """Keep the complete lines up to `step`: later ones will be computed again. With `end_due`, so
    will the end of its epoch, whose line is not that of a step."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            if entry["step"] > step or (end_due and entry["step"] == step and "lr" not in entry):
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(kept))
