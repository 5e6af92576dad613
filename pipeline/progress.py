"""Show progress on standard error: a live view on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

OnProgress = Callable[[float, float, str], None]  # what is done, what there is in all, a few words

_LINE_SECONDS = 10.0
_EARLY_SECONDS = 5.0  # before that, the time left is not worth saying
_RATE_SECONDS = 30.0  # a throughput is averaged over so long


@contextmanager
def progress(title: str, unit: str = "slides") -> Iterator[OnProgress]:
    """Show how far some work has come, how fast it goes, how long it will take, and how much memory it holds.

    Parameters
    ----------
    title
        The name of the work.
    unit
        What is counted, in the plural.

    Yields
    ------
    A function to call with what is done, what there is in all, and a few words.
    """
    if sys.stderr.isatty():
        from pipeline.live import live_view  # rich takes its time to come

        shown = live_view(title, unit)
    else:
        shown = _lines(title)
    with shown as update:
        yield update


class _Named(Protocol):
    @property
    def slide_id(self) -> str: ...


Slide = TypeVar("Slide", bound=_Named)
Result = TypeVar("Result")


def each_slide(
    title: str, slides: Sequence[Slide], look: Callable[[Slide], Result], *, threads: int
) -> Iterator[Result]:
    """Do something with every slide in threads, and show how far it has come.

    Results come in the order of the slides, and few of them are held at a time.
    """
    with ThreadPoolExecutor(threads) as pool, progress(title) as update:

        def begun() -> Iterator[tuple[Slide, Future[Result]]]:
            waiting: deque[tuple[Slide, Future[Result]]] = deque()
            for slide in slides:
                waiting.append((slide, pool.submit(look, slide)))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft()
            yield from waiting

        for done, (slide, future) in enumerate(begun(), 1):
            result = future.result()
            update(done, len(slides), slide.slide_id)
            yield result


class SlideProgress:
    """Progress over slides that are each worked on byte by byte, with the throughput.

    Only the work of this run counts. Slides that were up to date, and what was done before by the first `on_bytes` of
    a slide, are neither in what is done nor in what there is in all: they would make the time left too short.

    Parameters
    ----------
    update
        The function that `progress` yields.
    count
        The number of all slides.
    clock
        It gives the time in seconds, from any start.
    """

    def __init__(self, update: OnProgress, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._update = update
        self._count = count
        self._clock = clock
        self._ended = 0  # slides
        self._there = 0.0  # slides, and parts of them, that were there before
        self._bytes = self._before = 0  # what this run has made, and had made before this slide
        self._first: int | None = None  # bytes of this slide that were there before
        self._past = deque([(clock(), 0)])  # seconds, and bytes done until then
        self._words = ""

    def begin(self, name: str) -> None:
        """Begin the next slide."""
        self._name = f"{name} ({self._ended + 1}/{self._count})"
        self._words = self._name
        self._before = self._bytes
        self._first = None

    def on_bytes(self, done: int, total: int) -> None:
        """Show how many decoded bytes of the slide are done; the first call says how many were there before."""
        share = done / max(total, 1)
        if self._first is None:
            self._first = done
            self._there += share
        self._bytes = self._before + done - self._first
        rate = self._rate()
        self._words = self._name + (f", {rate / 1e6:.0f} MB/s" if rate else "")
        self._show(self._ended + share)

    def end(self) -> None:
        """Count the slide as done; a slide without bytes was up to date, or could not be worked on."""
        self._ended += 1
        self._there += self._first is None
        self._show(self._ended)

    def _show(self, ended: float) -> None:
        """Show the work of this run, all of which is done where there was none."""
        total = self._count - self._there
        if total > 1e-9:  # both numbers are rounded
            self._update(max(ended - self._there, 0.0), total, self._words)
        else:
            self._update(self._count, self._count, self._words)

    def _rate(self) -> float:
        """Return the bytes a second of the last half minute."""
        now = self._clock()
        if now - self._past[-1][0] >= 1:
            self._past.append((now, self._bytes))
        while len(self._past) > 2 and now - self._past[1][0] >= _RATE_SECONDS:
            self._past.popleft()
        (start, before), (end, after) = self._past[0], self._past[-1]
        return (after - before) / (end - start) if end > start else 0.0


def progress_line(title: str, done: float, total: float, words: str, seconds: float, before: float = 0.0) -> str:
    """Put progress into one line: "convert: 25% slide-7 (2/8), 310 MB/s, 12 min left".

    Parameters
    ----------
    title
        The name of the work.
    done, total
        What is done and what there is in all, in any unit.
    words
        What is being done now.
    seconds
        How long it took to come from `before` to `done`.
    before
        What was done already when the seconds began.
    """
    share = done / max(total, 1e-9)
    left = seconds * (total - done) / (done - before) if done > before and seconds >= _EARLY_SECONDS else 0.0
    return f"{title}: {share:.0%} {words}".rstrip() + (f", {duration(left)} left" if left > 0 else "")


def duration(seconds: float) -> str:
    """Put seconds into words: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def _lines(title: str) -> Iterator[OnProgress]:
    last = time.monotonic()
    first: tuple[float, float] | None = None  # when, and what was done then: an earlier run may have done much
    shown = ""

    def update(done: float, total: float, words: str) -> None:
        nonlocal first, last, shown
        now = time.monotonic()
        start, before = first = first or (now, done)
        if now - last < _LINE_SECONDS and done < total:
            return
        line = progress_line(title, done, total, words, now - start, before)
        if line != shown:
            last, shown = now, line
            print(line, file=sys.stderr, flush=True)

    yield update
