"""One file per command: its config, and what runs it.

`CONFIG` is a class, or names one as `module:class`; `RUN` names a function of it. What is named is
imported on demand, so that `--help` and a wrong command are answered without torch. The table of
commands is in `fcmae.cli`.
"""
