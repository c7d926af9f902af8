"""sha256 over files and byte ranges, in bounded memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK_BYTES = 4 << 20


def read_chunks(file: io.FileIO, nbytes: int, buffer: bytearray | None = None) -> Iterator[memoryview]:
    """Yield the next `nbytes` of an unbuffered file in pieces of at most 4 MiB; stops early at the end of the file.

    All pieces share one buffer: use each before asking for the next.
    """
    view = memoryview(buffer if buffer is not None else bytearray(min(nbytes, CHUNK_BYTES)))
    while nbytes > 0:
        count = file.readinto(view[: min(nbytes, len(view))])
        if not count:
            return
        yield view[:count]
        nbytes -= count


def sha256_range(path: Path, offset: int, nbytes: int) -> str | None:
    """sha256 of `nbytes` bytes from `offset`; None where the file ends before that."""
    digest, found = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        for chunk in read_chunks(file, nbytes):
            digest.update(chunk)
            found += len(chunk)
    return digest.hexdigest() if found == nbytes else None


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a whole file.

    Args:
        progress: called with the number of bytes read since the last call.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for chunk in read_chunks(file, path.stat().st_size):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()
