"""Computations that read: generators that yield the reads they need and are sent the results.

A forward pass alternates between computing and reading, and need not know how its pixels are fetched. `run` drives
one such generator. `interleave` drives several in one thread: other threads read for those that wait while one
computes, and no two of them ever compute at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Read = Callable[[], Any]
"""Fetches something, such as the pixels of boxes; any thread may call it."""

Reading = Generator[Sequence[Read], list[Any], T]
"""Yields reads, is sent their results in order, and returns a T. The first failed read is thrown into it."""


def run(reading: Reading[T], readers: Executor | None = None) -> T:
    """Run a computation to its end; ``readers`` do its reads side by side, or this thread does them in turn."""
    return next(interleave([reading], readers))


def interleave(
    readings: Iterable[Reading[T]],
    readers: Executor | None = None,
    *,
    ahead: int = 1,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[T]:
    """Run computations in this thread, their reads in others, and yield the results in order.

    Parameters
    ----------
    readings
        The computations; each is taken from the iterable when it can start.
    readers
        The threads that read; by default this thread does.
    ahead
        How many computations are under way at a time, at least 1; each holds its memory.
    context
        Makes the context of each stretch of computing, such as `torch.autocast`.

    Raises
    ------
    Exception
        A computation raised it; it is raised here when that result is due.
    """
    submit = readers.submit if readers else _read_here
    coming, under_way = iter(readings), deque[_Run[T]]()
    while True:
        while len(under_way) < ahead and (reading := next(coming, None)) is not None:
            under_way.append(_Run(reading))
            under_way[-1].go_on(submit, context)
        if not under_way:
            return
        waiting = [each for each in under_way if not each.outcome.done()]
        ready = [each for each in waiting if all(read.done() for read in each.reads)]
        if under_way[0].outcome.done() and not any(each.turns < under_way[0].turns - 1 for each in ready):
            yield under_way.popleft().outcome.result()
        elif ready:
            # The one that has read least goes first: it will wait again, and the others compute meanwhile.
            min(ready, key=lambda each: each.turns).go_on(submit, context)
        else:
            wait([read for each in waiting for read in each.reads if not read.done()], return_when=FIRST_COMPLETED)


class _Run(Generic[T]):
    """A computation under way."""

    def __init__(self, reading: Reading[T]) -> None:
        self._reading = reading
        self.reads: list[Future[Any]] = []  # it waits for these
        self.turns = 0  # how often it has computed
        self.outcome: Future[T] = Future()

    def go_on(
        self, submit: Callable[[Read], Future[Any]], context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Compute until the next reads or to the end; the reads that it waited for are done."""
        failure = next((error for read in self.reads if (error := read.exception())), None)
        self.turns += 1
        try:
            with context():
                if failure:
                    wanted = self._reading.throw(failure)
                elif self.turns == 1:
                    wanted = next(self._reading)
                else:
                    wanted = self._reading.send([read.result() for read in self.reads])
        except StopIteration as end:
            self.outcome.set_result(end.value)
        except Exception as error:  # noqa: BLE001  it is raised when its turn comes
            self.outcome.set_exception(error)
        else:
            self.reads = [submit(read) for read in wanted]


def _read_here(read: Read) -> Future[Any]:
    """Read in this thread."""
    done: Future[Any] = Future()
    try:
        done.set_result(read())
    except Exception as error:  # noqa: BLE001  the computation handles it
        done.set_exception(error)
    return done
