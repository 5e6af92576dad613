"""Features of patches on a disk: one file for each slide and encoder, shared by epochs, runs, folds and processes.

Notable: nothing here can make a feature wrong. A file is named by all that decides its features
(`nested_ats.feature_store`), and grows by blocks: a heading that lists the places of some patches, then their rows. A
crc32c of each heading and each row holds for that name and the places too. What a killed writer left unfinished, and
what follows a damaged heading, is cut off by the next writer; a damaged row counts as missing. Readers walk along the
headings alone. Writers hold the folder's lock and readers none, and no file is kept open or mapped, so that this is
for network file systems too. Where the folder is full, files go that nobody has used since this process began, the
least recently used first: a training for which there is too little room would else drop what its next epoch asks for.

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
from pipeline.config import FeaturesConfig
from storage import StorageError
from storage.format.shard import checksum_holds, crc32c
from storage.place.local_store import NotAFile, open_regular
from storage.read.cache import BoundedFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

_HELD_INDEXES = 256  # of files, each of 16 bytes a patch
_PEEK = 4096  # bytes read of a block to see its heading: more than most have
_HEAD = np.dtype([("count", "<u4"), ("crc32c", "<u4")])  # of a block; (count, 2) places follow, and count rows
_PLACE = np.dtype(("<i8", 2))
_TOUCH_S = 60.0  # a file in use is said to be so no more often
_SKEW_S = 10.0  # by which the clock of a file system may be behind ours
_WAIT_S = 60.0  # after which a full folder is looked at again


class DiskFeatures:
    """A `nested_ats.FeatureStore` in a folder; safe between threads and processes.

    A disk that fails or fills fails nothing: it is said once, and no more is kept.

    Parameters
    ----------
    folder
        Made if it is not there.
    max_bytes
        What the files may hold in all. Besides there may be, until files are next counted anew, what processes were
        adding as they were killed.

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
                    os.utime(file)  # or it could be what has to go
                    index, size = self._index(name, file, record), os.fstat(file).st_size
                    if size > index.end:  # a writer was killed; or it is another file by now than the one known
                        index = self._index(name, file, record, anew=True)
                        os.ftruncate(file, index.end)
                        total.bytes -= size - index.end
                    new = index.find(places.numpy()) < 0
                    if not new.any():
                        return
                    data = _encode(name, record, places.numpy()[new], rows.numpy()[new])
                    if not self._folder.make_room(total, len(data), unused_since=self._began):
                        self._full_until = time.monotonic() + _WAIT_S
                        return
                    total.bytes += _append(file, data)
        except OSError as error:
            self._give_up(error)

    @property
    def counts(self) -> Tensor:
        """How many patches were found, and how many were looked for, (2,) float64."""
        with self._lock:
            return torch.tensor(self._counts, dtype=torch.float64)

    def _touch(self, name: str, file: int) -> None:
        """Say that a file is in use."""
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_S) >= _TOUCH_S:
            self._touched[name] = now
            os.utime(file)

    def _index(self, name: str, file: int, record: np.dtype[Any], *, anew: bool = False) -> _Index:
        """Where the places of a file are, those that were added since it was last looked through included."""
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
        """Keep no more, and say so."""
        if self._full_until != float("inf"):
            self._full_until = float("inf")
            _say(f"{self._folder.folder}: {error.strerror}; no more features of patches are kept there")


class _Index(NamedTuple):
    """Where in a file the rows of places are.

    Attributes
    ----------
    inode
        Of the file.
    end
        Bytes of its blocks that were looked at.
    keys
        Their places as one number each, in order; what came last is the last of equal ones.
    offsets
        Of the row of each.
    """

    inode: int
    end: int
    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def find(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offsets of the rows of (N, 2) places, -1 for those that are not there."""
        if not len(self.keys):
            return np.full(len(places), -1)
        wanted = _keys(places)
        at = np.searchsorted(self.keys, wanted, side="right") - 1
        return np.where((at >= 0) & (self.keys[at] == wanted), self.offsets[at], -1)

    def extended(self, name: str, file: int, size: int, record: np.dtype[Any]) -> _Index:
        """The index of all whole blocks within `size` bytes."""
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
        """The index but for some rows."""
        kept = ~np.isin(self.offsets, offsets)
        return self._replace(keys=self.keys[kept], offsets=self.offsets[kept])


def use_features(model: ImageModel, config: FeaturesConfig | None) -> DiskFeatures | None:
    """Let a model with a frozen encoder keep its features; where it cannot, say why and go on without.

    Parameters
    ----------
    model
        Of any kind.
    config
        Where; none for nowhere.

    Returns
    -------
    What the model uses now, if anything.
    """
    if config is None or not isinstance(model, PatchModel) or model.config.trainable != "none":
        return None
    try:
        folder = config.folder or default_folder()
        model.store = store = DiskFeatures(folder, int(config.gigabytes * 1e9))
    except (StorageError, RuntimeError) as error:  # the latter where there is no home
        _say(f"{error} (features of patches are not kept)")
        return None
    return store


def default_folder() -> Path:
    """Folder of the features in the user's cache, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nested-ats" / "features"


@contextmanager
def _opened(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)


def _record(width: int) -> np.dtype[Any]:
    """A patch's row in a file, with the crc32c of the file's name, the patch's place and its numbers."""
    return np.dtype([("row", "<f4", width), ("crc32c", "<u4")])


def _keys(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number of each (N, 2) place. Of two places with one number, a row is that of the one it is sealed with."""
    return (places[:, 0] << 32) ^ (places[:, 1] & 0xFFFFFFFF)


def _sealed(name: str, places: NDArray[np.int64]) -> bytes:
    """What a checksum holds for besides what it ends."""
    return name.encode() + places.astype(_PLACE.base).tobytes()


def _encode(name: str, record: np.dtype[Any], places: NDArray[np.int64], rows: NDArray[np.float32]) -> bytes:
    """A block."""
    head = np.array([len(places)], _HEAD["count"]).tobytes()
    parts = [head, crc32c(_sealed(name, places) + head), places.astype(_PLACE.base).tobytes()]
    for place, row in zip(places, rows.astype(record["row"].base), strict=True):
        parts += [row.tobytes(), crc32c(_sealed(name, place) + row.tobytes())]
    return b"".join(parts)


def _read_heading(name: str, file: int, start: int) -> NDArray[np.int64] | None:
    """The (N, 2) places of the block that starts there; None where there is none, or it is damaged."""
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
    """Write at the end of a file, all or nothing, and return how many bytes."""
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
