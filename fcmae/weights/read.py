"""Reading encoder weights from whatever a user has: a run, a checkpoint, a timm folder, a file.

Files are data here, never programs: safetensors, or pickles that torch's restricted unpickler
accepts (`weights_only=True`; of other classes only `argparse.Namespace`, which the official
training scripts store beside the weights).
"""

import argparse
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fcmae.train.checkpoint import STATE, damage, list_checkpoints, newest_good
from sparse import SparseConvNeXtV2
from sparse.convert import Architecture, canonical, encoder_part, infer_architecture
from sparse.errors import InputError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
BEST = "best"
"""Folder in which a run of fine-tuning keeps its best weights."""
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")

_log = logging.getLogger(__name__)

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Where training scripts put the state dict, averaged weights first."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of DistributedDataParallel and torch.compile."""

_UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError,
    LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip
"""What torch.load raises, depending on where a damaged file goes wrong."""


class Weights(NamedTuple):
    """Weights in our names (the encoder's without prefix, `decoder.*` where there is a decoder),
    the architecture that they belong to, and where they come from, in words. The final norm that
    fine-tuning learnt is no part of an encoder: `norm` has its weight and bias, or nothing."""

    state: dict[str, Tensor]
    architecture: Architecture
    origin: str
    norm: dict[str, Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """How images became numbers when the weights were trained: (height, width) in pixels, and mean
    and std of each channel in units of the full range 0 to 1."""

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_weights(source: str | Path) -> Weights:
    """Read weights in any known layout from a run, checkpoint or timm folder, or from a file.

    A classifier is left out, which `origin` then says.

    Raises:
        InputError: nothing there, damaged, refused, not finite, or no ConvNeXt V2.
    """
    path = find_weights(source)
    state, notes = read_state(path)
    try:
        weights = canonical(state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"{path}: {len(broken)} tensors hold NaN or infinity ({broken[0]}): "
            "take a checkpoint from before training diverged"
        )
    if {"head.fc.weight", "head.weight"} & state.keys():
        notes.append("without its classifier")
    origin = f"{path}, {', '.join(notes)}" if notes else str(path)
    return Weights(weights, infer_architecture(weights), origin, _final_norm(state))


def find_weights(source: str | Path) -> Path:
    """Return the weight file that `source` stands for.

    A run stands for its best weights where it keeps those, as fine-tuning does, else for its newest
    intact checkpoint, else for its exported model; a checkpoint or timm folder for its
    model.safetensors; a file for itself.

    Raises:
        InputError: nothing there that can be read.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a run, a timm folder or a file")
    if (path / BEST / WEIGHTS_FILE).is_file():
        return path / BEST / WEIGHTS_FILE
    checkpoints = path / "checkpoints"
    newest = newest_good(checkpoints)
    for folder in (newest, path / "exported", path):
        if folder is not None and (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
    if damaged := list_checkpoints(checkpoints):
        reason = damage(damaged[0])
        raise InputError(
            f"{path}: all {len(damaged)} checkpoints are damaged (the newest: {reason}); "
            "pretrain anew, or give another run"
        )
    raise InputError(
        f"{path}: no weights: expected a run with checkpoints/step-*/{WEIGHTS_FILE}, "
        f"or a folder with {WEIGHTS_FILE}"
    )


def read_preprocessing(weights_file: Path) -> Preprocessing | None:
    """Return how images were prepared, from the state.json of a checkpoint or the config.json of a
    timm folder beside the weights; None where neither says.

    Raises:
        InputError: the file is there and damaged.
    """
    settings = read_json(weights_file.with_name(STATE)).get("settings")
    if settings is not None:
        augment = settings.get("augment", {})
        size = settings.get("img_size")
        size = [size, size] if isinstance(size, int) else size
        mean = settings.get("mean", augment.get("mean"))
        std = settings.get("std", augment.get("std"))
    else:
        config = read_json(weights_file.with_name(CONFIG_FILE))
        config = config.get("pretrained_cfg", config)  # timm's older, flat form
        size = config.get("input_size", [])[1:]
        mean, std = config.get("mean"), config.get("std")
    if not all(isinstance(values, list) and values for values in (size, mean, std)):
        return None
    return Preprocessing((size[0], size[1]), tuple(mean), tuple(std))


def init_encoder(encoder: SparseConvNeXtV2, source: str) -> None:
    """Start an encoder of pretraining from given weights; the first layer is adapted to its
    channels, and what the weights have not, such as GRN, keeps its initial values.

    Raises:
        InputError: the weights can't be read, or are of another size.
    """
    weights = load_weights(source)
    state = dict(encoder_part(weights.state))
    state["stem.0.weight"] = adapt_in_chans(state["stem.0.weight"], encoder.in_chans)
    found = infer_architecture(state)
    if (found.depths, found.dims) != (encoder.depths, encoder.dims):
        raise InputError(
            f"init_from {source!r} has depths {list(found.depths)} and dims {list(found.dims)}, "
            f"the model {list(encoder.depths)} and {list(encoder.dims)}: choose its --model"
        )
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if unexpected:
        raise InputError(f"init_from {source!r} has {unexpected[0]!r}, which the model has not")
    if missing:
        _log.warning("not in %s, so left at their initial values: %s", source, ", ".join(missing))
    _log.info("encoder starts from %s", weights.origin)


def adapt_in_chans(stem_weight: Tensor, in_chans: int) -> Tensor:
    """Fit the stem's weight (C, I, 4, 4) to another number of input channels.

    One channel gets the sum over the old ones, which is the response to a grey picture; more get
    copies in turn, scaled by I / in_chans so that activations keep their size. timm's rule for
    I = 3, here for any I.
    """
    before = stem_weight.shape[1]
    if in_chans == before:
        return stem_weight
    if in_chans == 1:
        return stem_weight.sum(1, keepdim=True)
    turns = [channel % before for channel in range(in_chans)]
    return stem_weight[:, turns] * (before / in_chans)


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a file's state dict as it is, and return it with notes on where in the file it was.

    Raises:
        InputError: damaged, refused, or no state dict.
    """
    if path.suffix == ".safetensors":
        try:
            return _unwrap(load_file(path)), []
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: damaged or no safetensors file ({_line(error)}); copy it again"
            ) from error
    if path.suffix not in PICKLED:
        raise InputError(
            f"{path}: unknown kind of weight file; expected .safetensors, {', '.join(PICKLED)}"
        )
    loaded = _load_pickled(path)
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, expected a state dict")
    nested = next((key for key in _NESTED if isinstance(loaded.get(key), Mapping)), None)
    state = loaded if nested is None else loaded[nested]
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        found = ", ".join(map(str, [*state][:4])) or "nothing"
        raise InputError(
            f"{path}: no state dict: expected tensors by name, at the top or under "
            f"{', '.join(_NESTED)}; found {found}"
        )
    return _unwrap(state), [] if nested is None else [f"key {nested!r}"]


def _load_pickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _UNREADABLE as error:
        refused = _refused_classes(path)
        if refused:
            raise InputError(
                f"{path}: refused, it pickles more than tensors ({', '.join(refused[:3])}) and "
                "reading that could run code: where you trust it, save its state dict alone with "
                "safetensors.torch.save_file"
            ) from error
        raise InputError(
            f"{path}: damaged, or no file that torch.save wrote ({_line(error)}); copy it again"
        ) from error


def _refused_classes(path: Path) -> list[str]:
    """Name what a pickle would import beyond tensors and plain data, without importing it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except _UNREADABLE:  # not in the zip format, or damaged
        return []


def _final_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `weight` and `bias` between pooling and classifier, in timm's or the official names."""
    return {
        name.rpartition(".")[2]: tensor
        for name, tensor in state.items()
        if name.rpartition(".")[0] in ("head.norm", "norm")
    }


def _unwrap(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; {} where there is no file, or something else in it.

    Raises:
        InputError: damaged.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({_line(error)}); copy it again") from error
    return values if isinstance(values, dict) else {}


def _line(error: BaseException) -> str:
    """Return the first line of a message, since an error of ours is one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
