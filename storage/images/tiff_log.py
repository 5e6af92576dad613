"""What tifffile logs names no file: of ours it goes, with its name, to the log ``storage.images.tiff`` at debug."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import tifffile

if TYPE_CHECKING:
    from collections.abc import Iterator

_reading: ContextVar[str] = ContextVar("reading", default="")
_logger = logging.getLogger("storage.images.tiff")


def _ours(record: logging.LogRecord) -> bool:
    """Let pass what tifffile logs about files that others read, and send what it logs about ours to our own log."""
    if location := _reading.get():
        _logger.debug("%s: %s", location, record.getMessage())
    return not location


tifffile.logger().addFilter(_ours)


@contextmanager
def named(location: str) -> Iterator[None]:
    """Have tifffile's log lines name this file."""
    token = _reading.set(location)
    try:
        yield
    finally:
        _reading.reset(token)
