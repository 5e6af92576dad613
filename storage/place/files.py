"""One file of known size in any store, read at any offset.

Notable: a reader of headers (``BlockReader``) fetches blocks and keeps them, because headers are read in many small
steps; pixels are read without it, and near ranges are fetched in one request where a request is expensive.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from contextlib import closing
from typing import TYPE_CHECKING, Any

from storage.errors import CorruptImageError, MissingImageError, StorageError, UnsupportedImageError
from storage.place.local_store import NotAFile
from storage.place.location import files_of
from storage.place.stores import open_above
from storage.place.urls import is_remote
from storage.threads import spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]  # offset and length in bytes

BLOCK_BYTES = 256 * 1024
KEPT_BLOCKS = 64
BATCH_BYTES = 64 * 2**20  # bytes asked for at once, and
RUN_BYTES = 8 * 2**20  # bytes of it in one request
SAMPLED_BYTES = 64 * 1024  # bytes at each end of a file that its fingerprint reads


class RandomFile:
    """A file of fixed size that several threads may read at the same time.

    Parameters
    ----------
    location
        A path or a URL (http, https, s3, gs, az).

    Attributes
    ----------
    location : path or URL, as messages name it
    name : its last part
    size : bytes

    Raises
    ------
    MissingImageError
        There is no such file.
    UnsupportedImageError
        It is a folder, a pipe or a device.
    TransferError
        The URL cannot be opened, or the server does not answer or refuses to.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        self._store, self.name = open_above(self.location)
        try:
            self.size, self._version = self._store.stat(self.name)
        except (FileNotFoundError, CorruptImageError) as error:
            if isinstance(error.__cause__, NotAFile):
                raise UnsupportedImageError(f"{self.location}: {error.__cause__}, not an image file") from None
            what = "URL" if is_remote(self.location) else "path"
            raise MissingImageError(f"{self.location}: does not exist; check the {what}") from error

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends."""
        return next(self.read_ranges([(offset, length)]))

    def read_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range in turn, each as ``read_at`` would give it.

        From a server, near ranges are fetched together, a bounded number of bytes ahead.
        """
        inside = [(offset, min(length, max(0, self.size - offset))) for offset, length in ranges]
        return self._get(inside) if self._store.concurrency == 1 else self._get_ahead(inside)

    def _get_ahead(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        for batch in _batches(ranges):
            wanted = [pair for pair in batch if pair[1]]  # a server has no answer to an empty range
            found = iter(self._fetch(wanted))
            yield from (next(found) if length else b"" for _, length in batch)

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes]:
        """Fetch ranges, those near each other by one request."""
        found: dict[Range, bytes] = {}

        def work(share: list[list[Range]]) -> None:
            whole = [(run[0][0], max(map(sum, run)) - run[0][0]) for run in share]
            for run, (start, _), data in zip(share, whole, self._get(whole), strict=True):
                found.update({pair: data[pair[0] - start : sum(pair) - start] for pair in run})

        spread(work, list(_runs(sorted(set(ranges)), self._store.merge_gap)), self._store.threads)
        return [found[pair] for pair in ranges]

    def _get(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        try:
            yield from self._store.get_ranges([(self.name, offset, length) for offset, length in ranges])
        except FileNotFoundError as error:
            raise MissingImageError(f"{self.location}: does not exist any more") from error

    def identity(self) -> dict[str, Any]:
        """Name, length and version, which change when the file is replaced."""
        return {"name": self.name, "bytes": self.size} | self._version

    def close(self) -> None:
        """Close the descriptor or connection."""
        self._store.close()


def fingerprint(location: str | os.PathLike[str]) -> dict[str, Any]:
    """Identify a file without reading all of it: its ``identity`` and a hash of both its ends.

    Returns
    -------
    dict
        ``name``, ``bytes``, ``mtime_ns`` (of a URL ``e_tag`` instead, or ``last_modified``) and ``ends_sha256``; of
        several files, the bands of a scene, ``bands``, the list of theirs.
    """
    if len(files := files_of(location)) > 1:
        return {"bands": [fingerprint(file) for file in files]}
    with closing(RandomFile(files[0])) as file:
        digest = hashlib.sha256(file.read_at(0, SAMPLED_BYTES))
        digest.update(file.read_at(max(0, file.size - SAMPLED_BYTES), SAMPLED_BYTES))
        return file.identity() | {"ends_sha256": digest.hexdigest()}


def _runs(ranges: Iterable[Range], gap: int) -> Iterator[list[Range]]:
    """Cut a sorted list of ranges where they lie more than ``gap`` apart or are too many bytes for one request."""
    run: list[Range] = []
    end = 0
    for offset, length in ranges:
        if run and (offset > end + gap or max(end, offset + length) - run[0][0] > RUN_BYTES):
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

    The first failed read is kept in ``failure``, because a library in between may hide it and go on.
    """

    def __init__(self, file: RandomFile) -> None:
        self.file = file
        self.failure: StorageError | None = None
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._instead: list[tuple[int, bytes]] = []

    def show_instead(self, offset: int, data: bytes) -> None:
        """From now on read these bytes in place of those of the file."""
        self._instead.append((offset, data))

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer where the file ends."""
        data = bytearray(self._read_at(offset, length))
        for place, other in self._instead:
            first, last = max(place, offset), min(place + len(other), offset + len(data))
            if first < last:
                data[first - offset : last - offset] = other[first - place : last - place]
        return bytes(data)

    def _read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.file.size)
        try:
            if end - offset > BLOCK_BYTES:  # long arrays are read in one piece, without blocks
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
        """Return up to ``size`` bytes; no more memory is taken than the file is long."""
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
