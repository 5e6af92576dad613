"""A local folder by descriptors and ``pread``; only regular files inside it are opened.

Notable: files are read by one thread. Cached chunks are decoded in a few microseconds each, and a second thread would
only contend for the interpreter's lock. The kernel fetches the others several ranges at a time, because it is told of
them before the first is read.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import stat
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import CorruptImageError, StorageError
from storage.limits import LIMITS
from storage.place.atomic import write_file
from storage.place.ranges import Entry, Occupied

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import NoReturn

    from storage.place.ranges import Range, Stat

SLOW_READ_S = 100e-6  # a short range from the page cache takes less
ANNOUNCED_RANGES = 64  # ranges that the kernel is told of before the first is read
ANNOUNCED_BYTES = 2**20  # longer ranges keep a disk busy by themselves


class NotAFile(Exception):  # noqa: N818  callers turn it into an error that names the file's use
    """The path is that of a folder, a pipe, a socket or a device; the text says which."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a file for reading and return its descriptor; anything but a regular file is refused without waiting.

    Raises
    ------
    NotAFile
    OSError
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise NotAFile("a folder" if stat.S_ISDIR(mode) else "a pipe or a device")
    return fd


class _Descriptor:
    """A file descriptor that its last user closes, which makes eviction safe between threads."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _has_link(root: str, key: str) -> bool:
    """Whether the file or a folder between it and the root is a link."""
    path = root
    for part in key.split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):
            return True
    return False


class _Descriptors:
    """The most recently read files of all local stores, kept open up to a share of what the process may open.

    Files are known by store and key, not by path, so that a new store opens a file that was replaced.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, str], _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self.limit = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def get(self, store: LocalStore, key: str) -> _Descriptor:
        """Return the open file ``key`` of a store, opening it if needed."""
        name = (store.number, key)
        with self._lock:
            found = self._open.get(name)
            if found is not None:
                self._open.move_to_end(name)
                return found
        opened = _Descriptor(store.open(key))
        with self._lock:
            self._open[name] = opened
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return opened

    def forget(self, store: int, key: str) -> None:
        """Close a file that is replaced or deleted, once no thread is reading it."""
        with self._lock:
            self._open.pop((store, key), None)

    def close(self, store: int) -> None:
        """Close the files of a store that no thread is reading."""
        with self._lock:
            for name in [name for name in self._open if name[0] == store]:
                del self._open[name]

    def forked(self) -> None:
        """In a forked child, keep the open files but make a new lock, since nobody would release the old one."""
        self._lock = threading.Lock()


_descriptors = _Descriptors()
os.register_at_fork(after_in_child=_descriptors.forked)
_numbers = itertools.count()


