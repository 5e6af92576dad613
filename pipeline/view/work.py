"""What bounds the cost of a viewer: a few readers, work that ends when nobody waits, and a cache of fixed size."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from anyio import CapacityLimiter, create_task_group, to_thread
from starlette.requests import Request

from pipeline.net import Net

CACHE_BYTES = 2**28
_MOST_WAITING = 512  # requests; a screen has a few dozen tiles
_READERS, _OF_ONE = 16, 6  # threads, and those of one slide: a server that does not answer holds up its slide alone
LONG = 2.0**24  # pixels of a file (`pipeline.view.tiles.cost`): to read more takes long


class Answer(NamedTuple):
    """What is sent."""

    content: bytes
    media_type: str = "application/json"
    error: str = ""  # why there is none


class Gone(BaseException):
    """Nobody waits for the answer any more; like an interrupt, it is no error to be caught on the way."""


class TakesLongError(Exception):
    """The work has to be done where long work is."""


class Task:
    """What a piece of work knows of who waits for it."""

    def __init__(self, *, long: bool = False) -> None:
        self.is_long, self._gone = long, threading.Event()

    def check(self) -> None:
        """Raise `Gone` if nobody waits any more."""
        if self._gone.is_set():
            raise Gone

    def costs(self, pixels: float) -> None:
        """Say how much there is to read; long work is done one at a time, so that others need not wait for it."""
        if pixels > LONG and not self.is_long:
            raise TakesLongError

    def give_up(self) -> None:
        """Let the work end at its next check."""
        self._gone.set()


class Work:
    """Does work on slides in threads, of which there are a few, and keeps what came out.

    Parameters
    ----------
    cache_bytes
        Of answers that are kept.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._kept = ByteCache(cache_bytes)
        self._readers, self._long = CapacityLimiter(_READERS), CapacityLimiter(1)
        self._of_one = defaultdict[int, CapacityLimiter](lambda: CapacityLimiter(_OF_ONE))
        self._waiting = 0

    async def answer(self, request: Request, make: Callable[[Task], Answer]) -> Answer:
        """Return what was kept of an earlier request for the same, or make it.

        Work ends at its next check, and is not begun, where the client closes its connection.
        """
        key = f"{request.url.path}?{request.url.query}"
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        if self._waiting >= _MOST_WAITING:
            return Answer(b"", error="too many requests at once; wait a moment, and reload")
        self._waiting += 1
        try:
            made = await self._make(request, make, Task())
            if made is None:
                made = await self._make(request, make, Task(long=True))
        finally:
            self._waiting -= 1
        assert made is not None  # noqa: S101 - only short work can turn out to take long
        if not made.error:
            self._kept.put(key, made)
        return made

    async def _make(self, request: Request, make: Callable[[Task], Answer], task: Task) -> Answer | None:
        """Make an answer; None if it takes long, and the task is not to."""

        def work() -> Answer | None:
            try:
                task.check()
                with Net() as net:
                    return make(task)
            except Gone:
                return Answer(b"", error="given up")
            return None if isinstance(net.cause, TakesLongError) else Answer(b"", error=net.error)

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            task.give_up()
            group.cancel_scope.cancel()

        made: Answer | None = Answer(b"", error="given up")
        async with create_task_group() as group:
            group.start_soon(watch)
            async with self._long if task.is_long else self._of_one[request.path_params["number"]]:
                made = await to_thread.run_sync(work, limiter=self._readers)
            group.cancel_scope.cancel()
        return made


class ByteCache:
    """Answers by name, up to a size in bytes; the least recently used are dropped first."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[str, Answer] = OrderedDict()

    def get(self, key: str) -> Answer | None:
        """Return an answer that is kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, if it is not larger than all that may be kept."""
        size = _size(key, answer)
        if key in self._kept or size > self._most:
            return
        self._kept[key] = answer
        self._bytes += size
        while self._bytes > self._most:
            self._bytes -= _size(*self._kept.popitem(last=False))

    def __len__(self) -> int:
        return len(self._kept)


def _size(key: str, answer: Answer) -> int:
    return len(key) + len(answer.content)
