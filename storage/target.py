"""A pyramid being written: locked, journalled, resumable, and moved to its name in one step.

Everything goes to ``NAME.partial``. Each shard is written under a temporary name, flushed to disk, renamed, and only
then entered in the journal; a rerun trusts a journalled shard only if its file still has that length and checksum.
The partial folder itself is the lock (``flock`` on its descriptor), so a killed converter leaves none behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from storage.errors import ConversionError, CorruptImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from storage.shard import EncodedShard

JOURNAL = "journal.jsonl"
SCRATCH = "scratch"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of one finished shard; ``length`` 0 means that it is absent because all its pixels are zero."""

    level: int
    y: int
    x: int
    length: int
    crc32c: int

    @property
    def key(self) -> str:
        """Where the file lies below the pyramid's root."""
        return f"{self.level}/c/0/{self.y}/{self.x}"

    @property
    def empty(self) -> bool:
        """Whether there is no file."""
        return self.length == 0


class PartialPyramid:
    """The folder ``NAME.partial`` while this process holds its lock; use ``open_partial``."""

    def __init__(self, target: Path, partial: Path) -> None:
        self.target = target
        self.root = partial
        self._folders: set[Path] = set()

    def resume(self, job: dict[str, Any]) -> list[Receipt]:
        """Receipts of an earlier run of the same ``job``; what another job left behind is swept.

        Parameters
        ----------
        job
            JSON values that tell the source and the options; shards of another job are not reused.
        """
        receipts = list(self._read_journal(job))
        self._sweep({receipt.key for receipt in receipts})
        lines = [json.dumps({"job": job}), *(json.dumps(asdict(receipt)) for receipt in receipts)]
        self.write(JOURNAL, [line.encode() + b"\n" for line in lines])
        return receipts

    @property
    def scratch(self) -> Path:
        """Folder for files that need not survive."""
        return self.root / SCRATCH

    def write_shard(self, level: int, y: int, x: int, shard: EncodedShard) -> Receipt:
        """Store one shard durably, then enter it in the journal; safe to call from several threads."""
        receipt = Receipt(level, y, x, shard.length, shard.crc32c)
        if not receipt.empty:
            self.write(receipt.key, shard.pieces)
        self._append(json.dumps(asdict(receipt)))
        return receipt

    def write(self, key: str, pieces: Iterable[bytes]) -> None:
        """Write one file under a temporary name, flush it to disk and rename it."""
        path = self.root / key
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        temporary = path.with_name(f"{path.name}.{next(_numbers)}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, key: str) -> bytes:
        """Return a file written before."""
        return (self.root / key).read_bytes()

    def commit(self, *, overwrite: bool) -> None:
        """Give the finished pyramid its name in one step, replacing an older one only if ``overwrite``."""
        (self.root / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        _flush_folder(self.root)
        old = self.target.with_name(f"{self.target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if overwrite and self.target.exists():
            os.rename(self.target, old)
        os.rename(self.root, self.target)
        _flush_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self.root)

    def _append(self, line: str) -> None:
        """Append one line in one write, which keeps lines of several threads whole."""
        fd = os.open(self.root / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)

    def _read_journal(self, job: dict[str, Any]) -> Iterator[Receipt]:
        """Receipts whose file still matches; a line cut short by a crash is skipped."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.root / JOURNAL).read_bytes().splitlines()
            entries = [entry for entry in map(_parse_line, lines) if entry is not None]
            if not entries or entries[0] != {"job": job}:
                return
            receipts = {(r.level, r.y, r.x): r for r in (Receipt(**entry) for entry in entries[1:])}
            yield from (receipt for receipt in receipts.values() if self._matches(receipt))

    def _matches(self, receipt: Receipt) -> bool:
        path = self.root / receipt.key
        if receipt.empty:
            return not path.exists()
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return False
        return len(data) == receipt.length and google_crc32c.value(data) == receipt.crc32c

    def _sweep(self, trusted: set[str]) -> None:
        """Delete every file but the trusted: damaged shards, temporary files, scratch."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                if path.relative_to(self.root).as_posix() not in trusted:
                    path.unlink()


@contextlib.contextmanager
def open_partial(target: Path) -> Iterator[PartialPyramid]:
    """Create or take over ``target``'s partial folder, exclusively.

    Raises
    ------
    ConversionError
        Another converter holds it, or the place cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        fd = _lock(partial, target)
    except OSError as error:
        raise ConversionError(f"{target}: cannot be written ({error.strerror}: {error.filename})") from error
    try:
        yield PartialPyramid(target, partial)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise ConversionError(f"{target}: writing failed ({reason}); run again to go on from here") from error
    finally:
        os.close(fd)


def _lock(partial: Path, target: Path) -> int:
    """Return a locked descriptor of the partial folder, made if need be."""
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        if not os.access(partial, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(partial))
        try:
            fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its owner has just given it its final name
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner may have renamed the folder between our open and our lock: then begin anew.
            if partial.exists() and os.path.samestat(os.fstat(fd), os.stat(partial)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ConversionError(f"{target}: another conversion to it is running ({partial} is locked)") from None
        os.close(fd)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _flush_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def verify(partial: PartialPyramid, receipts: Iterable[Receipt], index_bytes: dict[int, int]) -> None:
    """Check that every shard file has its length and an index whose checksum holds.

    Raises
    ------
    CorruptImageError
        A shard is missing or damaged: the disk did not keep what was written.
    """
    for receipt in receipts:
        if receipt.empty:
            continue
        path = partial.root / receipt.key
        try:
            with open(path, "rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(-min(length, index_bytes[receipt.level]), os.SEEK_END)
                tail = file.read()
        except FileNotFoundError:
            length, tail = -1, b""
        checksum = int(google_crc32c.value(tail[:-4])).to_bytes(4, "little")
        if length != receipt.length or checksum != tail[-4:]:
            raise CorruptImageError(f"{path}: damaged after it was written; convert again")
