"""A pyramid being written: locked, journalled, resumable, and whole before it has its name.

Here is the local folder, and ``storage.conversion.object_target`` has object stores.

Locally, everything goes to ``NAME.partial``. Each shard is written under a temporary name, flushed to disk, renamed,
and only then entered in the journal; a rerun trusts a journalled shard only if its file still has that length and
checksum. ``NAME.partial.lock`` is locked by the system for a process, so that of a killed converter does not hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.conversion.output import OWN_KEYS
from storage.conversion.receipts import Receipt, by_place, check_index, parse_journal
from storage.errors import ConversionError, CorruptImageError
from storage.place.atomic import flush_folder
from storage.place.local_store import LocalStore
from storage.place.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from storage.conversion.output import Partial

JOURNAL = "journal.jsonl"
SCRATCH = "scratch"
# What else lies in a pyramid that is being written.
_OWN_PARTS = re.compile(rf"({OWN_KEYS.pattern}|{re.escape(JOURNAL)})(\.[\d-]+\.tmp)?|{SCRATCH}/band-\d+")
JOURNAL_BYTES = 512 * 2**20  # at most, four times what as many shards take as a pyramid may have


@contextlib.contextmanager
def open_partial(target: str) -> Iterator[Partial]:
    """Create or take over what is being written to a folder or URL, exclusively.

    Raises
    ------
    ConversionError
        Another converter holds it, or the place cannot be written, or no longer.
    """
    if "://" in target:
        from storage.conversion.object_target import open_object_partial

        with open_object_partial(target) as remote:
            yield remote
    else:
        with _open_local(Path(target)) as local:
            yield local


def sweep_leftovers(target: str) -> None:
    """Remove what a converter left beside a pyramid that it had just made whole when it was killed."""
    if "://" in target:
        from storage.conversion.object_target import sweep_object_leftovers

        sweep_object_leftovers(target)
    else:
        with contextlib.suppress(ConversionError):  # what is not ours stays
            _remove_replaced(Path(target))
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
    """Name of a file below a folder that is not one of ours; a link never is."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if path.is_symlink() or (name in names and not (own.fullmatch(key) and path.is_file())):
                return key
    return None


def _replaced(target: Path) -> Path:
    """Where the pyramid that is being replaced goes for the moment between two renames."""
    return target.with_name(f"{target.name}.replaced")


def _remove_replaced(target: Path) -> None:
    """Remove a pyramid that was replaced; what else has its name is its user's.

    Raises
    ------
    ConversionError
        It is no pyramid of ours, or cannot be removed.
    """
    old = _replaced(target)
    if os.path.lexists(old):
        check_replaceable(str(old))
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise ConversionError(f"{old}: cannot be removed ({error.strerror}: {error.filename})") from error


@dataclass(frozen=True)
class LocalOutput:
    """Files below a folder, which workers on other machines must see under the same name."""

    root: Path

    def write(self, key: str, pieces: Sequence[bytes], *, read_again: bool = True) -> str:
        """Write one file under a temporary name, flush it to disk and rename it.

        One that is not read again leaves the page cache, which a stream of gigabytes would only fill for nothing.
        """
        return LocalStore(self.root).put(key, pieces, read_again=read_again)

    def read(self, key: str, limit: int) -> bytes:
        """Return a file written before, of at most ``limit`` bytes."""
        return LocalStore(self.root).get(key, limit)


class LocalPartial:
    """The folder ``NAME.partial`` while this process holds its lock."""

    def __init__(self, target: Path, root: Path) -> None:
        self.target = target
        self.root = root
        self.output = LocalOutput(root)
        self.scratch = root / SCRATCH

    def resume(self, job: dict[str, Any]) -> list[Receipt]:
        """Receipts whose file still matches; see ``Partial``."""
        if (stranger := _stranger(self.root, _OWN_PARTS)) is not None:
            raise ConversionError(f"{self.root}: holds {stranger}, which no conversion has put there; move it away")
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
            flush_folder(Path(folder))
        old = _replaced(self.target)
        _remove_replaced(self.target)
        if overwrite and self.target.exists():
            os.rename(self.target, old)
        try:
            os.rename(self.root, self.target)
        except OSError:
            if old.exists():
                os.rename(old, self.target)
            raise
        flush_folder(self.target.parent)
        with contextlib.suppress(ConversionError):  # the new one is whole; what came to lie in the old one stays
            _remove_replaced(self.target)

    def discard(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self.root)

    def _read_journal(self, job: dict[str, Any]) -> Iterator[Receipt]:
        """Receipts whose file still matches; a line cut short by a crash is skipped."""
        with contextlib.suppress(FileNotFoundError):
            receipts = by_place(parse_journal(self.output.read(JOURNAL, JOURNAL_BYTES), job))
            yield from (receipt for receipt in receipts.values() if self._matches(receipt))

    def _matches(self, receipt: Receipt) -> bool:
        try:
            data = self.output.read(receipt.key, receipt.length)
        except FileNotFoundError:
            return receipt.empty
        except CorruptImageError:  # longer than it should be
            return False
        return not receipt.empty and len(data) == receipt.length and zlib.crc32(data) == receipt.crc32

    def _sweep(self, trusted: set[str]) -> None:
        """Delete every file but the trusted: damaged shards, temporary files, scratch, and folders left empty."""
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
            if partial.is_symlink():
                raise ConversionError(f"{target}: {partial} is a link, which is not written to; remove it")
            _remove_replaced(target)  # or refuse now what would be in the way in the end
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


def _verify(path: Path, receipt: Receipt, index_bytes: int) -> None:
    try:
        with open(path, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(-min(length, index_bytes), os.SEEK_END)
            tail = file.read()
    except FileNotFoundError:
        length, tail = -1, b""
    check_index(tail if length == receipt.length else b"", receipt, str(path))
