"""Where a run begins: at the start, or at a checkpoint of the same run."""

import hashlib
import json
import logging
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fcmae.atomic import check_out_folder
from fcmae.config.fields import asked_settings, leaves, runtime_keys
from fcmae.config.files import read_yaml
from fcmae.config.values import differences, flatten
from fcmae.data.find import load_source
from fcmae.data.sources import Source
from fcmae.train.checkpoint import (
    MANIFEST,
    SavedCheckpoint,
    damage,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    open_checkpoint,
)
from fcmae.train.processes import World
from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError

SHOWN_WITHIN = 120.0
"""Seconds until a shared file system shows what another machine wrote: NFS may take 60."""

_log = logging.getLogger(__name__)


def agree_on_start(config: Any, command: str, world: World) -> SavedCheckpoint | None:
    """Begin where the main process finds that the run begins; see `find_start`.

    The others wait for its checkpoint, which a shared file system may show them late.

    Raises:
        InputError: on all processes, if the main one raises it or another does not see the
            checkpoint.
    """
    found = world.prepare(lambda: find_start(config, command) if world.is_main else None)
    if world.size == 1:
        return found
    place = world.gather(found and _Place.of(found, RunPaths(Path(config.out))))[0]
    return world.prepare(lambda: found or (place and place.wait(config)))


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint is, on machines that may mount its disk elsewhere.

    Attributes:
        name: its folder among those of the run; None if `resume` names it.
        manifest: SHA-256 of its manifest, and so of everything in it.
        lists: names of the image lists beside it.
    """

    name: str | None
    manifest: str
    lists: tuple[str, ...]

    @classmethod
    def of(cls, found: SavedCheckpoint, paths: RunPaths) -> "_Place":
        name = found.path.name if found.path.parent == paths.checkpoints else None
        lists = found.path.parent.parent.glob(paths.images("*").name)
        return cls(name, _digest(found.path), tuple(sorted(path.name for path in lists)))

    def wait(self, config: Any) -> SavedCheckpoint:
        """Wait until all of it is seen on this machine.

        Raises:
            InputError: it is not, after `SHOWN_WITHIN` seconds.
        """
        checkpoints = RunPaths(Path(config.out)).checkpoints
        path = checkpoints / self.name if self.name else Path(config.resume)
        deadline, waiting = time.monotonic() + SHOWN_WITHIN, False
        while reason := self._difference(path):
            what = f"checkpoint {str(path)!r} of process 0 is not here ({reason})"
            if time.monotonic() > deadline:
                raise InputError(
                    f"after {SHOWN_WITHIN:.0f} s, {what}: put --out on a disk that all share"
                )
            if not waiting:
                _log.warning("%s: waiting for it, at most %.0f s", what, SHOWN_WITHIN)
            waiting = True
            time.sleep(0.5)
        return open_checkpoint(path)

    def _difference(self, path: Path) -> str | None:
        try:
            if _digest(path) != self.manifest:
                return f"its {MANIFEST} is another"
        except OSError as error:
            return f"{MANIFEST}: {error.strerror}"
        root = path.parent.parent
        missing = [name for name in self.lists if not (root / name).is_file()]
        return f"{missing[0]} is missing" if missing else damage(path)


def _digest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


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


def shared_values(config: Any, *sources: Source) -> dict[str, Any]:
    """What all processes of a run must have in common: settings and images.

    They may differ in device, workers and paths, as on machines that mount a disk elsewhere: the
    images are compared by their keys.
    """
    known = leaves(type(config))
    own = {"out", "device", "workers", *(key for key in known if known[key].path)}
    shared = {key: value for key, value in flatten(asdict(config)).items() if key not in own}
    for number, source in enumerate(sources, 1):
        shared[f"a number of images (list {number}) of"] = len(source)
        shared[f"names of images (list {number}) with the SHA-256"] = source.fingerprint()
    return shared


def stored_source(start: SavedCheckpoint, part: str) -> Source:
    """The images that a resumed run began with, of one part; see `RunPaths.images`.

    Files that vanished count as unreadable.

    Raises:
        InputError: the list is missing, damaged, or of another run; or a shard has changed.
    """
    path = RunPaths(start.path.parent.parent).images(part)
    stored = load_source(path)
    if stored.fingerprint() != start.state["images"].get(part):
        raise InputError(f"file list {str(path)!r} is not of this run: restore it or start over")
    return stored
