"""A pyramid being written to an object store (s3, gs, az), where nothing can be renamed.

Shards go straight to their final keys below ``NAME``, each in one atomic put; the root ``zarr.json``, without which
readers refuse the prefix, goes last. Lock and journal lie below ``NAME.partial`` until then. Every put is conditional
on there being no such object, so a converter that lost its lock while it slept can at worst stop its successor, but
not overwrite its objects. A journalled shard is trusted if the store lists it with the same length and e_tag, which
means the same bytes.

A pyramid cannot be replaced in one step here: its root is deleted first, so that for a while there is none, but never
a mixture.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from storage.conversion.partial import JOURNAL_BYTES, OWN_KEYS, ROOT, Partial, resumable
from storage.conversion.receipts import journal_lines
from storage.errors import ConversionError, StorageError
from storage.place import retry
from storage.place.lease import Lease
from storage.place.remote_store import RemoteStore
from storage.place.urls import is_web

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from storage.conversion.receipts import Receipt

JOURNAL = "journal-"  # a number follows, since nothing can be appended to an object
OWN_STATE = re.compile(r"lock|clock-[0-9a-f]+|journal-\d+")  # names that we write and so may delete
SHARD_TIMEOUT_S = 300.0  # of a request: a shard must get through a slow, shared line,
STATE_TIMEOUT_S = 10.0  # but one that hangs must not cost the lease


class ObjectPartial(Partial):
    """A pyramid in an object store while this process holds its lease."""

    batch = 16
    _lease: Lease

    def __init__(self, url: str, scratch: Path) -> None:
        self._state = _state(url)
        self._journals: list[str] = []  # journals of earlier runs
        self._next = 0  # number of the next journal
        super().__init__(RemoteStore(url, SHARD_TIMEOUT_S, retry.WRITING), scratch, Lease(self._state, url))

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: str) -> Iterator[Self]:
        """Hold the lease for the block; recorded shards stay for the next run. See ``Partial``."""
        url = target.rstrip("/")
        if url.count("/") < 3:  # scheme://bucket/name
            raise ConversionError(f"{url}: is a bucket; a pyramid needs a name below it")
        with resumable(url), TemporaryDirectory(prefix="storage-") as scratch:
            partial = cls(url, Path(scratch))
            partial._lease.acquire()
            try:
                yield partial
            finally:
                partial._close()

    @staticmethod
    def sweep(target: str) -> None:
        """Remove the lock and the journal."""
        with contextlib.suppress(StorageError):
            if _own_state(_state(target)):
                with ObjectPartial.open(target) as partial:
                    partial.discard()

    @staticmethod
    def is_occupied(target: str) -> bool:
        """Whether there is a root, which would mark a pyramid as whole."""
        if is_web(target):
            raise ConversionError(
                f"{target}: http and https can only be read; write to a folder, s3://, gs:// or az://"
            )
        try:
            RemoteStore(target).get(ROOT)
        except FileNotFoundError:
            return False
        return True

    @staticmethod
    def check_replaceable(target: str) -> None:
        """Do nothing, since ``resume`` checks this once nobody else writes there."""

    def discard(self) -> None:
        """Remove what was written; a pyramid that is whole stays."""
        present = self.output.entries()
        self._pending = []
        if ROOT not in present and self._job:  # only after ``resume`` is it certain that all of it is ours
            self._delete(present)
        self._remove_state()

    def _publish(self, *, overwrite: bool) -> None:  # noqa: ARG002  ``resume`` has removed the old one
        """Remove lock and journal; the root's metadata has already made the pyramid whole."""
        with contextlib.suppress(StorageError):  # ``sweep`` can remove them later
            self._remove_state()

    def _refuse_strangers(self, present: Collection[str], *, known: bool) -> None:
        for key in present:
            if not (known and OWN_KEYS.fullmatch(key)):
                url = self.output.name
                raise ConversionError(
                    f"{url}: holds {key}, which belongs to no pyramid of ours; remove it, or write elsewhere"
                )

    def _is_intact(self, receipt: Receipt) -> bool:  # noqa: ARG002  equal tags mean equal bytes
        return True

    def _earlier_journals(self) -> list[bytes]:
        self._journals = [key for key in _own_state(self._state) if key.startswith(JOURNAL)]
        return [self._state.get(key, JOURNAL_BYTES) for key in self._journals]

    def _begin_journal(self, receipts: list[Receipt]) -> None:
        self._next = int(self._journals[-1].removeprefix(JOURNAL)) + 1 if self._journals else 0
        self._append_journal(receipts)
        self._check_lock()  # the journal of another converter must stay
        self._state.delete(self._journals)

    def _append_journal(self, receipts: list[Receipt]) -> None:
        lines = journal_lines({"job": self._job}, receipts)
        self._state.put(f"{JOURNAL}{self._next:05}", [lines], if_absent=True)
        self._next += 1

    def _close(self) -> None:
        """Write the journal and free the lock, so that the next run can start at once."""
        with contextlib.suppress(StorageError):
            self._lease.check()
            if self._pending:
                self.flush()
        self._lease.release()

    def _remove_state(self) -> None:
        self._lease.check()
        self._lease.stop()
        self._state.delete(_own_state(self._state))


def _state(url: str) -> RemoteStore:
    """URL of lock and journal."""
    return RemoteStore(f"{url.rstrip('/')}.partial", STATE_TIMEOUT_S, retry.WRITING)


def _own_state(state: RemoteStore) -> list[str]:
    return sorted(filter(OWN_STATE.fullmatch, state.entries()))
