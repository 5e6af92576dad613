"""A pyramid being written: locked, journalled, resumable, and whole before it has its name.

Two protocols say what any place to write to must do (``Output`` for the workers, ``Partial`` for the one driver);
here is the local folder, and ``storage.object_target`` has object stores.

Locally, everything goes to ``NAME.partial``. Each shard is written under a temporary name, flushed to disk, renamed,
and only then entered in the journal; a rerun trusts a journalled shard only if its file still has that length and
checksum. ``NAME.partial.lock`` is locked by the system for a process, so that of a killed converter does not hold.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c

from storage.errors import ConversionError, CorruptImageError
from storage.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ShardKey = tuple[int, int, int]  # level, row, column
JOURNAL = "journal.jsonl"
SCRATCH = "scratch"
# What a pyramid of ours consists of, and what else lies in one that is being written.
OWN_KEYS = re.compile(r"zarr\.json|\d+/zarr\.json|\d+/c/0/\d+/\d+")
_OWN_PARTS = re.compile(rf"({OWN_KEYS.pattern}|{re.escape(JOURNAL)})(\.[\d-]+\.tmp)?|{SCRATCH}/band-\d+")
MAX_PIECES = 512  # in one call; Linux takes 1024
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of one finished shard; ``length`` 0 means that it is absent because all its pixels are zero."""

    level: int
    y: int
    x: int
    length: int  # bytes
    crc32: int  # of the whole file
    index_crc32c: int  # of the index that ends it, which a reader can check for the price of reading the index
    tag: str = ""  # the object store's name for these very bytes

    @property
    def key(self) -> str:
        """Where the file lies below the pyramid's root."""
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
    """Receipts by level, row and column; of several for one shard the last."""
    return {receipt.place: receipt for receipt in receipts}


def check_index(tail: bytes, receipt: Receipt, where: str) -> None:
    """See that the last bytes of a shard are the index that was written.

    Raises
    ------
    CorruptImageError
        They are not: the disk or store did not keep what was written.
    """
    checksum = google_crc32c.value(tail[:-4])
    if checksum != receipt.index_crc32c or tail[-4:] != checksum.to_bytes(4, "little"):
        raise CorruptImageError(f"{where}: damaged after it was written; convert again")


class Output(Protocol):
    """Where workers write shards; picklable and thread safe."""

    def write(self, key: str, pieces: Sequence[bytes], *, read_again: bool = True) -> str:
        """Store one file durably, whole or not at all, and return the store's tag of it (local folders: none).

        ``read_again`` tells whether the conversion itself will read it soon.
        """
        ...

    def read(self, key: str) -> bytes:
        """Return a file written before."""
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


@contextlib.contextmanager
def open_partial(target: str) -> Iterator[Partial]:
    """Create or take over what is being written to a folder or URL, exclusively.

    Raises
    ------
    ConversionError
        Another converter holds it, or the place cannot be written, or no longer.
    """
    if "://" in target:
        from storage.object_target import open_object_partial

        with open_object_partial(target) as remote:
            yield remote
    else:
        with _open_local(Path(target)) as local:
            yield local


def sweep_leftovers(target: str) -> None:
    """Remove what a converter left beside a pyramid that it had just made whole when it was killed."""
    if "://" in target:
        from storage.object_target import sweep_object_leftovers

        sweep_object_leftovers(target)
    else:
        shutil.rmtree(_replaced(Path(target)), ignore_errors=True)
        with contextlib.suppress(ConversionError, OSError), _locked(Path(target)):
            pass  # a lock that was taken properly is removed on the way out


def check_replaceable(target: str) -> None:
    """See that a folder holds nothing but a pyramid of ours; object stores see to it themselves.

    Raises
    ------
    ConversionError
        It is a file or a link, or holds files of others.
    """
    path = Path(target)
    if "://" in target:
        return
    if path.is_symlink() or not path.is_dir():
        raise ConversionError(f"{target}: a file or a link, which is not overwritten; remove it")
    if (stranger := _stranger(path, OWN_KEYS)) is not None:
        raise ConversionError(
            f"{target}: holds {stranger}, which is no part of a pyramid; remove the folder yourself"
        )


def _stranger(root: Path, own: re.Pattern[str]) -> str | None:
    """Name of a file below a folder that is not one of ours."""
    for folder, _, names in os.walk(root):
        for name in names:
            key = Path(folder, name).relative_to(root).as_posix()
            if not own.fullmatch(key):
                return key
    return None


def _replaced(target: Path) -> Path:
    """Where the pyramid that is being replaced goes for the moment between two renames."""
    return target.with_name(f"{target.name}.replaced")


@dataclass(frozen=True)
class LocalOutput:
    """Files below a folder, which workers on other machines must see under the same name."""

    root: Path

    def write(self, key: str, pieces: Sequence[bytes], *, read_again: bool = True) -> str:
        """Write one file under a temporary name, flush it to disk and rename it.

        One that is not read again leaves the page cache, which a stream of gigabytes would only fill for nothing.
        """
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
        try:
            with open(temporary, "wb", buffering=0) as file:
                _write_all(file.fileno(), pieces)
                os.fsync(file.fileno())
                if not read_again and hasattr(os, "posix_fadvise"):
                    with contextlib.suppress(OSError):  # a hint
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return ""

    def read(self, key: str) -> bytes:
        """Return a file written before."""
        return (self.root / key).read_bytes()


