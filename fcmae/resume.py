"""Where a run begins: anew, or at a checkpoint of the same run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from fcmae.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, newest_good
from fcmae.data.files import FileList
from fcmae.settings import differences, to_dict
from sparse.errors import InputError

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
