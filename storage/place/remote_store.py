"""A web server or an object store: requests are bounded, repeated, and fail with our own errors."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from storage.errors import ConversionError, CorruptImageError, TransferError
from storage.limits import LIMITS
from storage.place import retry
from storage.place.objects import ObjectRequests, first_line, mark_of, tag_of
from storage.place.ranges import Occupied
from storage.place.urls import begin, check_not_forked, is_web
from storage.place.web import WebRequests
from storage.threads import processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from obstore import ObjectMeta, UpdateVersion

    from storage.place.objects import PutMode
    from storage.place.ranges import Entry, Range, Stat

T = TypeVar("T")

CONCURRENCY = 16
MERGE_GAP = 256 * 1024


class RemoteStore:
    """The files below a URL (http, https, s3, gs, az); see ``storage.place.stores.Store``.

    A request is given up after ``timeout_s`` and repeated with ``patience``, by default those of reading. Even
    writes may be repeated, since they ask for a state. A URL that cannot be opened raises ``TransferError``.
    """

    merge_gap = MERGE_GAP

    def __init__(self, url: str, timeout_s: float | None = None, patience: retry.Patience | None = None) -> None:
        begin(url)
        self.name = url.rstrip("/")
        self.concurrency = CONCURRENCY
        self.threads = min(CONCURRENCY, processors()) if is_web(url) else CONCURRENCY
        self._timeout_s, self._patience = timeout_s or retry.TIMEOUT_S, patience or retry.READING
        kind = WebRequests if is_web(url) else ObjectRequests
        self._requests = kind(self.name, self._timeout_s)

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str, float, retry.Patience]]:
        return type(self), (self.name, self._timeout_s, self._patience)

    def get(self, key: str, limit: int = LIMITS.metadata_bytes) -> bytes:
        """Return the whole object."""
        return self.get_with_meta(key, limit)[0]

    def get_with_meta(self, key: str, limit: int = LIMITS.metadata_bytes) -> tuple[bytes, ObjectMeta]:
        """Return the whole object and its metadata in the store."""
        return self._ask(key, partial(self._requests.get, key, limit))

    def get_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range in turn; raise if a server answers anything else."""
        check_not_forked(self.name)
        for each, first in zip(ranges, self._requests.first_tries(ranges), strict=True):
            yield self._ask(each[0], partial(self._requests.get_range, *each), first=first)

    def stat(self, key: str) -> Stat:
        """Return the size of an object, and its tag or the time of its last change."""
        return self._ask(key, partial(self._requests.stat, key))

    def entries(self) -> dict[str, Entry]:
        """Return every object; raises ``TransferError`` for web servers, which do not list."""
        return self._listed(self._requests.entries)

    def list_folder(self, key: str) -> tuple[list[str], list[str]]:
        """Return the folders and the objects right below a key."""
        return self._listed(partial(self._requests.list_folder, key))

    def put(self, key: str, pieces: Iterable[bytes], *, if_absent: bool = False, read_again: bool = True) -> str:  # noqa: ARG002
        """Store one object whole and return its tag; see ``Store``."""
        return tag_of(self.put_if("create" if if_absent else "overwrite", key, pieces))

    def put_if(self, mode: PutMode, key: str, pieces: Iterable[bytes]) -> UpdateVersion:
        """Store one object, whole or not at all, and return its mark.

        ``mode`` is "create" if there must be none yet, the mark of the object to replace, or "overwrite".

        Raises
        ------
        Occupied
            The condition does not hold, and another object is there.
        """
        data = b"".join(pieces)
        try:
            return self._ask(key, partial(self._requests.put, key, data, mode), writes=True)
        except Occupied:
            with contextlib.suppress(FileNotFoundError, CorruptImageError):
                present, meta = self.get_with_meta(key, max(len(data), LIMITS.metadata_bytes))
                if present == data:  # an earlier try has stored it, and its answer was lost
                    return mark_of(meta)
            raise

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, if they are there."""
        if doomed := list(keys):
            self._ask(doomed[0], partial(self._requests.delete, doomed), writes=True)

    def close(self) -> None:
        """Do nothing, since connections close with the object."""

    def _listed(self, request: Callable[[], T]) -> T:
        try:
            return self._ask("", request)
        except FileNotFoundError as error:
            raise TransferError(f"{self.name}: does not exist; check the URL") from error

    def _ask(
        self, key: str, request: Callable[[], T], *, first: Callable[[], T] | None = None, writes: bool = False
    ) -> T:
        """Make a request, repeat it where that may help, or raise one of our errors, which names the object.

        ``first`` waits for a request that was made before, and is the first try.
        A missing object raises ``FileNotFoundError``, a store that refuses to write ``ConversionError``.
        """
        location = f"{self.name}/{key}".rstrip("/")
        check_not_forked(location)
        try:
            return retry.repeat(request, self._requests.passing, self._patience, first)
        except (FileNotFoundError, CorruptImageError, ConversionError):
            raise
        except Exception as error:  # each kind of store raises its own
            reason = first_line(error)
            if writes and not isinstance(error, self._requests.passing):
                raise ConversionError(f"{location}: the store refuses the request ({reason})") from error
            raise TransferError(f"{location}: the request failed ({reason}); {_fix(reason)}") from error


def _fix(reason: str) -> str:
    if "Range request not supported" in reason:
        return "its server does not answer requests for a part of a file; copy the file, or serve it by one that does"
    return "check the address, the network and the credentials, then run again"
