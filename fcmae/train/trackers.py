"""Where a run sends metrics and figures besides its own files: TensorBoard and the like."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """The interface of a tracker.

    Attributes:
        overwrites: whether a resumed run may log a step again. If not, the tracker receives a step
            only once a checkpoint covers it.
    """

    overwrites: bool

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers by name."""

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """Record an image (H, W, 3), uint8."""

    def flush(self) -> None:
        """Write out what is buffered."""

    def finish(self) -> None:
        """Called when the run ends or is interrupted."""


class TensorBoardTracker:
    """Event files for TensorBoard.

    Args:
        paths: of the run.
        first_step: earlier records from this step on are hidden.
    """

    overwrites = True

    def __init__(self, paths: RunPaths, first_step: int) -> None:
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


TRACKERS: dict[str, Callable[[RunPaths, int], Tracker]] = {"tensorboard": TensorBoardTracker}
"""Each tracker by name: a function of the run's paths and the first step that it records."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that is unknown."""
    if unknown := [name for name in names if name not in TRACKERS]:
        raise InputError(f"trackers {unknown[0]!r} is unknown: use {', '.join(TRACKERS)}")


class Trackers:
    """All trackers of a run; one that fails is dropped with a warning and never ends the run.

    Args:
        paths: of the run.
        first_step: the first step that they record.
        names: keys of `TRACKERS`.
    """

    def __init__(self, paths: RunPaths, first_step: int, names: Sequence[str]) -> None:
        self._active = {name: TRACKERS[name](paths, first_step) for name in names}
        self._uncovered: list[Callable[[Tracker], None]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._record(lambda tracker: tracker.log(metrics, step))

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        self._record(lambda tracker: tracker.image(name, image_HWC, step))

    def flush(self) -> None:
        self._each(lambda tracker: tracker.flush())

    def covered(self) -> None:
        """Called when a checkpoint covers all that was recorded so far."""
        for record in self._uncovered:
            self._each(record, overwrites=False)
        self._uncovered = []

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _record(self, record: Callable[[Tracker], None]) -> None:
        self._each(record, overwrites=True)
        if not all(tracker.overwrites for tracker in self._active.values()):
            self._uncovered.append(record)

    def _each(self, use: Callable[[Tracker], None], overwrites: bool | None = None) -> None:
        """Use all trackers, or those that overwrite or do not."""
        for name, tracker in list(self._active.items()):
            if overwrites not in (None, tracker.overwrites):
                continue
            try:
                use(tracker)
            except Exception as error:  # noqa: BLE001  # trackers raise anything that disks and networks do
                _log.warning("%s stops recording until the run is resumed: %s", name, error)
                with suppress(Exception):
                    self._active.pop(name).finish()
