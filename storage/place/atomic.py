"""Local files that are either whole or missing: everything that we write to a disk is written here."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MAX_PIECES = 512  # pieces in one call; Linux takes 1024


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` when the block ends well and is removed when it fails."""
    # The name is random: machines that share a disk may have processes of the same number.
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
    """Write a file under a temporary name, flush it to the disk if it is to be ``durable``, and rename it.

    Where this raises ``OSError``, an earlier file is unchanged. A file that is not ``read_again`` soon leaves the
    page cache, which a stream of gigabytes would fill for nothing.
    """
    with replacing(path) as temporary, open(temporary, "wb", buffering=0) as file:
        _write_all(file.fileno(), pieces)
        if durable:
            os.fsync(file.fileno())
        if not read_again and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is only a hint
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write many pieces with few calls, each of which may write only a part."""
    waiting = [memoryview(piece).cast("B") for piece in pieces][::-1]
    while waiting:
        written = os.writev(fd, waiting[: -MAX_PIECES - 1 : -1])
        while waiting and written >= len(waiting[-1]):
            written -= len(waiting.pop())
        if written:
            waiting[-1] = waiting[-1][written:]
