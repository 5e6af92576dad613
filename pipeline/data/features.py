"""Keep features of patches on a disk, in one file for each slide and encoder, for epochs, runs, folds and processes.

Notable: nothing here can make a feature wrong. A file is named by all that decides its features
(`nested_ats.feature_store`), and grows by blocks: a heading lists the places of some patches, and their rows follow.
The crc32c of each heading and each row covers that name and the places, too. The next writer cuts off what a killed
one left unfinished, and what follows a damaged heading; a damaged row counts as missing. Readers walk along the
headings alone. Writers hold the folder's lock and readers none, and no file is kept open or mapped, so this works on
network file systems. Where the folder is full, those files are dropped that nobody has used since this process
began, the least recently used first; otherwise a training with too little room would drop what its next epoch asks
for.

Shape letters: N patches, W values a patch.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nested_ats import ImageModel
from nested_ats.models.patches import PatchModel
from pipeline.files import cache_folder
from pipeline.sections import FeaturesConfig
from storage import StorageError
from storage.format.shard import checksum_holds, crc32c
from storage.place.local_store import NotAFile, open_regular
from storage.read.cache import BoundedFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

_HELD_INDEXES = 256  # each is the index of a file, and takes 16 bytes a patch
_PEEK = 4096  # so many bytes of a block are read to see its heading, and most headings are smaller
_HEAD = np.dtype([("count", "<u4"), ("crc32c", "<u4")])  # (count, 2) places follow, and count rows
_PLACE = np.dtype(("<i8", 2))
_TOUCH_S = 60.0  # a file is marked as in use no more often
_SKEW_S = 10.0  # the clock of a file system may be so far behind ours
_WAIT_S = 60.0  # a full folder is looked at again after so long


class DiskFeatures:
    """A `nested_ats.FeatureStore` in a folder; safe between threads and processes.

    Where a disk fails or is full, no more is kept: this is said once, and nothing else fails.

    Parameters
    ----------
    folder
        It is made if it is not there.
    max_bytes
        What the files may hold in all. What processes were adding as they were killed comes on top, until the files
        are counted again.

    Attributes
    ----------
    trouble : why features were not kept, in words; empty while all were

    Raises
    ------
    StorageError
        The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = BoundedFolder(folder, max_bytes)
        self._began = time.time() - _SKEW_S
        self._indexes: OrderedDict[str, _Index] = OrderedDict()
        self._touched: dict[str, float] = {}
        self._lock = Lock()
        self._full_until = 0.0
        self.trouble = ""
        self._counts = [0, 0]

    def get(self, name: str, places: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Look (N, 2) places up; see `nested_ats.FeatureStore.get`."""
        record = _record(width)
        rows, found = np.zeros((len(places), width), np.float32), np.zeros(len(places), bool)
        with suppress(OSError, NotAFile), _opened(open_regular(self._folder.path(name))) as file:
            self._touch(name, file)
            index = self._index(name, file, record)
            where = index.find(places.numpy())
            for i in np.flatnonzero(where >= 0).tolist():
                data = os.pread(file, record.itemsize, int(where[i]))
                if len(data) == record.itemsize and checksum_holds(_sealed(name, places[i].numpy()) + data):
                    rows[i], found[i] = np.frombuffer(data, record)[0]["row"], True
            damaged = where[(where >= 0) & ~found]
            if len(damaged):
                self._remember(name, index.without(damaged))
        with self._lock:
            self._counts = [self._counts[0] + int(found.sum()), self._counts[1] + len(found)]
        return torch.from_numpy(rows), torch.from_numpy(found)

    def put(self, name: str, places: Tensor, rows: Tensor) -> None:
        """Keep (N, W) rows of (N, 2) places; see `nested_ats.FeatureStore.put`."""
        if time.monotonic() < self._full_until:
            return
        record = _record(rows.shape[1])
        path = self._folder.path(name)
        try:
            with self._folder.counted() as total:
                path.parent.mkdir(exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                with _opened(os.open(path, flags, 0o666)) as file:
                    if not stat.S_ISREG(os.fstat(file).st_mode):
                        return
                    os.utime(file)  # otherwise it could be dropped to make room
                    index, size = self._index(name, file, record), os.fstat(file).st_size
                    if size > index.end:  # a writer was killed, or this is another file by now
                        index = self._index(name, file, record, anew=True)
                        os.ftruncate(file, index.end)
                        total.bytes -= size - index.end
                    new = index.find(places.numpy()) < 0
                    if not new.any():
                        return
                    data = _encode(name, record, places.numpy()[new], rows.numpy()[new])
                    if not self._folder.make_room(total, len(data), unused_since=self._began):
                        self._full_until = time.monotonic() + _WAIT_S
                        self.trouble = f"{self._folder.folder}: full, with {self._folder.max_bytes / 1e9:g} GB"
                        return
                    total.bytes += _append(file, data)
        except OSError as error:
            self._give_up(error)

    @property
    def counts(self) -> Tensor:
        """The number of patches that were found, and that were looked for, (2,) float64."""
        with self._lock:
            return torch.tensor(self._counts, dtype=torch.float64)

    def _touch(self, name: str, file: int) -> None:
        """Mark a file as in use."""
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_S) >= _TOUCH_S:
            self._touched[name] = now
            os.utime(file)

    def _index(self, name: str, file: int, record: np.dtype[Any], *, anew: bool = False) -> _Index:
        """Return where the places of a file are, with those that were added since the last look."""
        with self._lock:
            known = self._indexes.get(name)
        status = os.fstat(file)
        if anew or known is None or known.inode != status.st_ino or known.end > status.st_size:
            known = _Index(status.st_ino, 0, np.empty(0, np.int64), np.empty(0, np.int64))
        if known.end < status.st_size:
            known = known.extended(name, file, status.st_size, record)
        self._remember(name, known)
        return known

    def _remember(self, name: str, index: _Index) -> None:
        with self._lock:
            self._indexes[name] = index
            self._indexes.move_to_end(name)
            while len(self._indexes) > _HELD_INDEXES:
                gone, _ = self._indexes.popitem(last=False)
                self._touched.pop(gone, None)

    def _give_up(self, error: OSError) -> None:
        """Stop keeping features, and say so."""
        if self._full_until != float("inf"):
            self._full_until = float("inf")
            self.trouble = f"{self._folder.folder}: {error.strerror}"
            _say(f"{self.trouble}; no more features of patches are kept there")


class _Index(NamedTuple):
    """Where in a file the rows of places are.

    Attributes
    ----------
    inode
        The inode of the file.
    end
        How many bytes of the file's blocks were looked at.
    keys
        The places in these blocks as one number each, in order; of equal ones, the last is the one that came last.
    offsets
        The offset of each row in the file.
    """

    inode: int
    end: int
    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def find(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the offsets of the rows of (N, 2) places, and -1 for those that are not there."""
        if not len(self.keys):
            return np.full(len(places), -1)
        wanted = _keys(places)
        at = np.searchsorted(self.keys, wanted, side="right") - 1
        return np.where((at >= 0) & (self.keys[at] == wanted), self.offsets[at], -1)

    def extended(self, name: str, file: int, size: int, record: np.dtype[Any]) -> _Index:
        """Return the index of all whole blocks within `size` bytes."""
        keys, offsets, end = [self.keys], [self.offsets], self.end
        while (places := _read_heading(name, file, end)) is not None:
            first = end + _HEAD.itemsize + places.nbytes
            if first + len(places) * record.itemsize > size:
                break
            keys.append(_keys(places))
            offsets.append(first + np.arange(len(places)) * record.itemsize)
            end = first + len(places) * record.itemsize
        every = np.concatenate(keys)
        order = np.argsort(every, kind="stable")
        return _Index(self.inode, end, every[order], np.concatenate(offsets)[order])

    def without(self, offsets: NDArray[np.int64]) -> _Index:
        """Return the index without some rows."""
        kept = ~np.isin(self.offsets, offsets)
        return self._replace(keys=self.keys[kept], offsets=self.offsets[kept])


def use_features(model: ImageModel, config: FeaturesConfig | None) -> DiskFeatures | None:
    """Let a model with a frozen encoder keep its features; where it cannot, say why and go on without.

    Parameters
    ----------
    model
        A model of any kind.
    config
        Where features are kept; with None they are not.

    Returns
    -------
    The store that the model uses now, if it has one.
    """
    if config is None or not isinstance(model, PatchModel) or model.config.trainable != "none":
        return None
    try:
        folder = config.folder or cache_folder() / "features"
        model.store = store = DiskFeatures(folder, int(config.gigabytes * 1e9))
    except (StorageError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _say(f"{error} (features of patches are not kept)")
        return None
    return store


@contextmanager
def _opened(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)


def _record(width: int) -> np.dtype[Any]:
    """Return the type of a patch's row, which ends with the crc32c of the file's name, the place and the numbers."""
    return np.dtype([("row", "<f4", width), ("crc32c", "<u4")])


def _keys(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Make one number of each (N, 2) place; where two places share one, a row's checksum tells whose it is."""
    return (places[:, 0] << 32) ^ (places[:, 1] & 0xFFFFFFFF)


def _sealed(name: str, places: NDArray[np.int64]) -> bytes:
    """Return what a checksum covers besides the data before it."""
    return name.encode() + places.astype(_PLACE.base).tobytes()


def _encode(name: str, record: np.dtype[Any], places: NDArray[np.int64], rows: NDArray[np.float32]) -> bytes:
    """Encode a block."""
    head = np.array([len(places)], _HEAD["count"]).tobytes()
    parts = [head, crc32c(_sealed(name, places) + head), places.astype(_PLACE.base).tobytes()]
    for place, row in zip(places, rows.astype(record["row"].base), strict=True):
        parts += [row.tobytes(), crc32c(_sealed(name, place) + row.tobytes())]
    return b"".join(parts)


def _read_heading(name: str, file: int, start: int) -> NDArray[np.int64] | None:
    """Read the (N, 2) places of the block that starts there; None where there is none, or it is damaged."""
    data = os.pread(file, _PEEK, start)
    if len(data) < _HEAD.itemsize:
        return None
    head = np.frombuffer(data, _HEAD, 1)[0]
    end = _HEAD.itemsize + int(head["count"]) * _PLACE.itemsize
    if end > len(data):
        data = os.pread(file, min(end, os.fstat(file).st_size - start), start)
    if end > len(data) or end == _HEAD.itemsize:
        return None
    places = np.frombuffer(data, _PLACE, int(head["count"]), _HEAD.itemsize).astype(np.int64)
    whole = _sealed(name, places) + data[: _HEAD["crc32c"].itemsize]
    return places if crc32c(whole) == head["crc32c"].tobytes() else None


def _append(file: int, data: bytes) -> int:
    """Write at the end of a file, all or nothing, and return the number of bytes."""
    before = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, before)
        raise
    return len(data)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
