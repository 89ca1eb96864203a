"""Self-supervised pretraining of convolutional networks by masked reconstruction (FCMAE).

Importing this package imports no torch; the names below load what they need on first use.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcmae.config.pretraining import PretrainConfig
    from fcmae.model.fcmae import FCMAE, FCMAEOutput

__version__ = "0.1.0"
PACKAGES = ("fcmae", "sparse", "finetune")
"""Whose log messages a user sees."""

__all__ = ["FCMAE", "FCMAEOutput", "PretrainConfig", "__version__"]

_HOMES = {
    "FCMAE": "model.fcmae",
    "FCMAEOutput": "model.fcmae",
    "PretrainConfig": "config.pretraining",
}


def _check_sparse() -> None:
    """Our package `sparse` shares its name with PyData's; stop early if that one would be found."""
    spec = importlib.util.find_spec("sparse")
    ours = Path(__file__).parent.parent / "sparse" / "__init__.py"
    if Path(str(spec and spec.origin)).resolve() != ours.resolve():
        raise ImportError(
            f"fcmae needs its own package 'sparse', but Python finds {spec and spec.origin}: "
            "uninstall PyData's sparse in this environment (pip uninstall sparse) and install "
            "fcmae again, or use a fresh virtual environment"
        )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fcmae.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fcmae' has no attribute {name!r}")


_check_sparse()
