"""Files of web servers (http, https), which are not trusted: bounded in bytes, in time and in redirects.

Notable: obstore serves s3, gs and az, but not these. It allocates the length that a server claims for the body of an
error, so that a server that claims 64 GB ends the process. Here no body is read further than was asked, that of an
error is not kept, a request ends after its time however slowly it drips, and redirects lead to http and https only.

The requests of all threads run on one event loop, in a thread of its own; ranges are asked for several at a time.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar
from urllib.parse import quote
from urllib.request import getproxies

from storage.errors import CorruptImageError, TransferError
from storage.place.retry import Retryable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
    from concurrent.futures import Future

    import aiohttp

    from storage.place.ranges import Range, Stat

T = TypeVar("T")
PIECE_BYTES = 2**20  # bytes of a body that are read at once
DRAINED_BYTES = 2**16  # bytes of an error's body that are read to reuse its connection
REDIRECTS = 5
CONNECTIONS = 128  # at a time, to all servers
TOGETHER, GROUPS_AHEAD = 8, 2  # requests that are waited for together, and such groups that are under way
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True)
class WebRequests:
    """Single requests below one URL; see ``storage.place.remote_store.RemoteStore``."""

    passing: ClassVar[tuple[type[Exception], ...]] = (Retryable,)
    url: str
    timeout_s: float

    def get(self, key: str, limit: int) -> tuple[bytes, Any]:
        """Return a whole file of at most ``limit`` bytes, and None, as web servers give no metadata of objects."""

        async def read(answer: aiohttp.ClientResponse) -> tuple[bytes, None]:
            length = answer.content_length
            body = None if length is not None and length > limit else await _body(answer, limit)
            if body is None:
                held = "more" if length is None else f"{length} bytes, more"
                raise CorruptImageError(f"{self.url}/{key}: holds {held} than the {limit} it may")
            return body, None

        return self._request("GET", key, {}, read)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``, or from ``-start`` before the end; fewer where the file ends."""
        return _submit(self._range(key, start, length)).result()

    async def _range(self, key: str, start: int, length: int) -> bytes:
        wanted = f"bytes={start}-{start + length - 1}" if start >= 0 else f"bytes=-{length}"

        async def read(answer: aiohttp.ClientResponse) -> bytes:
            if answer.status == 416:
                return b""
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status != 206 or found is None:
                raise TransferError("Range request not supported")
            first, last = int(found[1]), int(found[2])
            if (first != start and start >= 0) or last - first >= length:
                raise TransferError(f"{wanted} was requested and {found[0]} was sent")
            body = await _body(answer, length)
            if body is None:
                raise TransferError(f"more bytes than the {length} that were requested")
            return body

        return await self._answer("GET", key, {"Range": wanted}, read)

    def first_tries(self, ranges: Sequence[Range]) -> Iterator[Callable[[], bytes]]:
        """Ask for ranges, some ahead of those that are taken, and yield what waits for each answer.

        A thread for each request would cost more than the request.
        """
        groups = (self._begin(ranges[start : start + TOGETHER]) for start in range(0, len(ranges), TOGETHER))
        under_way = deque(islice(groups, GROUPS_AHEAD))
        while under_way:
            yield from under_way.popleft()
            under_way.extend(islice(groups, 1))

    def _begin(self, ranges: Sequence[Range]) -> list[Callable[[], bytes]]:
        async def ask() -> list[bytes | BaseException]:
            return await asyncio.gather(*(self._range(*each) for each in ranges), return_exceptions=True)

        group = _submit(ask())
        return [partial(_outcome, group, place) for place in range(len(ranges))]

    def stat(self, key: str) -> Stat:
        """Size and version of a file."""

        async def read(answer: aiohttp.ClientResponse) -> Stat:
            tag, changed = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
            size = answer.headers.get("Content-Length", "")
            if not re.fullmatch(r"\d{1,18}", size):
                raise TransferError("the server does not tell the file's size")
            with contextlib.suppress(ValueError):
                changed = parsedate_to_datetime(changed).isoformat() if changed else None
            return int(size), {"e_tag": tag} if tag else {"last_modified": changed or ""}

        return self._request("HEAD", key, {}, read)

    def _refuse(self, *_: object) -> NoReturn:
        raise TransferError("web servers can only be read and do not list their files")

    entries = list_folder = put = delete = _refuse

    def _request(
        self, method: str, key: str, headers: dict[str, str], read: Callable[[aiohttp.ClientResponse], Awaitable[T]]
    ) -> T:
        return _submit(self._answer(method, key, headers, read)).result()

    async def _answer(
        self, method: str, key: str, headers: dict[str, str], read: Callable[[aiohttp.ClientResponse], Awaitable[T]]
    ) -> T:
        import aiohttp
        from yarl import URL

        url = URL(f"{URL(self.url)}/{quote(key)}", encoded=True)
        try:
            async with (
                _connections(),  # to wait for one takes nothing of the request's time
                asyncio.timeout(self.timeout_s),
                _session().request(method, url, headers=headers, max_redirects=REDIRECTS) as answer,
            ):
                if answer.status < 400 or answer.status == 416:
                    return await read(answer)
                with contextlib.suppress(aiohttp.ClientError):
                    await answer.content.read(0 if method == "HEAD" else DRAINED_BYTES)
                if answer.status in (404, 410):
                    raise FileNotFoundError(key)
                kind = Retryable if answer.status >= 500 or answer.status in (408, 429) else TransferError
                raise kind(f"status {answer.status} {answer.reason or ''}".strip()[:80])
        except TimeoutError:
            raise Retryable(f"no whole answer within {self.timeout_s:g} s") from None
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            raise TransferError(f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise Retryable(str(error) or type(error).__name__) from error


async def _body(answer: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """Return the body, or None once it is longer than ``limit`` bytes."""
    body = bytearray()
    async for piece in answer.content.iter_chunked(PIECE_BYTES):
        body += piece
        if len(body) > limit:
            answer.close()
            return None
    return bytes(body)


def _submit(request: Coroutine[Any, Any, T]) -> Future[T]:
    """Begin a request on the loop."""
    return asyncio.run_coroutine_threadsafe(request, _event_loop())


def _outcome(group: Future[list[bytes | BaseException]], place: int) -> bytes:
    found = group.result()[place]
    if isinstance(found, BaseException):
        raise found
    return found


_making = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop that all requests run on, made at first use; a forked process may not use it."""
    with _making:
        return _new_event_loop()


@cache
def _new_event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="storage-web", daemon=True).start()
    return loop


@cache
def _connections() -> asyncio.Semaphore:
    return asyncio.Semaphore(CONNECTIONS)


def _has_proxies_or_passwords() -> bool:
    """Whether the environment has any: aiohttp looks them up in another thread for each request, which costs most."""
    passwords = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    return bool(getproxies()) or os.path.exists(passwords)


@cache
def _session() -> aiohttp.ClientSession:
    """Make the connections, on the loop."""
    import aiohttp

    session = aiohttp.ClientSession(
        auto_decompress=False,  # a decompressed body would not be bounded
        headers={"Accept-Encoding": "identity"},
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None),  # each request has its own timeout
        trust_env=_has_proxies_or_passwords(),
    )
    atexit.register(lambda: _submit(session.close()).result(1.0))
    return session
