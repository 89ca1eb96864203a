"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Signals:
    """Turns SIGTERM and SIGUSR1, and while training Ctrl-C, into a request to stop.

    A second Ctrl-C quits at once.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._before = self._catch(signal.SIGTERM, signal.SIGUSR1)
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    @contextmanager
    def ctrl_c(self) -> Iterator[None]:
        """Handle Ctrl-C inside; before there is anything to save, it may end the process."""
        before = self._catch(signal.SIGINT)
        try:
            yield
        finally:
            _restore(before)

    def _catch(self, *numbers: int) -> dict[int, Any]:
        return {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
