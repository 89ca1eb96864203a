"""The run folder: who may write to it, where a run continues, and what is recorded in it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from fcmae import __version__
from fcmae.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, newest_good
from fcmae.data.files import FileList
from fcmae.settings import differences, save_yaml, to_dict
from sparse.errors import InputError, RunError

NONFINITE = "nonfinite.jsonl"

_log = logging.getLogger(__name__)


def find_start(config: Any, command: str, runtime_keys: frozenset[str]) -> Checkpoint | None:
    """Decide where a run begins: at a checkpoint, or (None) at the start. Writes nothing.

    Args:
        config: has `out` and `resume`: `auto`, `never` or the path of a checkpoint.
        command: `pretrain` or `finetune`.
        runtime_keys: settings that may differ from the checkpoint's.

    Raises:
        InputError: the folder holds something else, a run with other settings, or a checkpoint
            named by the user is damaged.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out {config.out!r} is a file: give a folder that is new or holds a run")
    saved = list_checkpoints(out / "checkpoints")
    if not (out / "config.yaml").exists() and out.is_dir() and _foreign(out):
        raise InputError(
            f"out {config.out!r} holds {_foreign(out)[0]!r} and no run of fcmae: give a folder "
            "that is new or empty"
        )
    if config.resume not in ("auto", "never"):
        checkpoint = load_checkpoint(Path(config.resume))
        if saved and Path(config.resume).resolve().parent != (out / "checkpoints").resolve():
            raise InputError(
                f"out {config.out!r} already holds another run: give a new --out to go on from "
                f"{config.resume}"
            )
    else:
        if config.resume == "never" and saved:
            raise InputError(
                f"out {config.out!r} already holds a run: use --resume auto to go on with it, or "
                "give another --out"
            )
        newest = newest_good(out / "checkpoints")
        if newest is None:
            if saved:
                raise InputError(
                    f"all {len(saved)} checkpoints in {config.out!r} are damaged: give another "
                    "--out to start anew"
                )
            return None
        checkpoint = load_checkpoint(newest)
    _check_same_run(config, command, runtime_keys, checkpoint)
    return checkpoint


def _foreign(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def _check_same_run(
    config: Any, command: str, runtime_keys: frozenset[str], checkpoint: Checkpoint
) -> None:
    was_command = checkpoint.state.get("command")
    if was_command != command:
        raise InputError(
            f"out {config.out!r} holds a run of `fcmae {was_command}`, not of `fcmae {command}`: "
            "give another --out"
        )
    changed = differences(asked_settings(config), checkpoint.state["asked"], runtime_keys)
    if changed:
        key, was, now = changed[0]
        raise InputError(
            f"{key} is {now!r} but the run in {config.out!r} has {was!r}: repeat it with "
            f"--{key} '{was}', or give another --out"
        )


def asked_settings(config: Any) -> dict[str, Any]:
    """The config as JSON, its data paths absolute, so that it compares from any folder."""
    asked = json.loads(json.dumps(to_dict(config)))
    data = asked["data"]
    asked["data"] = [os.path.abspath(d) for d in ([data] if isinstance(data, str) else data)]
    return asked


def stored_files(found: FileList, start: Checkpoint | None, name: str) -> FileList:
    """The files that a run trains on: those found now, or where it goes on, those it began with.

    Files that came later are ignored with a notice; vanished ones will count as unreadable.
    """
    if start is None or start.path is None:
        return found
    stored = FileList.load(start.path.parent.parent / name)
    if len(found) > len(stored):
        _log.info("%d files more than when the run began are ignored", len(found) - len(stored))
    return stored


class RunFolder:
    """Everything that one process, the main one, writes for a run.

    Args:
        config: the config, written as `config.yaml`.
        command: `pretrain` or `finetune`.
        start_step: completed steps; what is recorded beyond them is cut off.

    Raises:
        InputError: another process is writing to the folder.
    """

    def __init__(self, config: Any, command: str, start_step: int) -> None:
        self.path = Path(config.out)
        self.checkpoints = self.path / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        if start_step == 0:
            for name in ("metrics.jsonl", "train.log", "bad_images.jsonl", NONFINITE):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tb", ignore_errors=True)
        save_yaml(config, self.path / "config.yaml")
        _cut_metrics(self.path / "metrics.jsonl", start_step)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._bad = _known_bad(self.path / "bad_images.jsonl")
        self._handler = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in ("fcmae", "sparse", "finetune"):
            logging.getLogger(name).addHandler(self._handler)
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.tensorboard = SummaryWriter(self.path / "tb", purge_step=start_step + 1)
        self.command = command

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Append a line to metrics.jsonl and its numbers to TensorBoard."""
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, name: str, step: int, image_HWC: np.ndarray) -> None:
        self.tensorboard.add_image(name, image_HWC, step, dataformats="HWC")

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
        """Make sure that what was logged is on the disk before a checkpoint refers to it."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        self.tensorboard.flush()

    def close(self) -> None:
        self.tensorboard.close()
        self._metrics.close()
        for name in ("fcmae", "sparse", "finetune"):
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        self._lock.close()


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


def _cut_metrics(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`: what follows will be computed again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
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
