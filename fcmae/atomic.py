"""Writing a file so that a crash leaves the old one or the new one, never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse.errors import InputError, RunError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it to `path` once it is on the disk.

    If the block raises, `path` is as it was and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_out_file(out: str | Path, *suffixes: str) -> Path:
    """The file that a command is going to write, looked at before any work is done.

    Raises:
        InputError: another ending than `suffixes`, a folder, or where nothing can be written.
    """
    path = Path(out)
    if path.is_dir() or (suffixes and path.suffix.lower() not in suffixes):
        ending = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        raise InputError(f"out {str(out)!r} must be a file{ending}")
    check_out_folder(path.parent)
    return path


def check_out_folder(out: str | Path) -> Path:
    """The folder that a command is going to write to, which may be yet to be made.

    Raises:
        InputError: it can't be made, or nothing can be written to it.
    """
    path = Path(out)
    there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"out {str(out)!r} can't be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out {str(out)!r} can't be written: {there} is closed to this user")
    return path


@contextmanager
def out_file(path: Path) -> Iterator[Path]:
    """`atomic_write` of what a command was asked for; its folder is made where it is missing.

    Raises:
        RunError: it could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise RunError(f"out {str(path)!r} could not be written: {error}") from error
