"""Where bytes lie: a local folder, a web server or an object store, behind one protocol.

Files are read and written by key (``"0/c/3/4"``), and read by byte range too. No more is read than was asked,
whatever the other side claims to hold. Stores are thread safe and picklable and cache only open descriptors; the
sources behind ``Slide`` decide what to fetch and count it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

from storage.errors import MissingImageError
from storage.limits import LIMITS
from storage.place.local_store import LocalStore
from storage.place.remote_store import RemoteStore
from storage.place.urls import check_url, is_remote, is_web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from storage.place.ranges import Entry, Range, Stat


class Store(Protocol):
    """Files below one root."""

    name: str  # path or URL of the root, as messages name it
    concurrency: int  # how many requests to have in flight, by as many threads
    threads: int  # over how many threads to spread `get_ranges`, which may itself have several in flight
    merge_gap: int  # reading up to this many unneeded bytes is cheaper than another request

    def get(self, key: str, limit: int = LIMITS.metadata_bytes) -> bytes:
        """Return the whole file; raises ``FileNotFoundError``, and ``CorruptImageError`` if it holds more bytes."""
        ...

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range (fewer where its file ends); raises ``FileNotFoundError``."""
        ...

    def stat(self, key: str) -> Stat:
        """Return the size of a file and values that tell its version; raises ``FileNotFoundError``."""
        ...

    def entries(self) -> dict[str, Entry]:
        """Return all files by key."""
        ...

    def put(self, key: str, pieces: Iterable[bytes], *, if_absent: bool = False, read_again: bool = True) -> str:
        """Store one file durably, whole or not at all, and return its tag (see ``Entry``).

        With ``if_absent``, raises ``Occupied`` where there is a file of other bytes. ``read_again`` tells whether the
        file will be read soon.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files, if they are there."""
        ...

    def close(self) -> None:
        """Close descriptors and connections."""
        ...


def open_store(location: str | os.PathLike[str]) -> Store:
    """Open a folder or a URL (http, https, s3, gs, az).

    Raises
    ------
    MissingImageError
        The local folder does not exist. (A URL is first asked when something is read.)
    TransferError
        The URL cannot be opened.
    """
    text = os.fspath(location)
    if is_remote(text):
        return RemoteStore(text)
    if not os.path.isdir(text):
        what = "is a file, not a folder" if os.path.exists(text) else "does not exist; check the path"
        raise MissingImageError(f"{text}: {what}")
    return LocalStore(text)


def open_above(location: str) -> tuple[Store, str]:
    """Open the folder of a single file, and return it with the file's key; a local file may be a link to anywhere."""
    if is_remote(location):
        check_url(location)
        parent, _, name = location.rpartition("/")
        return RemoteStore(parent), unquote(name) if is_web(location) else name
    folder, name = os.path.split(location)
    return LocalStore(folder or ".", follow_links=True), name


def list_below(url: str, wanted: Callable[[str], bool]) -> list[str]:
    """Sorted URLs, at any depth below a URL, whose names are wanted.

    Wanted folders, pyramids and hidden folders are not searched. Nothing is found on web servers (http, https), since
    they cannot be listed.

    Raises
    ------
    TransferError
        The store does not answer, or the bucket does not exist.
    """
    if is_web(url):
        return []
    store = RemoteStore(url)
    found: list[str] = []
    folders = [""]
    while folders:
        inner, files = store.list_folder(folders.pop())
        names = {key: key.rpartition("/")[2] for key in (*inner, *files)}
        chosen = {key for key, name in names.items() if not name.startswith(".") and wanted(name)}
        found += chosen
        folders += [k for k in inner if k not in chosen and names[k][:1] != "." and ".zarr" not in names[k]]
    return sorted(f"{store.name}/{key}" for key in found)
