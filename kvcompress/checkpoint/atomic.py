"""Files that are there whole or not at all, and disks that run full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvcompress.checkpoint.hashing import sha256_file

TEMPORARY_SUFFIX = ".kvcompress-tmp"
MAX_NAME_BYTES = 255
"""Of one file's name, on the file systems in use."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside `path` and rename it to `path` once it is complete and on disk; on any error it is removed.

    The temporary name is fixed, so a killed run leaves at most one per target and the next run reuses it.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def _temporary(path: Path) -> Path:
    name = f".{path.name}{TEMPORARY_SUFFIX}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}{TEMPORARY_SUFFIX}"
    return path.with_name(name)


def atomic_write(path: Path, data: bytes | Callable[[BinaryIO], None]) -> str:
    """Write `data`, or what the function writes, to `path` whole or not at all. Returns the file's sha256."""
    with atomic_file(path) as file:
        if callable(data):
            data(file)
        else:
            file.write(data)
    return sha256_file(path) if callable(data) else hashlib.sha256(data).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Refuse to start work that cannot fit.

    Args:
        path: where output will go; it need not exist yet.
        needed_bytes: what will be written there.

    Raises:
        ValueError: less than that is free on the disk that would hold `path`.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"not enough disk space for {path}: {needed_bytes:,} bytes needed, {free:,} free; "
            "free some space or choose another output folder"
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of space: disk full, quota used up, or a file size limit."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


@contextmanager
def disk_full_as_value_error(path: Path) -> Iterator[None]:
    """Turn "no space left" into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full_error(path, error) from error


def disk_full_error(path: Path, error: OSError) -> ValueError:
    """The message for a write that failed for want of space."""
    return ValueError(
        f"writing {path} failed: {os.strerror(error.errno or 0).lower()}; "
        "free some space or choose another output folder"
    )
