"""The two ways a command can fail that a user can act on. Free of torch."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A value the user gave is wrong.

    The message is one line that names the value, the rule and a value that works. The command line
    prints it on stderr and exits with 2, before any work is done.
    """


class RunError(RuntimeError):
    """A run that started as asked could not continue.

    The message is one line that says what happened and what to do next. The command line prints it
    on stderr and exits with 1; the last checkpoint stays.
    """


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return the end of a message on a misspelt value: the nearest choice, else all of them."""
    known = list(choices)
    near = get_close_matches(value, known, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
