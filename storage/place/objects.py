"""Single requests to object stores (s3, gs, az) through obstore, each of which ends within its time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from storage.errors import CorruptImageError, TransferError
from storage.place import retry
from storage.place.credentials import check_credentials
from storage.place.ranges import Entry, Occupied
from storage.place.urls import begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obstore import GetOptions, ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ObjectStore

    from storage.place.ranges import Range, Stat

    PutMode = Literal["create", "overwrite"] | UpdateVersion

PIECE_BYTES = 2**20  # bytes of a body that are read at once


def connect(url: str, timeout_s: float | None = None) -> ObjectStore:
    """Open a URL (http, https, s3, gs, az) with obstore, whose retries are off (see ``storage.place.retry``).

    Credentials, regions and endpoints come from the environment, as obstore documents (``AWS_ENDPOINT_URL``, ...).
    A request is given up after ``timeout_s``, by default ``retry.TIMEOUT_S``.

    Raises
    ------
    TransferError
        The URL's scheme is not supported, S3 has no credentials, or this process was forked from one that had opened
        a URL.
    """
    from datetime import timedelta

    from obstore.store import from_url

    begin(url)
    try:
        store = from_url(
            url,
            client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s or retry.TIMEOUT_S)},
            retry_config={"max_retries": 0},
        )
    except Exception as error:
        raise TransferError(f"{url}: not a location that can be opened ({first_line(error)})") from error
    check_credentials(url, store)
    return store


class ObjectRequests:
    """Requests below one URL; see ``storage.place.remote_store.RemoteStore``."""

    def __init__(self, url: str, timeout_s: float) -> None:
        from obstore.exceptions import GenericError

        self.url = url
        self.passing: tuple[type[Exception], ...] = (GenericError, retry.Retryable)
        self._store = connect(url, timeout_s)

    def get(self, key: str, limit: int) -> tuple[bytes, ObjectMeta]:
        """Return a whole object of at most ``limit`` bytes, and its metadata in the store."""
        return self._read(key, limit, None)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, or the last where that is negative; fewer where the object ends."""
        wanted: GetOptions = {"range": (start, start + length) if start >= 0 else {"suffix": length}}
        return self._read(key, length, wanted)[0]

    def first_tries(self, ranges: Sequence[Range]) -> Iterator[Callable[[], bytes]]:
        """Yield what asks for each of some ranges, once it is called."""
        return (partial(self.get_range, *each) for each in ranges)

    def stat(self, key: str) -> Stat:
        """Return the size of an object, and its tag or the time of its last change."""
        meta = self._store.head(key)
        tag = meta["e_tag"]
        return int(meta["size"]), {"e_tag": tag} if tag else {"last_modified": meta["last_modified"].isoformat()}

    def entries(self) -> dict[str, Entry]:
        """Return every object."""
        return {meta["path"]: Entry(meta["size"], tag_of(meta)) for batch in self._store.list() for meta in batch}

    def list_folder(self, key: str) -> tuple[list[str], list[str]]:
        """Return the folders and the objects right below a key."""
        answer = self._store.list_with_delimiter(key or None)
        return list(answer["common_prefixes"]), [meta["path"] for meta in answer["objects"]]

    def put(self, key: str, data: bytes, mode: PutMode) -> UpdateVersion:
        """Store one object if the condition holds, or raise ``Occupied``."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:  # several parts would need several requests, and a failure would leave some behind
            return mark_of(self._store.put(key, data, mode=mode, use_multipart=False))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if isinstance(mode, str) and isinstance(error, FileNotFoundError):  # there is no such bucket
                raise TransferError(first_line(error)) from error
            if not isinstance(mode, str) and isinstance(error, AlreadyExistsError):  # S3 has another put in flight
                raise retry.Retryable(first_line(error)) from error
        raise Occupied(f"{self.url}/{key}: another conversion has written this; run again")

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, if they are there."""
        self._store.delete(keys)

    def _read(self, key: str, limit: int, options: GetOptions | None) -> tuple[bytes, ObjectMeta]:
        """Read an answer piece by piece; ``GetResult.bytes`` would allocate whatever the server claims."""
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


def first_line(error: Exception) -> str:
    """The part of an error that is worth showing; those of object stores are pages long."""
    return (str(error).splitlines() or [type(error).__name__])[0].strip(" :")
