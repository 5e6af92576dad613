"""Receipts of finished shards, and the journal that hands them to the next run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c

from storage import typed
from storage.errors import CorruptImageError
from storage.limits import LIMITS

if TYPE_CHECKING:
    from collections.abc import Iterable

ShardKey = tuple[int, int, int]  # level, row, column


@dataclass(frozen=True, slots=True)
class Receipt:
    """A record of one finished shard; ``length`` 0 means that it is absent because all its pixels are zero."""

    level: int
    y: int
    x: int
    length: int  # bytes
    crc32: int  # of the whole file
    index_crc32c: int  # of the index that ends it, which is cheap to check
    tag: str = ""  # the object store's name for these very bytes

    @property
    def key(self) -> str:
        """Key of the file below the pyramid's root."""
        return f"{self.level}/c/0/{self.y}/{self.x}"

    @property
    def place(self) -> ShardKey:
        """Level, row and column."""
        return (self.level, self.y, self.x)

    @property
    def empty(self) -> bool:
        """Whether there is no file."""
        return self.length == 0


def by_place(receipts: Iterable[Receipt]) -> dict[ShardKey, Receipt]:
    """Receipts by level, row and column; the last one counts."""
    return {receipt.place: receipt for receipt in receipts}


def journal_lines(head: dict[str, Any] | None, receipts: Iterable[Receipt]) -> bytes:
    """Lines of a journal, the first of which identifies the job."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in (*filter(None, [head]), *map(asdict, receipts)))


def parse_journal(data: bytes, job: dict[str, Any]) -> list[Receipt]:
    """Receipts of a journal, none if the job is another; a line that a crash cut short is skipped."""
    entries = [entry for entry in map(_parse_line, data.splitlines()) if entry is not None]
    if not entries or entries[0] != {"job": job}:
        return []
    return [receipt for receipt in map(_parse_receipt, entries[1:]) if receipt is not None]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        return typed.parse_object(line)
    except ValueError:
        return None


def _parse_receipt(entry: dict[str, Any]) -> Receipt | None:
    tops = {"level": LIMITS.levels, "y": LIMITS.side, "x": LIMITS.side, "length": 2**62}
    tops |= {"crc32": 2**32 - 1, "index_crc32c": 2**32 - 1}
    try:
        values = {name: typed.integer(entry.get(name), name, 0, top) for name, top in tops.items()}
        return Receipt(**values, tag=typed.text(entry.get("tag"), "tag"))
    except ValueError:
        return None


def check_index(tail: bytes, receipt: Receipt, where: str) -> None:
    """Check that the last bytes of a shard are the index that was written.

    Raises
    ------
    CorruptImageError
        The disk or store did not keep what was written.
    """
    checksum = google_crc32c.value(tail[:-4])
    if checksum != receipt.index_crc32c or tail[-4:] != checksum.to_bytes(4, "little"):
        raise CorruptImageError(f"{where}: damaged after it was written; convert again")
