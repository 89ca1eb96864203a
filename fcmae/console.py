"""Output of a running command: a progress line on a terminal, plain lines elsewhere."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

from rich import progress
from rich.console import Console

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


@contextmanager
def step_progress(
    total_steps: int, start_step: int, epochs: int, quiet: bool
) -> Iterator[Callable[..., None]]:
    """Show the progress over a run's steps.

    Args:
        total_steps, start_step: number of steps, and number of steps already done.
        epochs: number of epochs.
        quiet: show nothing, as on ranks other than 0.

    Yields:
        A function that shows that a step is done, and for a logged one what was logged and the
        seconds left.
    """
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[values]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=quiet or not (console.is_terminal or _has_widgets()),
    )
    task = bar.add_task("starting", total=total_steps, completed=start_step, values="")

    def update(
        step: int, metrics: Mapping[str, float] | None = None, seconds_left: float = 0.0
    ) -> None:
        bar.update(task, completed=step)
        if metrics is None:
            return
        epoch, *others = metrics.items()
        shown = f"epoch {epoch[1]}/{epochs}"
        values = " ".join(f"{name} {value:.4g}" for name, value in others)
        bar.update(task, description=shown, values=values)
        if bar.disable and not quiet:
            line = f"{shown} step {step}/{total_steps} {values} {seconds_left / 60:.1f} min left"
            console.print(line, highlight=False, soft_wrap=True)

    with bar:
        yield update


def _has_widgets() -> bool:
    """Return whether this is a notebook that can redraw a line; others get plain lines."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


def tracked(items: Iterable[Item], total: int, what: str | None) -> Iterator[Item]:
    """Yield items; on a terminal, show a progress bar titled `what` that disappears at the end."""
    if what is None or not console.is_terminal:
        yield from items
        return
    yield from progress.track(items, what, total, console=console, transient=True)
