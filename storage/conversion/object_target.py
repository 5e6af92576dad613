"""A pyramid being written to an object store (s3, gs, az), where nothing can be renamed.

Shards go straight to their final keys below ``NAME``, each in one put that happens whole or not at all; the root
``zarr.json``, without which readers refuse the prefix, goes last. Lock and journal lie below ``NAME.partial`` until
then. Every put is conditional on there being no such object: so a converter that lost its lock while it slept can at
worst stop its successor, not overwrite what that has written. A journalled shard is trusted if the store lists it
with the same length and e_tag, which means the same bytes.

Replacing a pyramid cannot be done in one step here: its root is deleted first, so that there is for a while none, but
never a mixture.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from storage.conversion.output import OWN_KEYS
from storage.conversion.receipts import Receipt, check_index, parse_journal
from storage.errors import ConversionError, CorruptImageError, StorageError
from storage.limits import LIMITS
from storage.place import retry
from storage.place.lease import Lease
from storage.place.objects import first_line
from storage.place.remote_store import RemoteStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from storage.place.ranges import Entry

ROOT = "zarr.json"
JOURNAL = "journal-"  # and a number
# What we write, and so may delete.
OWN_STATE = re.compile(r"lock|clock-[0-9a-f]+|journal-\d+")
BATCH = 16  # receipts in one journal object,
BATCH_S = 5.0  # unless they come slowly
CONCURRENCY = 16  # requests in flight
SHARD_TIMEOUT_S = 300.0  # of a request: a shard must get through where many share a slow line,
STATE_TIMEOUT_S = 10.0  # but one that hangs must not cost the lease


class ObjectOutput:
    """Objects below a URL, written once each; picklable and thread safe."""

    def __init__(self, url: str, timeout_s: float | None = None) -> None:
        self.objects = RemoteStore(url, timeout_s or SHARD_TIMEOUT_S, retry.WRITING)

    def write(self, key: str, pieces: Iterable[bytes], *, read_again: bool = True) -> str:  # noqa: ARG002
        """Store one object whole and return its e_tag; one that is already there must be the same.

        Raises
        ------
        ConversionError
            Another converter has written something else there, or the store refuses.
        TransferError
            The store did not answer, though asked several times.
        """
        return self.objects.put(key, pieces, if_absent=True)

    def read(self, key: str, limit: int) -> bytes:
        """Return an object written before, of at most ``limit`` bytes."""
        return self.objects.get(key, limit)


class ObjectPartial:
    """A pyramid in an object store while this process holds its lease; use ``open_object_partial``."""

    def __init__(self, output: ObjectOutput, state: ObjectOutput, lease: Lease, scratch: Path) -> None:
        self.output = output
        self.scratch = scratch
        self._objects = output.objects
        self._state = state
        self._lease = lease
        self._job: dict[str, Any] = {}
        self._journals = 0  # the number of the next one
        self._pending: list[Receipt] = []
        self._flushed = time.monotonic()

    def resume(self, job: dict[str, Any]) -> list[Receipt]:
        """Receipts of an earlier run of the same ``job``; everything else below the URL is deleted, its root first.

        The caller has made sure that a pyramid that is there is to be replaced.

        Raises
        ------
        ConversionError
            There are objects below the URL that no converter has left there.
        """
        present = self._objects.entries()
        journals = [key for key in _own_state(self._state) if key.startswith(JOURNAL)]
        self._refuse_foreign(present, known=ROOT in present or bool(journals))
        found = {receipt.key: receipt for key in journals for receipt in self._read_journal(key, job)}
        trusted = {key: receipt for key, receipt in found.items() if _is_there(receipt, present.get(key))}
        self._job = job
        self._journals = int(journals[-1].removeprefix(JOURNAL)) + 1 if journals else 0
        self._pending = list(trusted.values())
        self.flush()  # before anything is deleted, as it tells that what is there is ours
        self._delete([ROOT] if ROOT in present else [])
        self._delete([key for key in present if key != ROOT and key not in trusted])
        self._state.objects.delete(journals)
        return list(trusted.values())

    def record(self, receipts: Sequence[Receipt]) -> None:
        """Enter finished shards in the journal, some at a time; those that a crash leaves out are made again."""
        self._lease.check()
        self._pending += receipts
        if len(self._pending) >= BATCH or time.monotonic() - self._flushed > BATCH_S:
            self.flush()

    def flush(self) -> None:
        """Write the receipts that are not in the journal yet."""
        lines = [{"job": self._job}, *map(asdict, self._pending)]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self._state.write(f"{JOURNAL}{self._journals:05}", [data])
        self._journals += 1
        self._pending = []
        self._flushed = time.monotonic()

    def verify(self, receipts: Sequence[Receipt], index_bytes: int) -> None:
        """Check that the store lists the very objects that were put, no others, and gives back the end of each.

        The e_tags tell that the bytes are those that the store has acknowledged. Reading the index costs a request
        for each shard, a twelfth of the price of its put, and shows that the store also serves what it lists.
        """
        present = self._objects.entries()
        stored = {receipt.key: receipt for receipt in receipts if not receipt.empty}
        for key in present.keys() | stored.keys():
            if key not in stored or not _is_there(stored[key], present.get(key)):
                what = "is missing or not what was written" if key in stored else "was written by another conversion"
                raise CorruptImageError(f"{self._objects.name}/{key}: {what}; convert again")
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for _ in pool.map(lambda receipt: self._verify_index(receipt, index_bytes), stored.values()):
                self._lease.check()

    def commit(self, files: dict[str, bytes], *, overwrite: bool) -> None:  # noqa: ARG002  ``resume`` has made room
        """Write the metadata, the root's last, which makes the pyramid whole; then remove lock and journal."""
        for key in sorted(files, key=lambda key: key == ROOT):
            if key == ROOT:
                self._lease.renew()
            self.output.write(key, [files[key]])
        self._pending = []
        with contextlib.suppress(StorageError):  # the pyramid is whole; ``sweep_leftovers`` can remove them later
            self._remove_state()

    def discard(self) -> None:
        """Remove what was written; a pyramid that is whole stays."""
        present = self._objects.entries()
        self._pending = []
        if ROOT not in present and self._job:  # only ``resume`` has made sure that all of it is ours
            self._delete(list(present))
        self._remove_state()

    def close(self) -> None:
        """Write what the next run needs and let it in at once."""
        with contextlib.suppress(StorageError):
            self._lease.check()
            if self._pending:
                self.flush()
        self._lease.release()

    def _refuse_foreign(self, present: Iterable[str], *, known: bool) -> None:
        for key in present:
            if not (known and OWN_KEYS.fullmatch(key)):
                url = self._objects.name
                raise ConversionError(
                    f"{url}: holds {key}, which is of no pyramid made here; remove it, or write elsewhere"
                )

    def _read_journal(self, key: str, job: dict[str, Any]) -> Iterator[Receipt]:
        yield from parse_journal(self._state.read(key, LIMITS.metadata_bytes), job)

    def _verify_index(self, receipt: Receipt, index_bytes: int) -> None:
        try:
            tail = next(self._objects.get_ranges([(receipt.key, receipt.length - index_bytes, index_bytes)]))
        except FileNotFoundError:
            tail = b""
        check_index(tail, receipt, f"{self._objects.name}/{receipt.key}")

    def _delete(self, keys: list[str]) -> None:
        self._lease.check()  # what another has written must stay
        self._objects.delete(keys)

    def _remove_state(self) -> None:
        self._lease.check()
        self._lease.stop()
        self._state.objects.delete(_own_state(self._state))


