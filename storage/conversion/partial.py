"""A pyramid being written: locked, journalled, resumable, and verified before it is made whole.

Shards are stored durably and only then entered in the journal; a rerun trusts a journalled shard only if it is still
what was written. ``folder_target`` and ``object_target`` differ in how they check that, and in how a pyramid becomes
whole: a folder is renamed, while in an object store, where nothing can be renamed, the root's metadata goes last.
"""

from __future__ import annotations

import contextlib
import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from storage.conversion.receipts import Receipt, by_place, check_index, parse_journal
from storage.errors import ConversionError, CorruptImageError
from storage.place.objects import first_line
from storage.threads import spread

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from storage.place.lease import Lease
    from storage.place.ranges import Entry
    from storage.place.stores import Store

ROOT = "zarr.json"  # metadata of the whole pyramid; readers refuse a pyramid without
JOURNAL = "journal.jsonl"  # its name in a folder, where it lies among the shards
JOURNAL_BYTES = 512 * 2**20  # four times what the shards of the largest pyramid take
BATCH_S = 5.0  # after this time even a few receipts are journalled
# The files of our own pyramids, and of the labels that we put into them.
OWN_KEYS = re.compile(r"(labels/((tissue|valid)/)?)?zarr\.json|(labels/(tissue|valid)/)?\d+/(zarr\.json|c/0/\d+/\d+)")


class Partial(ABC):
    """A pyramid being written by the one driver that holds its lock.

    Attributes
    ----------
    output : where workers put shards
    scratch : local folder, to be made if needed, for files that need not survive
    """

    batch: int  # receipts that are journalled together, unless they come slowly

    def __init__(self, output: Store, scratch: Path, lease: Lease | None = None) -> None:
        self.output, self.scratch, self._lease = output, scratch, lease
        self._job: dict[str, Any] = {}
        self._pending: list[Receipt] = []  # not in the journal yet
        self._flushed = time.monotonic()

    def resume(self, job: dict[str, Any]) -> list[Receipt]:
        """Return the receipts of an earlier run of the same ``job`` for intact shards; delete all other files.

        The caller has made sure that an existing pyramid is to be replaced.

        Parameters
        ----------
        job
            JSON values that identify source and options; shards of another job are not reused.

        Raises
        ------
        ConversionError
            There are files that no converter has written.
        """
        present, journals = self.output.entries(), self._earlier_journals()
        self._refuse_strangers(present, known=ROOT in present or bool(journals))
        found = by_place(receipt for data in journals for receipt in parse_journal(data, job)).values()
        trusted = {r.key: r for r in found if _is_there(r, present.get(r.key)) and self._is_intact(r)}
        self._job = job
        self._begin_journal(list(trusted.values()))  # first, as it marks the files as ours
        doomed = present.keys() - trusted.keys() - {JOURNAL}
        self._delete(doomed & {ROOT})  # first, so that a half-deleted pyramid is none
        self._delete(doomed - {ROOT})
        return list(trusted.values())

    def record(self, receipts: Sequence[Receipt]) -> None:
        """Journal finished shards, now or soon; those that a crash leaves out are made again."""
        self._check_lock()
        self._pending += receipts
        if len(self._pending) >= self.batch or time.monotonic() - self._flushed > BATCH_S:
            self.flush()

    def flush(self) -> None:
        """Write the receipts that are not in the journal yet."""
        self._append_journal(self._pending)
        self._pending, self._flushed = [], time.monotonic()

    def verify(self, receipts: Sequence[Receipt], index_bytes: int) -> None:
        """Check that exactly the stored shards are there and that each ends with its index.

        Reading an object's index costs a request, a twelfth of the price of its put, and shows that the store serves
        what it lists.

        Raises
        ------
        CorruptImageError
            The disk or store did not keep what was written.
        """
        present = self.output.entries()
        stored = {receipt.key: receipt for receipt in receipts if not receipt.empty}
        for key in stored.keys() | set(filter(OWN_KEYS.fullmatch, present)):
            if key not in stored or not _is_there(stored[key], present.get(key)):
                what = "damaged after it was written" if key in stored else "written by another conversion"
                raise CorruptImageError(f"{self.output.name}/{key}: {what}; convert again")

        def work(share: list[Receipt]) -> None:
            for receipt in share:
                self._check_lock()
                self._verify_index(receipt, index_bytes)

        spread(work, list(stored.values()), self.output.concurrency)

    def commit(self, files: dict[str, bytes], *, overwrite: bool) -> None:
        """Write the metadata, the root's last, and publish the pyramid; an older one is replaced if ``overwrite``."""
        for key in sorted(files, key=lambda key: key == ROOT):
            if key == ROOT and self._lease is not None:
                self._lease.renew()
            self.output.put(key, [files[key]], if_absent=True)
        self._pending = []
        self._publish(overwrite=overwrite)

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written, but no whole pyramid."""

    @abstractmethod
    def _publish(self, *, overwrite: bool) -> None:
        """Let readers find the finished pyramid, and remove what a rerun would need."""

    @abstractmethod
    def _refuse_strangers(self, present: Collection[str], *, known: bool) -> None:
        """Raise ``ConversionError`` for files that no converter has written; ``known`` tells whether one was here."""

    @abstractmethod
    def _is_intact(self, receipt: Receipt) -> bool:
        """Whether a shard of the right length and tag has the right bytes."""

    @abstractmethod
    def _earlier_journals(self) -> list[bytes]: ...

    @abstractmethod
    def _begin_journal(self, receipts: list[Receipt]) -> None:
        """Replace earlier journals by a new one, so that there is always one."""

    @abstractmethod
    def _append_journal(self, receipts: list[Receipt]) -> None: ...

    def _check_lock(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _delete(self, keys: Collection[str]) -> None:
        self._check_lock()  # the files of another converter must stay
        self.output.delete(sorted(keys))

    def _verify_index(self, receipt: Receipt, index_bytes: int) -> None:
        wanted = (receipt.key, receipt.length - index_bytes, index_bytes)
        tail = b""
        with contextlib.suppress(FileNotFoundError):
            tail = next(self.output.get_ranges([wanted]))
        check_index(tail, receipt, f"{self.output.name}/{receipt.key}")


def _is_there(receipt: Receipt, entry: Entry | None) -> bool:
    """Whether a store's listing agrees with a receipt: the same bytes, or no file where all pixels are 0."""
    if receipt.empty or entry is None:
        return receipt.empty and entry is None
    return entry == (receipt.length, receipt.tag)


@contextlib.contextmanager
def resumable(target: str) -> Iterator[None]:
    """Turn errors of a disk or store while a pyramid is written into our own, which say how to go on."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or first_line(error)) + (f": {error.filename}" if error.filename else "")
        raise ConversionError(f"{target}: writing failed ({reason}); run again to go on from here") from error
