"""How fast a run is, and when it is time to save."""

import logging
import math
import time

SAVING_SHARE = 0.05
"""Most of the time that saving may take, where the time decides when to save."""

_log = logging.getLogger(__name__)


class Clock:
    """Times training steps without evaluation and saving; knows when to save."""

    def __init__(self) -> None:
        self._last_save = time.perf_counter()
        self._save_seconds = self._speed = self._step_seconds = 0.0
        self._warned = False
        self.skip()

    def count(self, images: int) -> None:
        self._images += images
        self._steps += 1

    def images_per_second(self) -> float:
        """Speed since it was last asked for."""
        seconds = time.perf_counter() - self._mark
        if self._steps:
            self._speed, self._step_seconds = self._images / seconds, seconds / self._steps
        self.skip()
        return self._speed

    def seconds_a_step(self) -> float:
        return self._step_seconds

    def skip(self) -> None:
        """Do not count the time since the last step."""
        self._mark, self._images, self._steps = time.perf_counter(), 0, 0

    def save_due(self, minutes: float) -> bool:
        """Whether so many minutes passed since the last save, and enough for it to be worth it."""
        enough = max(60 * minutes, self._save_seconds * (1 / SAVING_SHARE - 1))
        return minutes > 0 and time.perf_counter() - self._last_save > enough

    def saved(self, began: float, steps: int | None) -> None:
        """Note a save, and warn once where saving takes more than its share of the time.

        Args:
            began: when it began, by `time.perf_counter`.
            steps: where saves come by steps, how many lie between two.
        """
        now = time.perf_counter()
        self._save_seconds = now - began
        between = began - self._last_save
        share = self._save_seconds / (between + self._save_seconds)
        if share > SAVING_SHARE and self._save_seconds > 1 and steps and not self._warned:
            self._warned = True
            _log.warning(
                "a save took %.1f s, %.0f %% of the time: --checkpoint_steps %d or more keeps it "
                "under %.0f %%", self._save_seconds, 100 * share,
                math.ceil(steps * self._save_seconds * (1 / SAVING_SHARE - 1) / between),
                100 * SAVING_SHARE,
            )  # fmt: skip
        self._last_save = now
        self.skip()
