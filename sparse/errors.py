"""The two kinds of failure that a user can act on. Does not import torch."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A value the user gave is wrong.

    The message is one line that names the value, the rule and a value that works. The command line
    prints it on stderr and exits with 2, before any work is done.
    """


class RunError(RuntimeError):
    """A run that started correctly could not continue.

    The message is one line that says what happened and what to do next. The command line prints it
    on stderr and exits with 1; the last checkpoint is kept.
    """


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return the end of a message about a misspelt value: the nearest choice, or the first ones."""
    known = list(choices)
    near = get_close_matches(value, known, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {brief(known, 20)}"


def brief(names: Iterable[str], most: int = 4) -> str:
    """Join the first names for a one-line message and count the rest."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more
