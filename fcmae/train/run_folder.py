"""The run folder: who may write to it, and what is recorded in it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from fcmae import __version__
from fcmae.config.values import save_yaml
from fcmae.train.checkpoint import SavedCheckpoint, forget_after
from sparse.errors import InputError, RunError

NONFINITE = "nonfinite.jsonl"

_log = logging.getLogger(__name__)


class RunFolder:
    """Everything that one process, the main one, writes for a run.

    Args:
        config: the config, written as `config.yaml`.
        command: `pretrain` or `finetune`.
        start_step: completed steps; what is recorded and saved beyond them is cut off.
        end_due: the epoch that they complete is still to be ended, and logged.

    Raises:
        InputError: another process is writing to the folder.
    """

    def __init__(self, config: Any, command: str, start_step: int, end_due: bool = False) -> None:
        self.path = Path(config.out)
        self.checkpoints = self.path / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        if start_step == 0:
            for name in ("metrics.jsonl", "train.log", "bad_images.jsonl", NONFINITE):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tb", ignore_errors=True)
        if config.resume not in ("auto", "never"):  # else only damaged ones can be beyond
            forget_after(self.checkpoints, start_step)
        save_yaml(config, self.path / "config.yaml")
        _cut_metrics(self.path / "metrics.jsonl", start_step, end_due)
        self._metrics = (self.path / "metrics.jsonl").open("ab", buffering=0)
        self._unwritten: list[str] = []
        self._bad = _known_bad(self.path / "bad_images.jsonl")
        self._handler = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in ("fcmae", "sparse", "finetune"):
            logging.getLogger(name).addHandler(self._handler)
        self._hook = threading.excepthook
        threading.excepthook = _quiet_tensorboard(self._hook)
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.tensorboard: Any = SummaryWriter(self.path / "tb", purge_step=start_step + 1)
        self.command = command

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Append a line to metrics.jsonl and its numbers to TensorBoard.

        Lines that the disk does not take now are kept and tried again with those that follow.
        """
        self._unwritten.append(json.dumps({"step": step, **metrics}) + "\n")
        try:
            self._write_metrics()
        except OSError as error:
            _log.warning("could not write %s: %s", self._metrics.name, error.strerror)
        for name, value in metrics.items():
            self._to_tensorboard(partial(_scalar, name=name, value=value, step=step))

    def picture(self, name: str, step: int, image_HWC: np.ndarray) -> None:
        self._to_tensorboard(
            lambda board: board.add_image(name, image_HWC, step, dataformats="HWC")
        )

    def _write_metrics(self) -> None:
        while self._unwritten:
            line = self._unwritten[0].encode()
            written = self._metrics.write(line)
            if written != len(line):  # the disk is full: take back the part that it took
                self._metrics.truncate(self._metrics.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten.pop(0)

    def _to_tensorboard(self, write: Callable[[Any], object]) -> None:
        """Write to TensorBoard, for as long as it can: a run does not end for want of it."""
        if self.tensorboard is None:
            return
        try:
            write(self.tensorboard)
        except Exception as error:  # noqa: BLE001  # its writer raises what any file system does
            _log.warning("TensorBoard gets no more of this run until it is resumed: %s", error)
            self.tensorboard = None

    def record_bad(self, bad: Iterable[tuple[str, str]]) -> int:
        """Note unreadable files, each once, and return how many distinct ones there are."""
        new = {path: reason for path, reason in bad if path not in self._bad}
        if new:
            with (self.path / "bad_images.jsonl").open("a", encoding="utf-8") as file:
                for path, reason in new.items():
                    file.write(json.dumps({"path": path, "reason": reason}) + "\n")
                    _log.warning("skipped an unreadable picture: %s: %s", path, reason)
            self._bad.update(new)
        return len(self._bad)

    def record_nonfinite(self, step: int, loss: float, norm: float, names: list[str]) -> None:
        """Note an update that was not applied, with the files of its batch."""
        entry = {"step": step, "loss": f"{loss:g}", "grad_norm": f"{norm:g}", "paths": names}
        with (self.path / NONFINITE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def sync(self) -> None:
        """Make sure that what was logged is on the disk before a checkpoint refers to it.

        Raises:
            OSError: it is not, or the folder was moved or removed.
        """
        self._write_metrics()
        if not os.path.samestat(os.fstat(self._metrics.fileno()), os.stat(self._metrics.name)):
            raise OSError(f"{self.path} is another folder than the one this run began in")
        os.fsync(self._metrics.fileno())
        self._to_tensorboard(lambda board: board.flush())

    def close(self) -> None:
        self._to_tensorboard(lambda board: board.close())
        self._metrics.close()
        for name in ("fcmae", "sparse", "finetune"):
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        self._lock.close()
        threading.excepthook = self._hook


def open_run(config: Any, command: str, start: SavedCheckpoint | None) -> RunFolder:
    """The folder of a run that begins anew, or at a checkpoint."""
    if start is None:
        return RunFolder(config, command, 0)
    return RunFolder(config, command, start.state["step"], start.state["epoch_end_due"])


def _scalar(board: Any, name: str, value: float, step: int) -> None:
    board.add_scalar(name, value, step)


def _quiet_tensorboard(otherwise: Callable[[Any], object]) -> Callable[[Any], object]:
    """Leave out the traceback of TensorBoard's own thread: `_to_tensorboard` says what happened."""

    def hook(failure: Any) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard"):
            otherwise(failure)

    return hook


def versions() -> dict[str, str]:
    """What computed this: recorded in each checkpoint."""
    return {
        "fcmae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def names_of(model: torch.nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def check_bad_share(distinct_bad: int, total: int, most: float) -> None:
    """Stop a run whose data is broken.

    Raises:
        RunError: more than the share `most` of all files could not be read.
    """
    if distinct_bad > most * total:
        raise RunError(
            f"{distinct_bad} of {total} pictures could not be read, more than max_bad = "
            f"{most:.0%}: see bad_images.jsonl in the run folder, mend the data or raise --max_bad"
        )


def check_skips(what: str, skipped: int, nonfinite: str, most: int) -> None:
    """Stop a run whose loss is not finite, unless it may go on without that update.

    Args:
        what: says what happened, at which step.
        skipped: updates not applied so far, this one included.

    Raises:
        RunError: `nonfinite` is not `skip`, or more than `most` were skipped.
    """
    if nonfinite == "skip" and skipped <= most:
        return
    cure = "go on with --nonfinite skip, which leaves such updates out"
    if nonfinite == "skip":
        cure = f"--max_nonfinite {most} were skipped already"
    raise RunError(
        f"{what} and the last checkpoint is good; {NONFINITE} lists its pictures: {cure}, or "
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


def _known_bad(path: Path) -> dict[str, str]:
    known = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                known[entry["path"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a crash
    return known
