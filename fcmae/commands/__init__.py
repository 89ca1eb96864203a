"""One file per command: its config and the name of the function that runs it.

`CONFIG` is a class or its name, `module:class`; `RUN` is the name of a function that takes it.
Names are imported on demand, so `--help` and a wrong command need no torch. The table of commands
is in `fcmae.cli`.
"""
