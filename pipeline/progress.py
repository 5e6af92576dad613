"""Progress bars on standard error; where that is no terminal, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[float, float, str], None]  # done, in all, a few words

_LINE_SECONDS = 10.0


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Show how far some work has come, and how long it will take.

    Yields
    ------
    Function to call with what is done, what there is in all, and a few words.
    """
    with _bar(title) if sys.stderr.isatty() else _lines(title) as update:
        yield update


@contextmanager
def _bar(title: str) -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, words="")
        yield lambda done, total, words: bar.update(task, completed=done, total=total, words=words)


@contextmanager
def _lines(title: str) -> Iterator[OnProgress]:
    last, shown = time.monotonic(), ""

    def update(done: float, total: float, words: str) -> None:
        nonlocal last, shown
        line = f"{title}: {done / max(total, 1e-9):.0%} {words}".rstrip()
        if line != shown and (time.monotonic() - last >= _LINE_SECONDS or done >= total):
            last, shown = time.monotonic(), line
            print(line, file=sys.stderr, flush=True)

    yield update