@contextlib.contextmanager
def open_object_partial(url: str) -> Iterator[ObjectPartial]:
    """Take the lock of ``url``'s output, and let go of it at the end; what was recorded stays for the next run.

    Raises
    ------
    ConversionError
        Another converter holds it, or the store or this disk refuses.
    TransferError
        The store does not answer.
    """
    url = url.rstrip("/")
    if url.count("/") < 3:  # scheme://bucket/name
        raise ConversionError(f"{url}: is a bucket; a pyramid needs a name below it")
    state = ObjectOutput(f"{url}.partial", STATE_TIMEOUT_S)
    lease = Lease(state.objects, url)
    try:
        with TemporaryDirectory(prefix="storage-") as scratch:
            partial = ObjectPartial(ObjectOutput(url), state, lease, Path(scratch))
            lease.acquire()
            try:
                yield partial
            finally:
                partial.close()
    except OSError as error:
        raise ConversionError(f"{url}: writing failed ({first_line(error)}); run again to go on from here") from error


def sweep_object_leftovers(url: str) -> None:
    """Remove the lock and journal that a converter left which was killed when its pyramid was just whole."""
    with contextlib.suppress(StorageError):
        if _own_state(ObjectOutput(f"{url.rstrip('/')}.partial", STATE_TIMEOUT_S)):
            with open_object_partial(url) as partial:
                partial.discard()


def _own_state(state: ObjectOutput) -> list[str]:
    return sorted(key for key in state.objects.entries() if OWN_STATE.fullmatch(key))


def _is_there(receipt: Receipt, entry: Entry | None) -> bool:
    """Whether the store has what the receipt says: these bytes, or nothing where all pixels are zero."""
    if receipt.empty or entry is None:
        return receipt.empty and entry is None
    return entry == (receipt.length, receipt.tag)
