"""``BoundedFolder``, which keeps files up to a size, and ``ChunkCache``, which keeps chunks fetched from URLs.

Notable: a name tells content, not only place: it is made of the pyramid's location, a hash of its root metadata
(which names the source and has the checksums of all shards), the shard's key and the range within it. So a pyramid
that was converted again never gets chunks of the old one. Every entry ends with its own crc32c, as chunks and shard
indexes do; one that fails it is dropped and fetched again. Processes share a folder: files appear by renaming, and
their total size is counted under a lock. Only files named as the cache names them are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import StorageError
from storage.format.shard import checksum_holds
from storage.place.atomic import write_file
from storage.place.local_store import NotAFile, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

TOTAL = "total"  # holds the bytes kept, as text, and is the file that is locked
KEEP = 0.9  # part of the size that is left when the oldest are dropped, which so happens rarely
TEMPORARY = ".tmp"
_FOLDER = re.compile("[0-9a-f]{2}")
_FILE = re.compile("[0-9a-f]{30}")
TEMPORARY_S = 600.0  # an older temporary file was left by a process that ended


@dataclass(frozen=True, init=False)
class BoundedFolder:
    """A folder of files that drops the least recently used ones; safe between threads and processes.

    Files count with their length, and their time of modification is that of their last use.

    Parameters
    ----------
    folder
        The folder, which is made if it is missing.
    max_bytes
        Bytes that the files may hold in all, at least 1.

    Raises
    ------
    StorageError
        The folder cannot be made or written to.
    """

    folder: Path
    max_bytes: int

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        object.__setattr__(self, "folder", Path(folder))
        object.__setattr__(self, "max_bytes", max_bytes)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.counted():
                pass
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot be used as a cache ({error.strerror}); give a folder that can be written to"
            ) from error

    def path(self, name: str) -> Path:
        """Path of the file with a name."""
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    @contextlib.contextmanager
    def counted(self) -> Iterator[Total]:
        """Yield the total of bytes kept and hold its lock; the caller keeps the total up to date."""
        handle = os.open(self.folder / TOTAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            text = os.pread(handle, 32, 0)
            total = Total(int(text) if text.isdigit() else sum(size for _, size, _ in self._files()))
            before = total.bytes
            yield total
            if total.bytes != before or not text.isdigit():
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(total.bytes).encode(), 0)
        finally:
            os.close(handle)  # which frees the lock

    def make_room(self, total: Total, more: int, *, unused_since: float = math.inf) -> bool:
        """Make room for ``more`` bytes by dropping the least recently used files; return whether there is room.

        Parameters
        ----------
        total
            The result of `counted`, within which this runs.
        more
            The bytes that need room.
        unused_since
            Drop only files that were last used before this time, in seconds since 1970.
        """
        if total.bytes + more > self.max_bytes:
            total.bytes = self._drop_oldest(max(0, int(self.max_bytes * KEEP) - more), unused_since)
        return total.bytes + more <= self.max_bytes

    def _drop_oldest(self, keep: int, unused_since: float) -> int:
        """Drop the least recently used files until at most ``keep`` bytes are left, and return the bytes left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for used, size, path in files:
            if left <= keep or used >= unused_since:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            left -= size
        return left

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, bytes and path of all files; unfinished files of ended processes are removed."""
        for folder in os.scandir(self.folder):
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    if _FILE.fullmatch(file.name):
                        yield status.st_mtime, status.st_size, file.path
                    elif file.name.endswith(TEMPORARY) and time.time() - status.st_mtime > TEMPORARY_S:
                        os.unlink(file.path)


class ChunkCache(BoundedFolder):
    """Byte strings by name, each a file; see `BoundedFolder`.

    A disk that fails or fills does not fail the reading: the cache then keeps less. Each process that is killed while
    it writes may leave one unfinished file beyond ``max_bytes`` until files are next counted.
    """

    def get(self, name: str) -> bytes | None:
        """Return the bytes put under ``name``, or None; damaged ones are dropped."""
        path = self.path(name)
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                data = file.read(min(os.fstat(file.fileno()).st_size, self.max_bytes))
            if checksum_holds(data):
                os.utime(path)  # sets the time of last use, by which the oldest are chosen
                return data
            path.unlink()  # it stays counted until files are next counted, which is safe
        except (OSError, NotAFile):
            pass
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep ``data``, which ends with its crc32c, dropping the oldest entries if there is no room."""
        path = self.path(name)
        if len(data) > self.max_bytes:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with self.counted() as total:
                self.make_room(total, len(data))
                write_file(path, [data], durable=False)  # an entry that a crash damages is fetched again
                total.bytes += len(data)


@dataclass
class Total:
    """Bytes of all files of a folder."""

    bytes: int
