"""Self-supervised pretraining of convolutional networks by masked reconstruction (FCMAE).

Importing this package does not import torch; the names below load what they need on first use.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcmae.api import finetune, load, pretrain
    from fcmae.config.pretraining import PretrainConfig
    from fcmae.model.fcmae import FCMAE, FCMAEOutput

__version__ = "0.1.0"
PACKAGES = ("fcmae", "sparse", "finetune")
"""Whose log messages a user sees."""

__all__ = [
    "FCMAE", "FCMAEOutput", "PretrainConfig", "__version__", "finetune", "load", "pretrain"
]  # fmt: skip

_HOMES = {
    "FCMAE": "model.fcmae",
    "FCMAEOutput": "model.fcmae",
    "PretrainConfig": "config.pretraining",
    "finetune": "api",
    "load": "api",
    "pretrain": "api",
}


def _check_sparse() -> None:
    """Raise ImportError if Python finds PyData's package `sparse` instead of ours.

    It may come first on the path, or, installed after ours, have overwritten a file in its folder.
    """
    spec = importlib.util.find_spec("sparse")
    found = Path(str(spec and spec.origin))
    ours = Path(__file__).parent.parent / "sparse" / "__init__.py"
    if found.resolve() == ours.resolve() and "SparseConvNeXtV2" in ours.read_text("utf-8"):
        return
    rule = "pip uninstall sparse and reinstall fcmae, or use a fresh virtual environment"
    raise ImportError(f"'sparse' is {found}, not fcmae's own: {rule}")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fcmae.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fcmae' has no attribute {name!r}")


_check_sparse()
