"""The live view of a long command on a terminal: what is done, how fast, how long it takes, and the memory held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_TIMES = ((1, "s"), (60, "min"), (3600, "h"))


@contextmanager
def live_view(title: str, unit: str, console: Console | None = None) -> Iterator[Callable[[float, float, str], None]]:
    """Show two lines that are kept up to date: the bar with its figures, and what is being done.

    Parameters
    ----------
    title, unit
        As for `pipeline.progress.progress`, whose function it yields.
    console
        Where to show it; default: standard error.
    """
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(),
        TaskProgressColumn(),
        _Counts(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
        _Memory(),
    )
    with _View(*columns, console=console or Console(stderr=True)) as view:
        task = view.add_task(title, total=None, words="")
        yield lambda done, total, words: view.update(task, completed=done, total=total, words=words)


class _View(Progress):
    """The bar, and below it the words, which have the width of the terminal to themselves."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(f"  {task.fields['words']}", style="dim", no_wrap=True, overflow="ellipsis")


class _Counts(ProgressColumn):
    """What is done of what there is, and the throughput."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        speed = task.finished_speed or task.speed
        rate = f", {per_time(speed, self._unit)}" if speed else ""
        return Text(f"{int(task.completed)}/{task.total:.0f} {self._unit}{rate}")


class _Memory(ProgressColumn):
    """The resident memory of this process and of those that it has started."""

    max_refresh = 1.0  # seconds; to ask for it costs more than to show it

    def render(self, task: Task) -> Text:  # noqa: ARG002 - of the process, whatever the task
        return Text(f"{_resident() / 1e9:.1f} GB", style="dim")


def per_time(number: float, unit: str) -> str:
    """Put a number a second into words, over the time that makes it one or more: "3.2 slides/min"."""
    seconds, name = next((time for time in _TIMES if number * time[0] >= 1), _TIMES[-1])
    value = number * seconds
    return f"{value:,.0f} {unit}/{name}" if value >= 100 else f"{value:.3g} {unit}/{name}"


def _resident() -> int:
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total