class LocalPartial:
    """The folder ``NAME.partial`` while this process holds its lock."""

    def __init__(self, target: Path, root: Path) -> None:
        self.target = target
        self.root = root
        self.output = LocalOutput(root)
        self.scratch = root / SCRATCH

    def resume(self, job: dict[str, Any]) -> list[Receipt]:
        """Receipts whose file still matches; see ``Partial``."""
        receipts = list(self._read_journal(job))
        self._sweep({receipt.key for receipt in receipts})
        lines = [json.dumps({"job": job}), *(json.dumps(asdict(receipt)) for receipt in receipts)]
        self.output.write(JOURNAL, [line.encode() + b"\n" for line in lines])
        return receipts

    def record(self, receipts: Sequence[Receipt]) -> None:
        """Append to the journal; a line that a crash cuts short is skipped later."""
        with open(self.root / JOURNAL, "ab") as file:
            file.writelines(json.dumps(asdict(receipt)).encode() + b"\n" for receipt in receipts)

    def verify(self, receipts: Sequence[Receipt], index_bytes: int) -> None:
        """Check lengths and index checksums; see ``Partial``."""
        for receipt in receipts:
            if not receipt.empty:
                _verify(self.root / receipt.key, receipt, index_bytes)

    def commit(self, files: dict[str, bytes], *, overwrite: bool) -> None:
        """Rename the finished folder, after an older pyramid was moved away if ``overwrite``."""
        for key, data in files.items():
            self.output.write(key, [data])
        (self.root / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for folder, _, _ in os.walk(self.root):
            _flush_folder(Path(folder))
        old = _replaced(self.target)
        shutil.rmtree(old, ignore_errors=True)
        if overwrite and self.target.exists():
            os.rename(self.target, old)
        try:
            os.rename(self.root, self.target)
        except OSError:
            if old.exists():
                os.rename(old, self.target)
            raise
        _flush_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self.root)

    def _read_journal(self, job: dict[str, Any]) -> Iterator[Receipt]:
        """Receipts whose file still matches; a line cut short by a crash is skipped."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.root / JOURNAL).read_bytes().splitlines()
            entries = [entry for entry in map(_parse_line, lines) if entry is not None]
            if not entries or entries[0] != {"job": job}:
                return
            receipts = by_place(Receipt(**entry) for entry in entries[1:])
            yield from (receipt for receipt in receipts.values() if self._matches(receipt))

    def _matches(self, receipt: Receipt) -> bool:
        path = self.root / receipt.key
        if receipt.empty:
            return not path.exists()
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return False
        return len(data) == receipt.length and zlib.crc32(data) == receipt.crc32

    def _sweep(self, trusted: set[str]) -> None:
        """Delete every file but the trusted: damaged shards, temporary files, scratch, and folders left empty."""
        if (stranger := _stranger(self.root, _OWN_PARTS)) is not None:
            raise ConversionError(f"{self.root}: holds {stranger}, which no conversion has put there; move it away")
        for folder, _, names in os.walk(self.root, topdown=False):
            for name in names:
                path = Path(folder, name)
                if path.relative_to(self.root).as_posix() not in trusted:
                    path.unlink()
            if folder != str(self.root) and not os.listdir(folder):
                os.rmdir(folder)


@contextlib.contextmanager
def _open_local(target: Path) -> Iterator[LocalPartial]:
    """Create or take over ``target``'s partial folder."""
    partial = target.with_name(target.name + ".partial")
    with _locked(target):
        try:
            partial.mkdir(exist_ok=True)
            if not os.access(partial, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied", str(partial))
        except OSError as error:
            raise ConversionError(f"{target}: cannot be written ({error.strerror}: {error.filename})") from error
        try:
            yield LocalPartial(target, partial)
        except OSError as error:
            reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            raise ConversionError(f"{target}: writing failed ({reason}); run again to go on from here") from error


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold ``NAME.partial.lock``."""
    path = target.with_name(target.name + ".partial.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except BlockingIOError:
            raise ConversionError(f"{target}: another conversion to it is running ({path} is locked)") from None
        except OSError as error:
            raise ConversionError(f"{target}: cannot be written ({error.strerror}: {error.filename})") from error
        yield


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _write_all(fd: int, pieces: Sequence[bytes]) -> None:
    """Write many pieces with few calls, however much each call takes."""
    waiting = [memoryview(piece) for piece in reversed(pieces)]
    while waiting:
        written = os.writev(fd, waiting[: -MAX_PIECES - 1 : -1])
        while waiting and written >= len(waiting[-1]):
            written -= len(waiting.pop())
        if written:
            waiting[-1] = waiting[-1][written:]


def _flush_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _verify(path: Path, receipt: Receipt, index_bytes: int) -> None:
    try:
        with open(path, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(-min(length, index_bytes), os.SEEK_END)
            tail = file.read()
    except FileNotFoundError:
        length, tail = -1, b""
    check_index(tail if length == receipt.length else b"", receipt, str(path))
