"""Signals that ask a run to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """Turns signals into a request to stop.

    Attributes:
        received: the last signal, or 0.
    """

    received = 0

    @contextmanager
    def catch(self, *numbers: int) -> Iterator["Signals"]:
        """Handle these signals inside. A second Ctrl-C quits at once."""
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
