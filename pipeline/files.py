"""Files that are whole or not there: everything the pipeline writes goes through `write_atomic`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import UsageError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def file_name(slide_id: str) -> str:
    """Name for a slide's files: its id, with what a file name may not hold percent-encoded."""
    return quote(slide_id, safe=" ()+,=@") if slide_id.strip(".") else slide_id.replace(".", "%2E")
