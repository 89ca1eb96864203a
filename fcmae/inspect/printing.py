"""Results on the terminal: one JSON object, or a table."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_result(
    result: dict[str, Any], as_json: bool, show: bool, table: Callable[[dict[str, Any]], None]
) -> None:
    """Print a command's result as one JSON object or with `table`, or not at all."""
    if show and as_json:
        print(json.dumps(result))
    elif show:
        table(result)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """Print a table, its first column of words and the others of numbers; an empty row is a line.

    Args:
        headings: one for each column.
        rows: a cell for each column; missing ones are empty.
        title: above the table.
    """
    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    Console(highlight=False).print(table, markup=False)
