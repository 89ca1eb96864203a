"""One file per command: its config, the usage line that `--help` shows, and what runs it.

`run` imports the implementation when it is called, so that `--help` and a wrong command are
answered without torch. The table of commands is in `fcmae.cli`.
"""
