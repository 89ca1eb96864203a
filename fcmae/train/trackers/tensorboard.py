"""TensorBoard's event files."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from fcmae.train.run_paths import RunPaths


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        paths: of the run.
        first_step: earlier records from this step on are hidden.
    """

    overwrites = True

    @staticmethod
    def check() -> None:
        """Nothing can be missing."""

    def __init__(self, paths: RunPaths, first_step: int, _settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self._writer: Any = SummaryWriter(paths.tensorboard, purge_step=first_step)
        self._hook = threading.excepthook
        threading.excepthook = self._report

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _report(self, failure: Any) -> None:
        """Hide the traceback of its thread when the disk is full: `Trackers` logs the error."""
        if not type(failure.thread).__module__.startswith("tensorboard"):
            self._hook(failure)
