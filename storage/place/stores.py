"""Where bytes lie: a local folder, a web server or an object store, with one small face.

Reading is by key (``"0/c/3/4"``) and byte range, and nothing is read further than was asked, whatever the other side
claims to hold. Stores are thread safe, count nothing and cache nothing but open descriptors; the sources behind
``Slide`` decide what to fetch and count it.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urlsplit

from storage.errors import CorruptImageError, TransferError
from storage.limits import LIMITS
from storage.place.credentials import check_credentials
from storage.place.local_store import LocalStore
from storage.place.web import Retryable, WebRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

    from storage.place.ranges import Range, Stat

T = TypeVar("T")

SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "abfss", "adl")  # of URLs
WEB_SCHEMES = ("http", "https")
TIMEOUT_S = 60.0  # of one request to a URL, from its first byte to the last of its answer
PATIENCE_S = 60.0  # after which a request that failed is not repeated
RETRIES = 4  # of a request that failed
BACKOFF_S = 0.1  # before the first repeat, doubled before each further one
PIECE_BYTES = 2**20  # of an object's body, read at once


class Store(Protocol):
    """Random reads below one root."""

    name: str
    concurrency: int  # requests worth having in flight
    merge_gap: int  # bytes worth reading in vain to save a request

    def get(self, key: str, limit: int = LIMITS.metadata_bytes) -> bytes:
        """Return the whole object; raises ``FileNotFoundError``, and ``CorruptImageError`` if it holds more bytes."""
        ...

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range (fewer where its object ends); raises ``FileNotFoundError``."""
        ...

    def close(self) -> None:
        """Give descriptors and connections back."""
        ...


def open_store(location: str | os.PathLike[str]) -> Store:
    """Open a folder or a URL (http, https, s3, gs, az) for reading.

    Raises
    ------
    MissingImageError
        A local folder that does not exist. (A URL is first asked when something is read.)
    """
    text = os.fspath(location)
    return UrlStore(text) if "://" in text else LocalStore(Path(text))


def connect(url: str, timeout_s: float | None = None) -> ObjectStore:
    """Open a URL (http, https, s3, gs, az) with obstore, which repeats failed requests a bounded number of times.

    Credentials, regions and endpoints come from the environment, as obstore documents (``AWS_ENDPOINT_URL``, ...).
    A request is given up after ``timeout_s``, by default ``TIMEOUT_S``.

    Raises
    ------
    TransferError
        The URL is not of a kind that can be opened, S3 has no credentials, or this process was forked from one that
        had opened a URL.
    """
    global _connected_in  # noqa: PLW0603
    from datetime import timedelta

    from obstore.store import from_url

    check_url(url)
    check_not_forked(url)
    _connected_in = os.getpid()
    try:
        store = from_url(
            url,
            client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s or TIMEOUT_S)},
            retry_config={
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=PATIENCE_S),
                "backoff": {"init_backoff": timedelta(seconds=BACKOFF_S)},
            },
        )
    except Exception as error:
        raise TransferError(f"{url}: not a location that can be opened ({first_line(error)})") from error
    check_credentials(url, store)
    return store


def check_url(url: str) -> None:
    """See that a URL is one of ``SCHEMES``, names a host or bucket and has no query, which obstore would drop.

    Raises
    ------
    TransferError
        It is not.
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


_connected_in: int | None = None  # process that first opened a URL


def check_not_forked(location: str) -> None:
    """See that URLs can be read in this process; obstore's threads are lost in a fork, and it would wait for ever.

    Raises
    ------
    TransferError
        This process was forked from one that had opened a URL.
    """
    if _connected_in not in (None, os.getpid()):
        raise TransferError(f"{location}: URLs cannot be read in a forked process; start it by spawn or forkserver")


class Requests(Protocol):
    """Requests below one URL, each of which ends within its time and takes no more memory than was asked for."""

    def get(self, key: str, limit: int) -> bytes:
        """Return a whole object of at most ``limit`` bytes."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, or the last where that is negative; fewer where the object ends."""
        ...

    def stat(self, key: str) -> Stat:
        """Return the size of an object, and what tells its version."""
        ...


def connect_requests(url: str) -> Requests:
    """Open a URL (http, https, s3, gs, az) for reading.

    Raises
    ------
    TransferError
        As ``connect``.
    """
    global _connected_in  # noqa: PLW0603
    check_url(url)
    check_not_forked(url)
    _connected_in = os.getpid()
    if urlsplit(url).scheme in WEB_SCHEMES:
        return WebRequests(url, TIMEOUT_S)
    return ObjectRequests(url, connect(url))


