"""Telling URLs from paths, and checking that one can be opened in this process."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from storage.errors import TransferError

SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "abfss", "adl")  # schemes of URLs that can be opened
WEB_SCHEMES = ("http", "https")


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL rather than a local path."""
    return "://" in os.fspath(place)


def is_web(url: str) -> bool:
    """Whether a URL is that of a web server (http, https), which can only be read."""
    return urlsplit(url).scheme in WEB_SCHEMES


def check_url(url: str) -> None:
    """Check that a URL has one of ``SCHEMES``, a host or bucket, and no query, which obstore would drop.

    Raises ``TransferError`` where it does not.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise TransferError(f"{url}: not a URL ({error})") from error
    if parts.scheme not in SCHEMES:
        accepted = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise TransferError(f"{url}: not a location that can be opened; URLs start with one of {accepted}")
    if not parts.netloc:
        raise TransferError(f"{url}: not a location that can be opened; it names no host or bucket")
    if "?" in url:
        shown = url.partition("?")[0]  # a query may hold a signature, which belongs in no log
        raise TransferError(
            f"{shown}: URLs with a query are not supported; copy the file or give credentials in the environment"
        )


_opened_in: int | None = None  # the process that first opened a URL


def begin(url: str) -> None:
    """Check a URL that is about to be opened, and note that this process opens URLs; raises ``TransferError``."""
    global _opened_in  # noqa: PLW0603
    check_url(url)
    check_not_forked(url)
    _opened_in = os.getpid()


def check_not_forked(location: str) -> None:
    """Raise ``TransferError`` if URLs cannot be read in this process.

    A process that was forked from one that had opened a URL lacks the threads that read, and would wait for ever.
    """
    if _opened_in not in (None, os.getpid()):
        raise TransferError(f"{location}: URLs cannot be read in a forked process; start it by spawn or forkserver")
