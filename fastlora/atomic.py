"""Files that a crash leaves either old or new, never half: write beside, fsync, rename, fsync the folder.

Lowest floor: checkpoints, metrics and summaries all write through here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlora.errors import FastloraError

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
"""No space left on the device; the user's quota is used up."""


class DiskFullError(FastloraError, OSError):
    """No space (or no quota) left while writing; what was there before is untouched."""


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`. A reader, or a run killed at any moment, sees the old file or the new one.

    The temporary file has a fixed name beside `path` (one writer per file), so a leftover of a killed run is overwritten.
    Raises DiskFullError when the disk is full; the old file is then intact and the temporary one removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming_disk_full(path):
            write_durably(temporary, data)
            os.replace(temporary, path)
            fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8."""
    atomic_write_bytes(path, text.encode())


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` and wait until it is on the disk; not atomic on its own (for files in a folder that is renamed later)."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_disk_full(path: Path, intact: str = "what was there before is intact") -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" in the block into a DiskFullError: names `path`, what is safe, and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRORS:
            raise
        reason = os.strerror(error.errno)
        fix = "Free space on that disk, or choose another `output_dir`"
        raise DiskFullError(error.errno, f"{reason} while writing; {intact}. {fix}", str(path)) from error