class ObjectRequests:
    """Requests to an object store, through obstore; see ``Requests``."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url = url
        self._store = store

    def get(self, key: str, limit: int) -> bytes:
        """Return a whole object of at most ``limit`` bytes."""
        return self.get_with_meta(key, limit)[0]

    def get_with_meta(self, key: str, limit: int) -> tuple[bytes, ObjectMeta]:
        """Return a whole object of at most ``limit`` bytes, and what the store knows of it."""
        return self._read(key, limit, None)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, or the last where that is negative; fewer where the object ends."""
        wanted: GetOptions = {"range": (start, start + length) if start >= 0 else {"suffix": length}}
        return self._read(key, length, wanted)[0]

    def stat(self, key: str) -> Stat:
        """Return the size of an object, and its tag or the time of its last change."""
        meta = self._store.head(key)
        tag = meta["e_tag"]
        return int(meta["size"]), {"e_tag": tag} if tag else {"last_modified": meta["last_modified"].isoformat()}

    def _read(self, key: str, limit: int, options: GetOptions | None) -> tuple[bytes, ObjectMeta]:
        """Read an answer piece by piece; ``GetResult.bytes`` would first set aside what the server says it holds."""
        answer = self._store.get(key, options=options)
        start, stop = answer.range
        body = bytearray()
        if stop - start <= limit:
            for piece in answer.stream(min_chunk_size=min(limit + 1, PIECE_BYTES)):
                body += piece
                if len(body) > limit:
                    break
        if max(stop - start, len(body)) > limit:
            held = max(stop - start, len(body))
            raise CorruptImageError(f"{self.url}/{key}: holds {held} bytes, more than the {limit} it may")
        return bytes(body), answer.meta


class UrlStore:
    """An object store or web server that answers range requests."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self.concurrency = 16
        self.merge_gap = 256 * 1024
        self._requests = connect_requests(self.name)

    def get(self, key: str, limit: int = LIMITS.metadata_bytes) -> bytes:
        """Return the whole object."""
        return attempt(f"{self.name}/{key}", partial(self._requests.get, key, limit))

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range, one after the other; a server that answers anything else raises."""
        for key, start, length in ranges:
            yield attempt(f"{self.name}/{key}", partial(self._requests.get_range, key, start, length))

    def close(self) -> None:
        """Nothing to give back: connections close with the object."""


def list_below(url: str, wanted: Callable[[str], bool]) -> list[str]:
    """URLs of what lies below one, at any depth, and is wanted by its name; sorted.

    What is wanted, pyramids and hidden folders are not looked into. A web server (http, https) does not tell what it
    has: nothing is found there.

    Raises
    ------
    TransferError
        The store does not answer, or there is no such bucket.
    """
    root = url.rstrip("/")
    if urlsplit(root).scheme in WEB_SCHEMES:
        return []
    store = connect(root)
    found: list[str] = []
    folders = [""]
    while folders:
        try:
            answer = attempt(root, partial(store.list_with_delimiter, folders.pop() or None))
        except FileNotFoundError as error:
            raise TransferError(f"{root}: does not exist; check the URL") from error
        inner = {key: key.rpartition("/")[2] for key in answer["common_prefixes"]}
        names = inner | {meta["path"]: meta["path"].rpartition("/")[2] for meta in answer["objects"]}
        chosen = {key for key, name in names.items() if not name.startswith(".") and wanted(name)}
        found += chosen
        folders += [k for k, name in inner.items() if k not in chosen and name[:1] != "." and ".zarr" not in name]
    return sorted(f"{root}/{key}" for key in found)


def list_files(root: str) -> Iterator[str]:
    """Keys of all files below a folder or URL; raises ``TransferError`` for web servers, which do not list."""
    if "://" not in root:
        for folder, _, names in os.walk(root):
            yield from (Path(folder, name).relative_to(root).as_posix() for name in names)
        return
    if urlsplit(root).scheme in WEB_SCHEMES:
        raise TransferError("web servers do not tell")
    try:
        for batch in connect(root).list():
            yield from (entry["path"] for entry in batch)
    except Exception as error:  # obstore has one for each reason
        raise TransferError(first_line(error)) from error


def attempt(location: str, request: Callable[[], T]) -> T:
    """Ask for something, a bounded number of times where asking again may help.

    obstore repeats by itself what failed, but not where the body of an answer was cut.

    Raises
    ------
    FileNotFoundError
        It is not there.
    CorruptImageError
        There is more of it than there may be.
    TransferError
        The request failed too often.
    """
    check_not_forked(location)
    started = time.monotonic()
    for repeat in range(RETRIES + 1):
        try:
            return request()
        except (FileNotFoundError, CorruptImageError):
            raise
        except Exception as error:  # each kind of store has its own
            worth_it = isinstance(error, Retryable) or was_cut(error)
            if repeat == RETRIES or not worth_it or time.monotonic() - started > PATIENCE_S:
                raise TransferError(f"{location}: the request failed ({first_line(error)}); {_fix(error)}") from error
            time.sleep(BACKOFF_S * 2**repeat)
    raise AssertionError("the last attempt returns or raises")


def _fix(error: Exception) -> str:
    if "Range request not supported" in str(error):
        return "its server does not answer requests for a part of a file; copy the file, or serve it by one that does"
    return "check the address, the network and the credentials, then run again"


def was_cut(error: Exception) -> bool:
    """Whether the connection ended within the body of an answer, the one failure after which obstore gives up."""
    return "body" in first_line(error)


def first_line(error: Exception) -> str:
    """The part of an error that is worth showing: those of object stores go on for pages."""
    return (str(error).splitlines() or [type(error).__name__])[0]
