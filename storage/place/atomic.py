"""Local files that are whole or not there: the one way in which anything of ours is written to a disk."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MAX_PIECES = 512  # in one call; Linux takes 1024


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write what takes the place of ``path`` when the block ends well, and goes if it does not."""
    # A name by chance, and not by process: machines that share a disk may have processes of one number.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().int % 10**12}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_file(
    path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool = True, read_again: bool = True
) -> None:
    """Write a file under a temporary name, flush it to the disk, unless it need not be ``durable``, and rename it.

    What was there before still is where this raises ``OSError``. A file that is not ``read_again`` soon leaves the
    page cache, which a stream of gigabytes would only fill for nothing.
    """
    with replacing(path) as temporary, open(temporary, "wb", buffering=0) as file:
        _write_all(file.fileno(), pieces)
        if durable:
            os.fsync(file.fileno())
        if not read_again and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a hint
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write many pieces with few calls, however much each call takes."""
    waiting = [memoryview(piece).cast("B") for piece in pieces][::-1]
    while waiting:
        written = os.writev(fd, waiting[: -MAX_PIECES - 1 : -1])
        while waiting and written >= len(waiting[-1]):
            written -= len(waiting.pop())
        if written:
            waiting[-1] = waiting[-1][written:]
