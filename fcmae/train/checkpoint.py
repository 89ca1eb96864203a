"""Checkpoints that are complete or absent: written aside, synced, renamed, verified, then pruned.

A checkpoint is a folder of safetensors files, `state.json` and `manifest.json`, which lists every
other file with its size and SHA-256. Tensors are stored by parameter name, so an optimizer's
state fits any engine, device and number of processes that resumes the run.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fcmae.atomic import sync
from sparse.errors import InputError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
_STATE = {
    "step": int,
    "epoch_end_due": bool,
    "threads": int,
    "asked": dict,
    "settings": dict,
    "images": dict,
}
"""The keys of every state, of any command."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A verified checkpoint on the disk: its folder and its `state.json`.

    Tensors are read on demand, so that a run does not hold a second copy of them.
    """

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one of its files, such as `model`; {} if there is no such file.

        Raises:
            InputError: the file can't be read.
        """
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            return {}
        try:
            with safe_open(file, "pt") as content:
                # Copies: what safetensors returns is mapped from the file and would keep it open.
                return {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"checkpoint {self.path} can't be read: {error}") from error


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-…`, verify it, then delete all but the newest `keep` good ones.

    A failure leaves the earlier checkpoints as they were and no half-written folder.

    Args:
        folder: of all checkpoints of the run.
        step: completed steps.
        tensors: by file (`model`, `optimizer`, and `ema` if there is one), then by name.
        state: JSON: the position, settings and versions.
        keep: how many good checkpoints to keep.

    Raises:
        OSError: the disk is full, read-only or gone.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".partial-{target.name}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        for name, values in tensors.items():
            save_tensors(values, partial / f"{name}.safetensors")
        described = {"format": FORMAT, "step": step, **state}
        (partial / STATE).write_text(json.dumps(described, indent=1), encoding="utf-8")
        files = sorted(partial.iterdir())
        manifest = {file.name: _describe(file) for file in files}
        (partial / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
        for file in [*files, partial / MANIFEST, partial]:
            sync(file)
            _forget(file)
        if target.exists():  # a damaged one of the same step, which the automatic resume skipped
            _discard(target)
        partial.rename(target)
        sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    reason = damage(target)
    if reason is not None:
        raise OSError(f"{target} is damaged right after writing: {reason}")
    prune(folder, keep, good={target})
    return target


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whose bytes depend on the tensors alone.

    Raises:
        OSError: the disk is full, read-only or gone.
    """
    ordered = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    try:  # several metadata keys would be written in an order that changes between processes
        save_file(ordered, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the operating system's errors
        raise OSError(f"{path}: {error}") from error


def damage(path: Path) -> str | None:
    """Return why a checkpoint folder can't be trusted, or None if every file is as written."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        wanted = {str(name): (int(v["size"]), str(v["sha256"])) for name, v in files.items()}
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    if not {"model.safetensors", STATE} <= wanted.keys():
        return f"{MANIFEST} does not list model.safetensors and {STATE}"
    for name, (size, digest) in wanted.items():
        file = path / name
        if file.parent != path or name in (".", ".."):
            return f"{MANIFEST} names a file outside the folder: {name!r}"
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _describe(file)["sha256"] != digest:
                return f"{name} does not have the SHA-256 that it was written with"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def load_checkpoint(path: Path) -> SavedCheckpoint:
    """Open a checkpoint folder after verifying it.

    Raises:
        InputError: missing or damaged; says why.
    """
    reason = damage(path)
    if reason is not None:
        raise InputError(f"checkpoint {path} can't be used: {reason}; use another or --resume auto")
    return open_checkpoint(path)


def newest_checkpoint(folder: Path) -> SavedCheckpoint | None:
    """Open the newest checkpoint that verifies; log which newer ones are skipped, and why.

    Raises:
        InputError: it verifies, but is of another format.
    """
    newest = newest_good(folder)
    return open_checkpoint(newest) if newest else None


def open_checkpoint(path: Path) -> SavedCheckpoint:
    """Open a checkpoint folder that is known to be undamaged.

    Raises:
        InputError: it is of another format.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {path} can't be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"checkpoint {path} is not of format {FORMAT}: use its version of fcmae")
    for key, kind in _STATE.items():
        if not isinstance(state.get(key), kind):
            name = kind.__name__
            raise InputError(f"checkpoint {path}: {STATE} has no {name} {key!r}; use another")
    return SavedCheckpoint(path, state)


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, newest first, good or not."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; log which newer ones are skipped, and why."""
    for path in list_checkpoints(folder):
        reason = damage(path)
        if reason is None:
            return path
        _log.warning("checkpoint %s is damaged and was skipped: %s", path, reason)
    return None


def forget_after(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps: a run that goes back computes those steps again."""
    for path in list_checkpoints(folder):
        if int(path.name[5:]) > step:
            _discard(path)


def prune(folder: Path, keep: int, good: Collection[Path] = ()) -> None:
    """Delete all but the newest `keep` checkpoints that verify; those in `good` are known to.

    Also clear what an interrupted save or deletion left.
    """
    kept = 0
    for path in list_checkpoints(folder):
        if kept >= keep:
            _discard(path)
        elif path in good or damage(path) is None:
            kept += 1
    for leftover in [*folder.glob(".partial-*"), *folder.glob(".discarded-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load weights strictly.

    Raises:
        InputError: names or shapes differ; prints both sides of the first difference.
    """
    if difference := first_difference(tensors, model.state_dict()):
        raise InputError(
            f"checkpoint of another model: {difference}; use its --model, --in_chans and --decoder"
        )
    model.load_state_dict(tensors)


def first_difference(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str | None:
    """The first name in which given weights differ from a model's, in words with both shapes."""
    for name in sorted(there.keys() | here.keys()):
        sides = [str(tuple(s[name].shape)) if name in s else "nothing" for s in (there, here)]
        if sides[0] != sides[1]:
            return f"{name} is {sides[0]} there and {sides[1]} in this model"
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Flatten an optimizer's state to `parameter name/state name` → tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`.

    Raises:
        InputError: the state is of another set of parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        states.setdefault(name, {})[entry] = value
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if states and states.keys() != trained.keys():
        odd = sorted(states.keys() ^ trained.keys())
        raise InputError(f"the checkpoint's optimizer state is of another model: {odd[0]} differs")
    for name, state in states.items():
        for entry, value in state.items():
            # Fused kernels want the step count where the parameter is.
            optimizer.state[trained[name]][entry] = value.to(trained[name].device)


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _forget(file: Path) -> None:
    """Ask the system to verify the file from the disk, not from memory; it may decline."""
    if file.is_file() and hasattr(os, "posix_fadvise"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _discard(path: Path) -> None:
    """Delete a checkpoint; rename it first, so that half of one is never taken for a checkpoint."""
    doomed = path.with_name(f".discarded-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
