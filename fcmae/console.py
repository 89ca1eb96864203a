"""Output of a running command: a progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from fcmae import PACKAGES

Item = TypeVar("Item")

console = Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    """Prints log messages as plain lines, above the progress line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        console.print(mark + self.format(record), markup=False, highlight=False, soft_wrap=True)


def show_logs() -> None:
    """Print the packages' log messages on the terminal; under torchrun, ranks other than 0 print
    only warnings. A second call has no effect."""
    level = logging.WARNING if os.environ.get("RANK", "0") != "0" else logging.INFO
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
            logger.addHandler(_ConsoleHandler(level))


class StepProgress:
    """Progress over a run's steps.

    Args:
        total_steps, start_step: number of steps, and number of steps already done.
        epochs: number of epochs.
        quiet: show nothing, as on ranks other than 0.
    """

    def __init__(self, total_steps: int, start_step: int, epochs: int, quiet: bool) -> None:
        self._epochs, self._total, self._quiet = epochs, total_steps, quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "starting", total=total_steps, completed=start_step, values=""
        )

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(
        self, step: int, metrics: Mapping[str, float] | None = None, seconds_left: float = 0.0
    ) -> None:
        """Show that a step is done, and the figures of a logged one."""
        self._bar.update(self._task, completed=step)
        if metrics is None:
            return
        epoch, *others = metrics.items()
        shown = f"epoch {epoch[1]}/{self._epochs}"
        values = " ".join(f"{name} {value:.4g}" for name, value in others)
        self._bar.update(self._task, description=shown, values=values)
        if self._bar.disable and not self._quiet:
            line = f"{shown} step {step}/{self._total} {values} {seconds_left / 60:.1f} min left"
            console.print(line, highlight=False, soft_wrap=True)


def tracked(items: Iterable[Item], total: int, what: str | None) -> Iterator[Item]:
    """Yield items; on a terminal, show a progress bar titled `what` that disappears at the end."""
    if what is None or not console.is_terminal:
        yield from items
        return
    yield from track(items, what, total, console=console, transient=True)
