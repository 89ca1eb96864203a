"""Where a run sends metrics and figures besides its own files: TensorBoard and the like.

To add one, add a file with a `Tracker` here and a line to the table.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from fcmae.train.run_paths import RunPaths
from fcmae.train.trackers.base import Tracker
from fcmae.train.trackers.mlflow import MLflow
from fcmae.train.trackers.tensorboard import TensorBoard
from fcmae.train.trackers.wandb import WandB
from fcmae.weights.read import first_line
from sparse.errors import InputError

TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
"""Each `Tracker` by name. It is made with the run's paths, the first step that it records, and the
run's settings by their dotted names."""

_log = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker that is unknown, not installed or not set up."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"trackers {name!r} is unknown: use {', '.join(TRACKERS)}")
        try:
            TRACKERS[name].check()
        except ImportError as error:
            raise InputError(
                f"trackers {name!r} needs a package that is not installed: pip install "
                f"'fcmae[{name}]'"
            ) from error


class Trackers:
    """All trackers of a run; one that fails is dropped with a warning and never ends the run.

    Args:
        paths: of the run.
        first_step: the first step that they record.
        names: keys of `TRACKERS`.
        settings: of the run, by dotted names.
    """

    def __init__(
        self,
        paths: RunPaths,
        first_step: int,
        names: Sequence[str],
        settings: Mapping[str, Any],
    ) -> None:
        self._active: dict[str, Tracker] = {}
        for name in names:
            try:
                self._active[name] = TRACKERS[name](paths, first_step, settings)
            except Exception as error:  # noqa: BLE001  # as in `_each`
                _log.warning("%s does not record this run: %s", name, first_line(error))
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
            except Exception as error:  # noqa: BLE001  # disks and networks raise anything
                why = first_line(error)
                _log.warning("%s stops recording until the run is resumed: %s", name, why)
                with suppress(Exception):
                    self._active.pop(name).finish()
