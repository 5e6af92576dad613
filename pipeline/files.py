"""Files that are whole or not there: everything the pipeline writes goes through `write_atomic`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from nested_ats.files import open_regular
from pipeline.errors import UsageError
from storage.place.atomic import replacing, write_file
from storage.place.locks import locked

_LONGEST_NAME = 200  # characters: file systems allow 255 bytes, of which suffixes and temporary names need some


def write_atomic(path: Path, *parts: bytes | memoryview | str) -> None:
    """Write a file, made of parts, under a temporary name, flush it to the disk, and rename it into place.

    Raises
    ------
    UsageError
        It cannot be written; what was there before still is.
    """
    try:
        write_file(path, [part.encode() if isinstance(part, str) else part for part in parts])
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or " ".join(str(error).split())
    return UsageError(f"{path}: cannot be written: {reason}; mend that, or choose another place")


@contextmanager
def replace_by(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of another one, flushed to the disk, when the block ends well.

    Raises
    ------
    UsageError
        It cannot be written; what was there before still is.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritten(path, error) from error


def cache_folder() -> Path:
    """Return the product's folder in the user's cache (XDG base directory specification).

    Raises
    ------
    RuntimeError
        There is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nested-ats"


def open_inside(folder: Path, name: str) -> BufferedReader:
    """Open a file of a folder that the pipeline made, which may since have been anybody's.

    Raises
    ------
    FileNotFoundError
        There is none.
    UsageError
        It cannot be read, is a pipe or a device, or lies outside the folder.
    """
    try:
        return open_regular(folder / name, within=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{folder / name}: cannot be read: {error}") from error


def read_inside(folder: Path, name: str) -> bytes:
    """Content of a file of a folder; errors are those of `open_inside`."""
    with open_inside(folder, name) as file:
        return file.read()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def make_folder(path: Path) -> Path:
    """Make a folder that can be written to.

    Raises
    ------
    UsageError
        It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be made: {error.strerror}; choose another --out") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: no permission to write; choose another --out")
    return path


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """See that no other process works in a folder while this one does.

    Parameters
    ----------
    lock
        A file in the folder, there while the block runs.
    otherwise
        What to say where another process holds it.

    Raises
    ------
    UsageError
        It does.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except BlockingIOError:
            raise UsageError(f"{lock.parent}: {otherwise}; wait for it, or give another --out") from None
        except OSError:  # a network file system without locks: then only chance protects
            pass
        yield


def file_name(slide_id: str) -> str:
    """Name for a slide's files: its id, with what a file name may not hold percent-encoded.

    Different ids have different names, without a suffix or with the same one; none is hidden. A long id is cut and
    ends with a hash of the whole; ``%-`` and a lone ``%`` mark what no percent-encoding gives.
    """
    name = quote(slide_id, safe=" ()+,=@") or "%"
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 34]}%-{hashlib.sha256(slide_id.encode()).hexdigest()[:32]}"
