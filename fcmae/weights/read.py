"""Reading weight files.

Files are data here, never programs: safetensors, or pickles that torch's restricted unpickler
accepts (`weights_only=True`; of other classes only `argparse.Namespace`, which the official
training scripts store with the weights).
"""

import argparse
import json
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse.errors import InputError, brief

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Keys under which training scripts store the state dict, averaged weights first."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DistributedDataParallel and torch.compile."""


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a file's state dict, and return it with notes on where in the file it was.

    Raises:
        InputError: damaged, refused, or not a state dict.
    """
    if path.suffix == ".safetensors":
        try:
            return _unwrap(load_file(path)), []
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}); copy it again") from error
    if path.suffix not in PICKLED:
        raise InputError(f"{path}: not a weight file: use .safetensors, {', '.join(PICKLED)}")
    loaded = _load_pickled(path)
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, expected a state dict")
    nested = next((key for key in _NESTED if isinstance(loaded.get(key), Mapping)), None)
    state = loaded if nested is None else loaded[nested]
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        found = brief(map(str, state)) or "nothing"
        raise InputError(
            f"{path}: no state dict: expected tensors by name, at the top or under "
            f"{', '.join(_NESTED)}; found {found}"
        )
    return _unwrap(state), [] if nested is None else [f"key {nested!r}"]


def _load_pickled(path: Path) -> Any:
    mmap, refused = zipfile.is_zipfile(path), []
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a damaged file can go wrong anywhere
            # What the pickle would import beyond tensors and plain data; it is not imported.
            with suppress(Exception):  # not in the zip format, or damaged
                refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            reason = f"damaged, or not written by torch.save ({first_line(error)}); copy it again"
            if refused:
                reason = (
                    f"refused, as it pickles code ({', '.join(refused[:3])}): if you trust it, "
                    "save its state dict alone with safetensors.torch.save_file"
                )
            raise InputError(f"{path}: {reason}") from error


def _unwrap(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; {} if there is no file, or something else in it.

    Raises:
        InputError: damaged.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({first_line(error)}); copy it again") from error
    return values if isinstance(values, dict) else {}


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type: a message to the user is one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
