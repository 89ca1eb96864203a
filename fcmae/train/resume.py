"""Where a run begins: at the start, or at a checkpoint of the same run."""

import json
import logging
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fcmae.atomic import check_out_folder
from fcmae.config.fields import asked_settings, leaves, runtime_keys
from fcmae.config.files import read_yaml
from fcmae.config.values import differences, flatten
from fcmae.data.file_list import FileList
from fcmae.data.sources import Source
from fcmae.train.checkpoint import (
    SavedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError

_log = logging.getLogger(__name__)


def find_start(config: Any, command: str) -> SavedCheckpoint | None:
    """Decide where a run begins: at a checkpoint, or (None) at the start. Writes nothing.

    Args:
        config: has `out` and `resume`: `auto`, `never` or the path of a checkpoint.
        command: `pretrain` or `finetune`.

    Raises:
        InputError: the folder holds something else or a run with other settings, or the checkpoint
            that `resume` names is damaged.
    """
    paths = RunPaths(check_out_folder(config.out))
    saved = list_checkpoints(paths.checkpoints)
    if paths.root.is_dir() and not saved:
        _check_unused(paths)
    if config.resume == "never" and saved:
        raise InputError(
            f"out {config.out!r} already holds a run: use --resume auto or give another --out"
        )
    newest = newest_checkpoint(paths.checkpoints)
    if config.resume not in ("auto", "never"):
        newest = _named(config, saved, newest)
    elif saved and newest is None:
        raise InputError(f"all checkpoints in {config.out!r} are damaged: give another --out")
    if newest is not None:
        _check_same_run(config, command, newest)
    return newest


def _named(config: Any, saved: list[Path], newest: SavedCheckpoint | None) -> SavedCheckpoint:
    """The checkpoint that `resume` names, or the newest that continued it: the same command, given
    again, resumes and does not go back again."""
    named = Path(config.resume)
    asked = asked_settings(config)["resume"]
    if newest is not None and newest.state["asked"].get("resume") == asked:
        _log.info("resuming from the newest checkpoint that continued %s", named)
        return newest
    if not named.is_dir():
        there = f" or one of {', '.join(map(str, saved))}" if saved else " or a checkpoint's path"
        raise InputError(f"resume {config.resume!r} is not a checkpoint: give auto, never{there}")
    if saved and named.resolve().parent != saved[0].parent.resolve():
        raise InputError(
            f"out {config.out!r} already holds another run: give a new --out to continue {named}"
        )
    return load_checkpoint(named)


def _check_unused(paths: RunPaths) -> None:
    """Refuse a folder without checkpoints that a new run must not overwrite.

    Raises:
        InputError: it holds anything but a run that never saved.
    """
    out = paths.root
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if not names:
        return
    run = {"data", "out", "keep_checkpoints"}
    if not paths.config.is_file() or not run <= read_yaml(paths.config).keys():
        raise InputError(
            f"out {str(out)!r} holds {names[0]!r}, which is not a run of fcmae: give a new folder"
        )
    if paths.exported.exists():
        raise InputError(
            f"out {str(out)!r} holds a finished run whose checkpoints are gone: give another --out"
        )


def _check_same_run(config: Any, command: str, checkpoint: SavedCheckpoint) -> None:
    if (other := checkpoint.state.get("command")) != command:
        raise InputError(f"out {config.out!r} is a run of `fcmae {other}`: give another --out")
    # A setting that is newer than the checkpoint had what is now its default.
    defaults = asdict(type(config)(data=config.data, out=config.out))
    stored = flatten(defaults) | flatten(checkpoint.state["asked"])
    changed = differences(asked_settings(config), stored, runtime_keys(type(config)))
    if changed:
        key, was, now = changed[0]
        if key == "data":  # one folder is shown as it was given, not as a list
            was, now = (value[0] if len(value) == 1 else value for value in (was, now))
        text = was if isinstance(was, str) else json.dumps(was, separators=(",", ":"))
        moved = " (a link to the images if they moved)" if key == "data" else ""
        raise InputError(
            f"{key} is {now!r} but the run in {config.out!r} has {was!r}: repeat it with "
            f"--{key} {shlex.quote(text)}{moved}, or give another --out"
        )


def shared_values(config: Any, step: int, *sources: Source) -> dict[str, Any]:
    """What all processes of a run must have in common: settings, first step and images.

    They may differ in device, workers and paths, as on machines that mount a disk elsewhere: the
    images are compared by their keys.
    """
    known = leaves(type(config))
    own = {"out", "device", "workers", *(key for key in known if known[key].path)}
    return {
        **{key: value for key, value in flatten(asdict(config)).items() if key not in own},
        "a first step after": step,
        **{f"files (list {n})": (len(s), s.fingerprint()) for n, s in enumerate(sources, 1)},
    }


def stored_files(found: Source | None, start: SavedCheckpoint, part: str) -> FileList:
    """The files that a resumed run began with, of one part; see `RunPaths.images`.

    Files in `found` that were added since are ignored, and their number is logged. Files that
    vanished count as unreadable.

    Raises:
        InputError: the list is missing, damaged, or of another run.
    """
    path = RunPaths(start.path.parent.parent).images(part)
    stored = FileList.load(path)
    if stored.fingerprint() != start.state["images"].get(part):
        raise InputError(f"file list {str(path)!r} is not of this run: restore it or start over")
    if found is not None and len(found) > len(stored):
        _log.info("%d files added since the run began are ignored", len(found) - len(stored))
    return stored
