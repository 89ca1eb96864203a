"""The speed of a run, and when to save."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAVING_SHARE = 0.05
"""Largest share of the time that saving may take if saves are due by time."""

FIRST_WAITS, WAITS = 5, 55
"""Waits for images until those that count, while workers start, and the last that counts."""

WAITING_SHARE = 0.1
"""Largest share of the time that waiting for images may take without a word."""

_log = logging.getLogger(__name__)


class Clock:
    """Times training steps without evaluation and saving; knows when to save."""

    def __init__(self) -> None:
        self._last_save = time.perf_counter()
        self._save_seconds = 0.0
        self._warned = False
        self._waited, self._waits, self._began = 0.0, 0, 0.0
        self.skip()

    def count(self) -> None:
        """Count a step."""
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for images; after `WAITS` of them, report their share of the time once."""
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        self._waits += 1
        if self._waits == FIRST_WAITS:
            self._waited, self._began = 0.0, now
        elif FIRST_WAITS < self._waits <= WAITS:
            self._waited += now - start
        if self._waits == WAITS:
            share = self._waited / (now - self._began)
            if share > WAITING_SHARE:
                _log.info(
                    f"reading images takes {share:.0%} of the time: more --workers, tar shards, or "
                    "for large photographs --augment.fast_decode may help"
                )

    def seconds_a_step(self) -> float:
        """Return the mean time of the steps since the last call, or since the last `skip`."""
        seconds = (time.perf_counter() - self._mark) / self._steps
        self.skip()
        return seconds

    def skip(self) -> None:
        """Do not count the time since the last step."""
        self._mark, self._steps = time.perf_counter(), 0

    def save_due(self, minutes: float) -> bool:
        """Whether `minutes` have passed since the last save, and saving takes a small share."""
        enough = max(60 * minutes, self._save_seconds * (1 / SAVING_SHARE - 1))
        return minutes > 0 and time.perf_counter() - self._last_save > enough

    def saved(self, began: float, steps: int | None) -> None:
        """Record a save, and warn once if saving takes more than its share of the time.

        Args:
            began: when it began, by `time.perf_counter`.
            steps: between two saves, if saves are due by steps.
        """
        now = time.perf_counter()
        self._save_seconds = now - began
        between = began - self._last_save
        share = self._save_seconds / (between + self._save_seconds)
        if share > SAVING_SHARE and self._save_seconds > 1 and steps and not self._warned:
            self._warned = True
            enough = math.ceil(steps * self._save_seconds * (1 / SAVING_SHARE - 1) / between)
            _log.warning(
                f"a save took {self._save_seconds:.1f} s, {share:.0%} of the time: "
                f"--checkpoint_steps {enough} or more keeps it under {SAVING_SHARE:.0%}"
            )
        self._last_save = now
        self.skip()
