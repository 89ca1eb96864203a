"""The interface of a tracker."""

import json
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from fcmae.atomic import atomic_write
from fcmae.train.run_paths import RunPaths


class Tracker(Protocol):
    """The interface of a tracker.

    Attributes:
        overwrites: whether a resumed run may log a step again. If not, the tracker receives a step
            only once a checkpoint covers it.
    """

    overwrites: bool

    @staticmethod
    def check() -> None:
        """Check that it can be used, before the run begins.

        Raises:
            ImportError: a package is not installed.
            InputError: it is not set up.
        """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers by name."""

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """Record an image (H, W, 3), uint8."""

    def flush(self) -> None:
        """Write out what is buffered."""

    def finish(self) -> None:
        """Called when the run ends or is interrupted."""


def remembered(paths: RunPaths, name: str, new: Callable[[], str]) -> str:
    """Return the name by which a tracker knows this run, which `new` gives at the first time."""
    known = json.loads(paths.trackers.read_text()) if paths.trackers.is_file() else {}
    if name not in known:
        known[name] = new()
        with atomic_write(paths.trackers) as path:
            path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return str(known[name])
