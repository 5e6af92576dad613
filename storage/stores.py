"""Where bytes lie: a local folder by descriptors and ``pread``, a URL through obstore, with one small face.

Reading is by key (``"0/c/3/4"``) and byte range. Both stores are thread safe, count nothing and cache nothing but
open descriptors; the sources behind ``Slide`` decide what to fetch and count it.

Notable: local files are read by one thread. What is in memory is decoded in a few microseconds a chunk, which two
threads of one process only slow down by handing each other the interpreter's lock; what is not is brought in by the
kernel, several ranges at a time, because it is told of them before the first is read.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import threading
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import urlsplit

from storage.credentials import check_credentials
from storage.errors import MissingImageError, StorageError, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import NoReturn

    from obstore.store import ObjectStore

T = TypeVar("T")
Range = tuple[str, int, int]  # key, start, length in bytes

SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "abfss", "adl")  # of URLs
SLOW_READ_S = 100e-6  # longer than a short range takes from the page cache
ANNOUNCED_RANGES = 64  # told to the kernel at once, before the first is read
ANNOUNCED_BYTES = 2**20  # longer ranges keep a disk busy by themselves
TIMEOUT_S = 60.0  # of one request to a URL
RETRIES = 4  # of a request that failed, by obstore
BACKOFF_S = 0.1  # before the first repeat, doubled before each further one


class Store(Protocol):
    """Random reads below one root."""

    name: str
    concurrency: int  # requests worth having in flight
    merge_gap: int  # bytes worth reading in vain to save a request

    def get(self, key: str) -> bytes:
        """Return the whole object; raises ``FileNotFoundError``."""
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


class _Descriptor:
    """A file descriptor closed when its last user lets go of it, which makes eviction safe between threads."""

    __slots__ = ("fd",)

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class _Descriptors:
    """The most recently read files of all local stores, kept open up to a share of what the process may open.

    Files are known by store and key, not by path: what has replaced a file since is another store's to open.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, str], _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self.limit = max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def get(self, store: int, root: str, key: str) -> _Descriptor:
        """Open the file ``key`` below ``root``, or return it open."""
        name = (store, key)
        with self._lock:
            found = self._open.get(name)
            if found is not None:
                self._open.move_to_end(name)
                return found
        opened = _Descriptor(f"{root}/{key}")
        with self._lock:
            self._open[name] = opened
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return opened

    def close(self, store: int) -> None:
        """Close the files of a store that no thread is reading."""
        with self._lock:
            for name in [name for name in self._open if name[0] == store]:
                del self._open[name]

    def forked(self) -> None:
        """In a forked child: go on with the open files, but not with a lock that nobody there will release."""
        self._lock = threading.Lock()


_descriptors = _Descriptors()
os.register_at_fork(after_in_child=_descriptors.forked)
_numbers = itertools.count()


class LocalStore:
    """A folder."""

    def __init__(self, root: Path) -> None:
        if not os.path.isdir(root):
            what = "is a file, not a folder" if os.path.exists(root) else "does not exist; check the path"
            raise MissingImageError(f"{root}: {what}")
        self.name = str(root)
        self.concurrency = 1
        self.merge_gap = 0
        self._number = next(_numbers)
        self._slow = True  # whether a short range since the last announcement was

    def get(self, key: str) -> bytes:
        """Return the whole file."""
        try:
            with open(f"{self.name}/{key}", "rb") as file:
                return file.read()
        except OSError as error:
            self._fail(key, error)

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range, fewer where its file ends."""
        for first in range(0, len(ranges), ANNOUNCED_RANGES):
            window = ranges[first : first + ANNOUNCED_RANGES]
            if self._slow:
                self._announce(window)
            self._slow = False
            for key, start, length in window:
                started = time.perf_counter()
                try:
                    descriptor = _descriptors.get(self._number, self.name, key)  # held, or a thread could end it
                    data = os.pread(descriptor.fd, length, start)
                except OSError as error:
                    self._fail(key, error)
                if time.perf_counter() - started > SLOW_READ_S and length <= ANNOUNCED_BYTES:
                    self._slow = True
                yield data

    def _announce(self, ranges: Sequence[Range]) -> None:
        """Have the kernel fetch what it does not hold yet, all ranges at once; a hint, which never fails.

        Worth it where the last reads were slow: were they all fast, the files lie in the page cache.
        """
        short = [range_ for range_ in ranges if range_[2] <= ANNOUNCED_BYTES]
        if len(short) < 2 or not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):
            for key, start, length in short:
                descriptor = _descriptors.get(self._number, self.name, key)
                os.posix_fadvise(descriptor.fd, start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files that no thread is reading."""
        _descriptors.close(self._number)

    def _fail(self, key: str, error: OSError) -> NoReturn:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise FileNotFoundError(key) from error
        raise StorageError(
            f"{self.name}/{key}: cannot be read ({error.strerror}); check its disk and permissions"
        ) from error


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
                "retry_timeout": timedelta(seconds=60),
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


class UrlStore:
    """An object store or web server that answers range requests."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self.concurrency = 16
        self.merge_gap = 256 * 1024
        self._store = connect(self.name)

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        return self._attempt(key, lambda: bytes(self._store.get(key).bytes()))

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range, one after the other; a server that answers anything else raises."""
        for key, start, length in ranges:
            yield self._attempt(key, partial(self._get_range, key, start, length))

    def _get_range(self, key: str, start: int, length: int) -> bytes:
        return bytes(self._store.get_range(key, start=start, length=length))

    def close(self) -> None:
        """Nothing to give back: connections close with the object."""

    def _attempt(self, key: str, request: Callable[[], T]) -> T:
        return attempt(f"{self.name}/{key}", request)


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
    if urlsplit(root).scheme in ("http", "https"):
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


def attempt(location: str, request: Callable[[], T]) -> T:
    """Ask for something, again where the body of an answer was cut, which obstore does not repeat.

    Raises
    ------
    FileNotFoundError
        It is not there.
    TransferError
        The request failed too often.
    """
    check_not_forked(location)
    for repeat in range(RETRIES + 1):
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has its own
            if repeat == RETRIES or not was_cut(error):
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
