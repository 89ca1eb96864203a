"""Timings and experiments: scripts, not part of the installed packages."""
