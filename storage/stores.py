"""Where bytes lie: a local folder by descriptors and ``pread``, a URL through obstore, with one small face.

Reading is by key (``"0/c/3/4"``) and byte range. Both stores are thread safe, count nothing and cache nothing but
open descriptors; ``Slide`` decides what to fetch and counts it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from storage.errors import MissingImageError, TransferError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MAX_DESCRIPTORS = 64


class Store(Protocol):
    """Random reads below one root."""

    name: str
    concurrency: int  # requests worth having in flight
    merge_gap: int  # bytes worth reading in vain to save a request

    def get(self, key: str) -> bytes:
        """Return the whole object; raises ``FileNotFoundError``."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start`` (fewer where the object ends); raises ``FileNotFoundError``."""
        ...

    def size(self, key: str) -> int:
        """Return the length of an object in bytes; raises ``FileNotFoundError``."""
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


class LocalStore:
    """A folder; keeps the most recently read files open."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist; check the path"
            raise MissingImageError(f"{root}: {what}")
        self.name = str(root)
        self.concurrency = 1
        self.merge_gap = 0
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        """Return the whole file."""
        with open(f"{self.name}/{key}", "rb") as file:
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, fewer where the file ends."""
        return os.pread(self._descriptor(key).fd, length, start)

    def size(self, key: str) -> int:
        """Length of the file in bytes."""
        return os.fstat(self._descriptor(key).fd).st_size

    def close(self) -> None:
        """Close the files that no thread is reading."""
        with self._lock:
            self._open.clear()

    def _descriptor(self, key: str) -> _Descriptor:
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        opened = _Descriptor(f"{self.name}/{key}")
        with self._lock:
            self._open[key] = opened
            if len(self._open) > MAX_DESCRIPTORS:
                self._open.popitem(last=False)
        return opened


def connect(url: str) -> ObjectStore:
    """Open a URL (http, https, s3, gs, az) with obstore, which repeats failed requests a bounded number of times.

    Credentials, regions and endpoints come from the environment as obstore documents (``AWS_ENDPOINT_URL`` and so on).

    Raises
    ------
    TransferError
        The URL is not of a kind that can be opened.
    """
    from datetime import timedelta

    from obstore.store import from_url

    try:
        return from_url(
            url,
            client_options={"allow_http": True, "timeout": "60s"},
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=60)},
        )
    except Exception as error:
        raise TransferError(f"{url}: not a location that can be opened ({error})") from error


class UrlStore:
    """An object store or web server that answers range requests."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self.concurrency = 16
        self.merge_gap = 256 * 1024
        self._store = connect(self.name)

    def get(self, key: str) -> bytes:
        """Return the whole object."""
        try:
            return bytes(self._store.get(key).bytes())
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._failure(key, error) from error

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``; a server that answers anything else raises."""
        try:
            return bytes(self._store.get_range(key, start=start, length=length))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._failure(key, error) from error

    def size(self, key: str) -> int:
        """Length of the object in bytes."""
        try:
            return int(self._store.head(key)["size"])
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._failure(key, error) from error

    def close(self) -> None:
        """Nothing to give back: connections close with the object."""

    def _failure(self, key: str, error: Exception) -> TransferError:
        return TransferError(f"{self.name}/{key}: the request failed ({str(error).splitlines()[0]})")