class LocalStore:
    """A folder, which workers on other machines must see under the same name; see ``storage.place.stores.Store``.

    ``follow_links`` is for files that the user has named; links that lead out of a pyramid are not followed.
    """

    concurrency = threads = 1
    merge_gap = 0

    def __init__(self, root: str | os.PathLike[str], follow_links: bool = False) -> None:
        self.name = str(Path(root))
        self._follow_links = follow_links
        self.number = next(_numbers)
        self._slow = True  # whether a short range was slow since the last announcement
        self._seen: dict[str, tuple[int, ...]] = {}  # which file each key was, of files that the user has named

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str, bool]]:
        return type(self), (self.name, self._follow_links)

    def get(self, key: str, limit: int = LIMITS.metadata_bytes) -> bytes:
        """Return the whole file."""
        with os.fdopen(self.open(key), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CorruptImageError(f"{self.name}/{key}: holds {size} bytes, more than the {limit} it may")
            try:
                return file.read(size)
            except OSError as error:
                self._fail(key, error)

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range, fewer where its file ends."""
        descriptor: _Descriptor  # shared by adjacent ranges of one file; held so that no other thread closes it
        held = None  # its key
        for first in range(0, len(ranges), ANNOUNCED_RANGES):
            window = ranges[first : first + ANNOUNCED_RANGES]
            if self._slow:
                self._announce(window)
            self._slow = False
            for key, start, length in window:
                started = time.perf_counter()
                try:
                    if key != held:
                        held, descriptor = key, _descriptors.get(self, key)
                    if start < 0:
                        start = max(0, start + os.fstat(descriptor.fd).st_size)
                    data = os.pread(descriptor.fd, length, start)
                except OSError as error:
                    self._fail(key, error)
                if time.perf_counter() - started > SLOW_READ_S and length <= ANNOUNCED_BYTES:
                    self._slow = True
                yield data

    def _announce(self, ranges: Sequence[Range]) -> None:
        """Ask the kernel to fetch all ranges at once; it is a hint and never fails.

        It is worth it where the last reads were slow: if all were fast, the files are in the page cache.
        """
        short = [range_ for range_ in ranges if range_[2] <= ANNOUNCED_BYTES and range_[1] >= 0]
        if len(short) < 2 or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):
            for key, start, length in short:
                descriptor = _descriptors.get(self, key)
                os.posix_fadvise(descriptor.fd, start, length, os.POSIX_FADV_WILLNEED)

    def stat(self, key: str) -> Stat:
        """Return the size of a file and the time of its last change."""
        status = os.fstat(_descriptors.get(self, key).fd)
        return status.st_size, {"mtime_ns": status.st_mtime_ns}

    def entries(self) -> dict[str, Entry]:
        """Return all files; links are not followed."""
        found = {}
        for folder, _, names in os.walk(self.name):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                    found[path.relative_to(self.name).as_posix()] = Entry(path.lstat().st_size)
        return found

    def put(self, key: str, pieces: Iterable[bytes], *, if_absent: bool = False, read_again: bool = True) -> str:
        """Write one file; a lock on the folder must prevent others from writing it meanwhile."""
        path, pieces = Path(self.name, key), list(pieces)
        if if_absent and os.path.lexists(path) and not self._holds(key, b"".join(pieces)):
            raise Occupied(f"{path}: another conversion has written this; run again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, pieces, read_again=read_again)
        self._forget(key)
        return ""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files, if they are there."""
        for key in keys:
            Path(self.name, key).unlink(missing_ok=True)
            self._forget(key)

    def close(self) -> None:
        """Close the files that no thread is reading."""
        _descriptors.close(self.number)

    def _forget(self, key: str) -> None:
        self._seen.pop(key, None)
        _descriptors.forget(self.number, key)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.get(key, len(data)) == data
        except (FileNotFoundError, CorruptImageError):
            return False

    def open(self, key: str) -> int:
        """Open a file; a link out of the folder is refused unless links are followed."""
        path = f"{self.name}/{key}"
        try:
            fd = open_regular(path)
        except NotAFile as error:
            if str(error) == "a folder":
                raise FileNotFoundError(key) from error
            raise CorruptImageError(f"{path}: {error}, not a file; remove it and convert again") from error
        except OSError as error:
            self._fail(key, error)
        # The check comes after the file was opened, so that a link put there later changes nothing.
        if not self._follow_links and _has_link(self.name, key):
            root = os.path.realpath(self.name).rstrip("/") + "/"
            if not os.path.realpath(path).startswith(root):
                os.close(fd)
                raise CorruptImageError(
                    f"{path}: a link that leads out of the pyramid, which is not followed; copy the file"
                )
        if self._follow_links:
            # A descriptor may have been given back, and what is known of the file would not fit another one.
            status = os.fstat(fd)
            found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._seen.setdefault(key, found) != found:
                os.close(fd)
                raise CorruptImageError(f"{path}: was replaced while it was read; run again")
        return fd

    def _fail(self, key: str, error: OSError) -> NoReturn:
        """Turn a failure to open or read a file into the error that a reader expects."""
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise FileNotFoundError(key) from error
        where = f"{self.name}/{key}"
        raise StorageError(f"{where}: cannot be read ({error.strerror}); check its disk and permissions") from error
