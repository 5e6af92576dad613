"""A pyramid being written to a local folder, which is renamed when it is whole.

Everything goes to ``NAME.partial``. A journalled shard is trusted if its file has the same length and checksum.
The system locks ``NAME.partial.lock`` for a process, so the lock of a killed converter is free.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Self

from storage.conversion.partial import JOURNAL, JOURNAL_BYTES, OWN_KEYS, Partial, resumable
from storage.conversion.receipts import journal_lines
from storage.errors import ConversionError
from storage.place.atomic import flush_folder
from storage.place.local_store import LocalStore
from storage.place.locks import locked

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from storage.conversion.receipts import Receipt

SCRATCH = "scratch"
# Further files of a pyramid that is being written.
_OWN_PARTS = re.compile(rf"({OWN_KEYS.pattern}|{re.escape(JOURNAL)})(\.[\d-]+\.tmp)?|{SCRATCH}/band-\d+")


class FolderPartial(Partial):
    """The folder ``NAME.partial`` while this process holds its lock."""

    batch = 1

    def __init__(self, target: Path, root: Path) -> None:
        super().__init__(LocalStore(root), root / SCRATCH)
        self._target, self._root = target, root

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: str) -> Iterator[Self]:
        """Create or take over the partial folder; see ``Partial``."""
        path = Path(target)
        root = path.with_name(path.name + ".partial")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_locked(path))
                if root.is_symlink():
                    raise ConversionError(f"{target}: {root} is a link, which is not written to; remove it")
                _remove_replaced(path)  # or refuse now what would be in the way later
                root.mkdir(exist_ok=True)
                if not os.access(root, os.W_OK | os.X_OK):
                    raise PermissionError(13, "Permission denied", str(root))
            except OSError as error:
                raise ConversionError(f"{target}: cannot be written ({error.strerror}: {error.filename})") from error
            partial = cls(path, root)
            with resumable(target), contextlib.closing(partial.output):
                yield partial

    @staticmethod
    def sweep(target: str) -> None:
        """Remove an old pyramid and a lock."""
        with contextlib.suppress(ConversionError):  # files that are not ours stay
            _remove_replaced(Path(target))
        with contextlib.suppress(ConversionError, OSError), _locked(Path(target)):
            pass  # leaving the block removes the lock

    @staticmethod
    def is_occupied(target: str) -> bool:
        """Whether anything exists at the target."""
        return os.path.lexists(target)

    @staticmethod
    def check_replaceable(target: str) -> None:
        """Raise ``ConversionError`` unless the target is a folder with nothing but one of our pyramids."""
        path = Path(target)
        if path.is_symlink() or not path.is_dir():
            raise ConversionError(f"{target}: a file or a link, which is not overwritten; remove it")
        if (stranger := _stranger(path, OWN_KEYS)) is not None:
            raise ConversionError(
                f"{target}: holds {stranger}, which is no part of a pyramid; remove the folder yourself"
            )

    def discard(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self._root)

    def _publish(self, *, overwrite: bool) -> None:
        """Rename the finished folder; if ``overwrite``, an older pyramid is moved away first."""
        self.output.delete([JOURNAL])
        shutil.rmtree(self.scratch, ignore_errors=True)
        for folder, _, _ in os.walk(self._root, topdown=False):
            if os.listdir(folder):
                flush_folder(Path(folder))
            else:
                os.rmdir(folder)  # left by another job that was begun here
        old = _replaced(self._target)
        _remove_replaced(self._target)
        if overwrite and self._target.exists():
            os.rename(self._target, old)
        try:
            os.rename(self._root, self._target)
        except OSError:
            if old.exists():
                os.rename(old, self._target)
            raise
        flush_folder(self._target.parent)
        with contextlib.suppress(ConversionError):  # the new one is whole, and files put into the old one stay
            _remove_replaced(self._target)

    def _refuse_strangers(self, present: Collection[str], *, known: bool) -> None:  # noqa: ARG002
        if (stranger := _stranger(self._root, _OWN_PARTS)) is not None:
            raise ConversionError(f"{self._root}: holds {stranger}, which no conversion has put there; move it away")

    def _is_intact(self, receipt: Receipt) -> bool:
        return receipt.empty or zlib.crc32(self.output.get(receipt.key, receipt.length)) == receipt.crc32

    def _earlier_journals(self) -> list[bytes]:
        with contextlib.suppress(FileNotFoundError):
            return [self.output.get(JOURNAL, JOURNAL_BYTES)]
        return []

    def _begin_journal(self, receipts: list[Receipt]) -> None:
        self.output.put(JOURNAL, [journal_lines({"job": self._job}, receipts)])

    def _append_journal(self, receipts: list[Receipt]) -> None:
        with open(self._root / JOURNAL, "ab") as file:
            file.write(journal_lines(None, receipts))  # a line that a crash cuts short is skipped later


def _stranger(root: Path, own: re.Pattern[str]) -> str | None:
    """Name of a file below a folder that is not ours, as no link is; None if there is none."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if path.is_symlink() or (name in names and not (own.fullmatch(key) and path.is_file())):
                return key
    return None


def _replaced(target: Path) -> Path:
    """Path of the replaced pyramid for the moment between two renames."""
    return target.with_name(f"{target.name}.replaced")


def _remove_replaced(target: Path) -> None:
    """Remove a pyramid that was replaced; anything else of that name belongs to the user.

    Raises
    ------
    ConversionError
        It is not one of our pyramids, or cannot be removed.
    """
    old = _replaced(target)
    if os.path.lexists(old):
        FolderPartial.check_replaceable(str(old))
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise ConversionError(f"{old}: cannot be removed ({error.strerror}: {error.filename})") from error


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold ``NAME.partial.lock``."""
    path = target.with_name(target.name + ".partial.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except BlockingIOError:
            raise ConversionError(f"{target}: another conversion to it is running ({path} is locked)") from None
        yield
