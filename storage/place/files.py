"""One file, wherever it lies, read at any place: a local path by ``pread``, a URL by range requests.

Notable: a reader of headers (``BlockReader``) fetches blocks and keeps them, because headers are read in many small
steps; pixels are read past it, and ranges that lie near each other come in one request.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote

from storage.errors import MissingImageError, StorageError, UnsupportedImageError
from storage.place.local_store import NotAFile, open_regular
from storage.place.stores import attempt, check_url, connect_requests
from storage.threads import spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T")
Range = tuple[int, int]  # offset and length in bytes

BLOCK_BYTES = 256 * 1024
KEPT_BLOCKS = 64
MERGE_GAP = 64 * 1024  # bytes worth reading in vain to save a request; tiles of one row lie closer than this
BATCH_BYTES = 64 * 2**20  # asked for at once,
RUN_BYTES = 8 * 2**20  # of it by one request,
CONCURRENCY = 10  # of which as many are in flight
SAMPLED_BYTES = 64 * 1024  # at each end of a file, for its fingerprint


class RandomFile(Protocol):
    """A file of fixed size that threads may read at the same time."""

    location: str  # path or URL, as messages name it
    name: str  # its last part
    size: int  # bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends."""
        ...

    def read_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range in turn, each as ``read_at`` would give it."""
        ...

    def identity(self) -> dict[str, Any]:
        """Name, length and version: what changes when the file is replaced."""
        ...

    def close(self) -> None:
        """Give the descriptor or connection back."""
        ...


def open_file(location: str | os.PathLike[str]) -> RandomFile:
    """Open a path or a URL (http, https, s3, gs, az).

    Raises
    ------
    MissingImageError
        There is no such file.
    UnsupportedImageError
        It is a folder, a pipe or a device.
    TransferError
        The URL is not one that can be opened, or the server does not answer, or refuses to.
    """
    text = os.fspath(location)
    return RemoteFile(text) if "://" in text else LocalFile(text)


def fingerprint(location: str | os.PathLike[str]) -> dict[str, Any]:
    """Identify a file without reading all of it: its ``identity`` and a hash of both its ends.

    Returns
    -------
    dict
        ``name``, ``bytes``, ``mtime_ns`` (of a URL ``e_tag`` instead, or ``last_modified``) and ``ends_sha256``.
    """
    file = open_file(location)
    try:
        digest = hashlib.sha256(file.read_at(0, SAMPLED_BYTES))
        digest.update(file.read_at(max(0, file.size - SAMPLED_BYTES), SAMPLED_BYTES))
        return file.identity() | {"ends_sha256": digest.hexdigest()}
    finally:
        file.close()


class LocalFile:
    """A file by its descriptor."""

    def __init__(self, path: str) -> None:
        self.location = path
        self.name = os.path.basename(path)
        try:
            self._fd = open_regular(path)
        except NotAFile as error:
            raise UnsupportedImageError(f"{path}: {error}, not an image file") from None
        except FileNotFoundError:
            raise MissingImageError(f"{path}: does not exist; check the path") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be opened ({error.strerror})") from error
        self.size = os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends."""
        try:
            return os.pread(self._fd, min(length, max(0, self.size - offset)), offset)
        except OSError as error:
            raise StorageError(f"{self.location}: cannot be read ({error.strerror})") from error

    def read_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Read each range when it is asked for."""
        return (self.read_at(offset, length) for offset, length in ranges)

    def identity(self) -> dict[str, Any]:
        """Name, length and time of the last change."""
        return {"name": self.name, "bytes": self.size, "mtime_ns": os.fstat(self._fd).st_mtime_ns}

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class RemoteFile:
    """An object of a store or a web server that answers range requests."""

    def __init__(self, url: str) -> None:
        self.location = url
        check_url(url)
        parent, _, name = url.rpartition("/")
        self.name = unquote(name) if url.startswith("http") else name
        self._requests = connect_requests(parent)
        self.size, self._version = self._attempt(lambda: self._requests.stat(self.name))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends."""
        return next(self.read_ranges([(offset, length)]))

    def read_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Fetch near ranges together, a bounded number of bytes ahead."""
        inside = [(offset, min(length, max(0, self.size - offset))) for offset, length in ranges]
        for batch in _batches(inside):
            wanted = [pair for pair in batch if pair[1]]  # a server has no answer to an empty range
            found = iter(self._fetch(wanted) if wanted else [])
            yield from (next(found) if length else b"" for _, length in batch)

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes]:
        """Fetch ranges, those near each other by one request."""
        found: dict[Range, bytes] = {}

        def work(share: list[list[Range]]) -> None:
            for run in share:
                start, length = run[0][0], max(map(sum, run)) - run[0][0]
                data = self._attempt(partial(self._requests.get_range, self.name, start, length))
                found.update({pair: data[pair[0] - start : sum(pair) - start] for pair in run})

        spread(work, list(_runs(sorted(set(ranges)))), CONCURRENCY)
        return [found[pair] for pair in ranges]

    def _attempt(self, request: Callable[[], T]) -> T:
        try:
            return attempt(self.location, request)
        except FileNotFoundError as error:
            raise MissingImageError(f"{self.location}: does not exist; check the URL") from error

    def identity(self) -> dict[str, Any]:
        """Name, length and the server's tag of the version, or the time of the last change where it has none."""
        return {"name": self.name, "bytes": self.size} | self._version

    def close(self) -> None:
        """Nothing to give back: connections close with the object."""


def _runs(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Cut a sorted list of ranges where they lie too far apart, or are too much for one request."""
    run: list[Range] = []
    end = 0
    for offset, length in ranges:
        if run and (offset > end + MERGE_GAP or max(end, offset + length) - run[0][0] > RUN_BYTES):
            yield run
            run, end = [], 0
        run.append((offset, length))
        end = max(end, offset + length)
    if run:
        yield run


def _batches(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Cut a list of ranges where ``BATCH_BYTES`` are reached."""
    batch: list[Range] = []
    total = 0
    for offset, length in ranges:
        if batch and total + length > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append((offset, length))
        total += length
    if batch:
        yield batch


class BlockReader(io.RawIOBase):
    """A ``RandomFile`` as a seekable stream that reads and keeps whole blocks; for headers, by one thread.

    The first failure to read is kept in ``failure``: a library between may swallow it and go on with less.
    """

    def __init__(self, file: RandomFile) -> None:
        self.file = file
        self.failure: StorageError | None = None
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends."""
        end = min(offset + length, self.file.size)
        try:
            if end - offset > BLOCK_BYTES:  # long arrays in one piece, past the blocks
                return self.file.read_at(offset, end - offset)
            first, last = offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
            data = b"".join(self._block(number) for number in range(first, last + 1))
        except StorageError as error:
            self.failure = self.failure or error
            raise
        return data[offset - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            self._blocks[number] = self.file.read_at(number * BLOCK_BYTES, BLOCK_BYTES)
            if len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read at any place."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset`` from the start, the present position or the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.file.size}[whence]
        if base + offset < 0:
            raise OSError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return up to ``size`` bytes; never allocates more than the file has, whatever is asked."""
        left = max(0, self.file.size - self._position)
        data = self.read_at(self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Forget the blocks; the file stays open."""
        self._blocks.clear()
        super().close()
