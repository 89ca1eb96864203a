"""Weights on the Hugging Face Hub, and the licence that weights come with."""

from pathlib import Path

from fcmae.config.files import read_yaml
from fcmae.train.run_paths import RunPaths
from fcmae.weights.read import CONFIG_FILE, first_line, read_json, read_state
from sparse.errors import InputError, RunError
from sparse.layouts import OFFICIAL, detect_layout

HUB = "hf:"
"""Prefix of the names of weights on the Hub: `hf:USER/NAME`."""

OFFICIAL_LICENSE = "cc-by-nc-4.0"
"""Of the official releases."""


def download(source: str) -> Path:
    """Download the weights that `hf:USER/NAME` names, if they are not there yet; return the folder.

    Raises:
        InputError: there are none, or they may not be read.
        RunError: the Hub did not answer.
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
        raise RunError(f"weights {source!r} could not be read: {first_line(error)}") from error


def license_of(file: Path) -> str | None:
    """The licence that weights come with, as far as is known: that of the official release that
    they are, or that their run started from, directly or through other runs.

    Args:
        file: of the weights; see `find_weights`.
    """
    from fcmae.weights.load import find_weights

    described = read_json(file.with_name(CONFIG_FILE)).get("pretrained_cfg", {})
    if known := described.get("license"):
        return str(known)
    for folder in list(file.parents)[:4]:
        config = RunPaths(folder).config
        if config.is_file():
            settings = read_yaml(config)
            start = settings.get("init_from") or settings.get("weights") or "none"
            try:
                return None if start == "none" else license_of(find_weights(start))
            except InputError:  # it is not there any more
                return None
    try:
        official = detect_layout(read_state(file)[0]) is OFFICIAL
    except InputError:  # not a ConvNeXt V2
        return None
    return OFFICIAL_LICENSE if official else None
