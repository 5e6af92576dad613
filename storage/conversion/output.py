"""What any place that a pyramid is written to must do: ``Output`` for the workers, ``Partial`` for the one driver."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from storage.conversion.receipts import Receipt

# What a pyramid of ours consists of.
OWN_KEYS = re.compile(r"zarr\.json|\d+/zarr\.json|\d+/c/0/\d+/\d+")


class Output(Protocol):
    """Where workers write shards; picklable and thread safe."""

    def write(self, key: str, pieces: Sequence[bytes], *, read_again: bool = True) -> str:
        """Store one file durably, whole or not at all, and return the store's tag of it (local folders: none).

        ``read_again`` tells whether the conversion itself will read it soon.
        """
        ...

    def read(self, key: str, limit: int) -> bytes:
        """Return a file written before, of at most ``limit`` bytes."""
        ...


class Partial(Protocol):
    """A pyramid being written, in the hands of the one driver that holds its lock."""

    @property
    def output(self) -> Output:
        """Where workers write."""
        ...

    @property
    def scratch(self) -> Path:
        """Local folder, to be made if needed, for files that need not survive."""
        ...

    def resume(self, job: dict[str, Any]) -> list[Receipt]:
        """Receipts of an earlier run of the same ``job``; what another job left behind is swept.

        Parameters
        ----------
        job
            JSON values that tell the source and the options; shards of another job are not reused.
        """
        ...

    def record(self, receipts: Sequence[Receipt]) -> None:
        """Enter finished shards in the journal."""
        ...

    def verify(self, receipts: Sequence[Receipt], index_bytes: int) -> None:
        """Check that every shard is there with its length and an index whose checksum holds.

        Raises
        ------
        CorruptImageError
            A shard is missing or damaged: the disk did not keep what was written.
        """
        ...

    def commit(self, files: dict[str, bytes], *, overwrite: bool) -> None:
        """Write the metadata, the root's last, and give the pyramid its name."""
        ...

    def discard(self) -> None:
        """Remove what was written."""
        ...
