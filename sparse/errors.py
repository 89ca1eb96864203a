"""The two ways a command can fail that a user can act on."""


class InputError(ValueError):
    """A value the user gave is wrong.

    The message is one line that names the value, the rule and a value that works. The command line
    prints it on stderr and exits with 2, before any work is done.
    """


class RunError(RuntimeError):
    """A run that began as asked could not go on.

    The message is one line that says what happened and what to do next. The command line prints it
    on stderr and exits with 1; the last checkpoint stays.
    """
