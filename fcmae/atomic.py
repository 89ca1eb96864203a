"""Writing files so that a crash leaves either the old file or the new one, never a partial one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse.errors import InputError, RunError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` after it is synced to disk.

    If the block raises, `path` is unchanged and the temporary file is removed.
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
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_out_file(out: str | Path, *suffixes: str) -> Path:
    """Check the file that a command will write, before any work is done.

    Raises:
        InputError: a suffix other than `suffixes`, a folder, or a place that is not writable.
    """
    path = Path(out)
    if path.is_dir() or (suffixes and path.suffix.lower() not in suffixes):
        ending = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        raise InputError(f"out {str(out)!r} must be a file{ending}")
    check_out_folder(path.parent)
    return path


def check_out_folder(out: str | Path) -> Path:
    """Check the folder that a command will write to; it does not have to exist yet.

    Raises:
        InputError: it cannot be created or is not writable.
    """
    path = Path(out)
    there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise InputError(f"out {str(out)!r} can't be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out {str(out)!r} can't be written: no write permission for {there}")
    return path


@contextmanager
def out_file(path: Path) -> Iterator[Path]:
    """Like `atomic_write`, for a command's output: create a missing folder, report failures.

    Raises:
        RunError: the file could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise RunError(f"out {str(path)!r} could not be written: {error}") from error
