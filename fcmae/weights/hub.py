"""Weights on the Hugging Face Hub, and the licence that weights come with."""

import logging
import os
from pathlib import Path
from typing import Any

from fcmae.train import checkpoint
from fcmae.train.run_paths import RunPaths
from fcmae.weights.read import CONFIG_FILE, first_line, read_json, read_state
from sparse.errors import InputError
from sparse.layouts import OFFICIAL, detect_layout

HUB = "hf:"
"""Prefix of the names of weights on the Hub: `hf:USER/NAME`."""

OFFICIAL_LICENSE = "cc-by-nc-4.0"
"""Of the official releases."""

_log = logging.getLogger(__name__)


def download(source: str) -> Path:
    """Download the weights that `hf:USER/NAME` names, if they are not there yet; return the folder.

    Raises:
        InputError: there are none, they may not be read, or the Hub does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    name = source.removeprefix(HUB)
    if name.count("/") != 1:
        raise InputError(f"weights {source!r} name no repository: use {HUB}USER/NAME")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except HFValidationError as error:
        raise InputError(f"weights {source!r}: {first_line(error)}: use {HUB}USER/NAME") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"weights {source!r} do not exist, or are private: check the name, or log in with "
            "`hf auth login`"
        ) from error
    except Exception as error:  # of the client's HTTP library, which versions differ in
        raise InputError(f"weights {source!r} could not be read: {first_line(error)}") from error


def run_of(file: Path) -> RunPaths | None:
    """The run that weights belong to: its best or exported ones, or those of a checkpoint."""
    for folder in list(file.parents)[1:3]:
        paths = RunPaths(folder)
        at_end = file.parent in (paths.best, paths.exported)
        inside = at_end or file.is_relative_to(paths.checkpoints)
        if inside and paths.checkpoints.is_dir() and paths.config.is_file():
            return paths
    return None


def state_of(paths: RunPaths) -> dict[str, Any]:
    """What the newest checkpoint of a run records; {} if there is none."""
    newest = next(iter(checkpoint.list_checkpoints(paths.checkpoints)), None)
    return {} if newest is None else read_json(newest / checkpoint.STATE)


def start_of(paths: RunPaths) -> str | None:
    """The weights that a run started from, an absolute path or `hf:USER/NAME`; None for none."""
    asked = state_of(paths).get("asked", {})
    start = asked.get("init_from") or asked.get("weights") or "none"
    # A word among paths is stored as it is.
    return None if os.path.basename(start) == "none" else str(start)


def license_of(file: Path) -> str | None:
    """The licence that weights come with: that of the official release that they are, or that their
    run started from, directly or through other runs. None if they come with none.

    Args:
        file: of the weights; see `find_weights`.

    Raises:
        InputError: what their run started from does not exist any more, or can't be read.
    """
    from fcmae.weights.load import find_weights

    described = read_json(file.with_name(CONFIG_FILE))
    if known := described.get("pretrained_cfg", {}).get("license"):
        return str(known)
    if (run := run_of(file)) is not None:
        start = start_of(run)
        return None if start is None else license_of(find_weights(start))
    if "architecture" in described:  # a folder of timm; the releases are single files
        return None
    try:
        official = detect_layout(read_state(file)[0]) is OFFICIAL
    except InputError:  # not a ConvNeXt V2
        return None
    return OFFICIAL_LICENSE if official else None


def known_license(source: str | None) -> str | None:
    """`license_of` for weights as a setting names them; None, with a warning, if it can't be found
    out."""
    from fcmae.weights.load import find_weights

    if source in (None, "none"):
        return None
    try:
        return license_of(find_weights(str(source)))
    except InputError as error:
        _log.warning("the licence of %s is not known: %s", source, error)
        return None
