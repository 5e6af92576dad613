"""Requests that write to an object store: repeated a bounded number of times, and under conditions.

obstore repeats most requests that fail, but not a conditional put or a delete that timed out, nor a listing that
broke off. All requests here can be repeated safely, so they are, a few times, with pauses.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Literal, TypeVar

from storage.errors import ConversionError, CorruptImageError, TransferError
from storage.limits import LIMITS
from storage.place.stores import ObjectRequests, connect, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from obstore import ObjectMeta, PutResult, UpdateVersion

    PutMode = Literal["create", "overwrite"] | UpdateVersion

T = TypeVar("T")
PAUSES_S = (0.5, 2.0, 8.0)  # before each repeat of a request, besides obstore's own
PATIENCE_S = 600.0  # after which no request is repeated


class Occupied(Exception):  # noqa: N818  not an error: the answer to a condition
    """A put was not done: its place was to be free and is not, or what was to be there is no more."""


class Objects:
    """Objects below one URL, each request to which ends within ``timeout_s``; picklable, thread safe.

    Its methods raise ``TransferError`` when the store does not answer, ``ConversionError`` when it refuses.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._store = connect(self.url, timeout_s)
        self._reads = ObjectRequests(self.url, self._store)

    def __reduce__(self) -> tuple[type[Objects], tuple[str, float]]:
        return type(self), (self.url, self._timeout_s)

    def put(self, key: str, data: bytes, mode: PutMode) -> UpdateVersion:
        """Store one object, whole or not at all, if the condition holds.

        Parameters
        ----------
        key
            Where.
        data
            What.
        mode
            "create" if there must be none yet, the mark of the one that is to be replaced, or "overwrite" for any.

        Returns
        -------
        UpdateVersion
            The mark of the new object.

        Raises
        ------
        Occupied
            The condition does not hold, and the object that is there is another.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:  # several parts would need several requests, and leave some behind when one fails
            return mark_of(self._request(key, lambda: self._store.put(key, data, mode=mode, use_multipart=False)))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if isinstance(mode, str) and isinstance(error, FileNotFoundError):
                raise self._refusal(key, error) from error  # there is no such bucket
        with contextlib.suppress(FileNotFoundError, CorruptImageError):
            present, meta = self.get(key, max(len(data), LIMITS.metadata_bytes))
            if present == data:  # stored by an earlier try, whose answer was lost
                return mark_of(meta)
        raise Occupied

    def get(self, key: str, limit: int = LIMITS.metadata_bytes) -> tuple[bytes, ObjectMeta]:
        """Return an object of at most ``limit`` bytes and what the store knows of it.

        Raises ``FileNotFoundError``, and ``CorruptImageError`` if it holds more.
        """
        return self._request(key, lambda: self._reads.get_with_meta(key, limit))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return a part of an object; raises ``FileNotFoundError``."""
        return self._request(key, lambda: self._reads.get_range(key, start, length))

    def list(self) -> dict[str, ObjectMeta]:
        """Return what the store knows of every object, by key."""
        return self._request("", lambda: {meta["path"]: meta for batch in self._store.list() for meta in batch})

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, if they are there."""
        if doomed := list(keys):
            self._request(doomed[0], lambda: self._store.delete(doomed))

    def _request(self, key: str, action: Callable[[], T]) -> T:
        from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

        started = time.monotonic()
        for pause in (*PAUSES_S, None):
            try:
                return action()
            except (AlreadyExistsError, PreconditionError, FileNotFoundError, CorruptImageError):
                raise
            except GenericError as error:
                if pause is None or time.monotonic() - started > PATIENCE_S:
                    raise TransferError(f"{self.url}/{key}: the request failed ({_cause(error)})") from error
                time.sleep(pause)
            except Exception as error:
                raise self._refusal(key, error) from error
        raise AssertionError

    def _refusal(self, key: str, error: Exception) -> ConversionError:
        return ConversionError(f"{self.url}/{key}: the store refuses the request ({_cause(error)})")


def mark_of(answer: PutResult | ObjectMeta) -> UpdateVersion:
    """Tell one state of an object from all others, in the form that a conditional put takes."""
    mark: UpdateVersion = {}
    if answer["e_tag"] is not None:
        mark["e_tag"] = answer["e_tag"]
    if answer["version"] is not None:
        mark["version"] = answer["version"]
    return mark


def tag_of(answer: UpdateVersion | ObjectMeta) -> str:
    """Return the e_tag without its quotes, which Azure gives in some answers and not in others."""
    return (answer.get("e_tag") or "").strip('"')


def _cause(error: Exception) -> str:
    return first_line(error).strip(" :")
