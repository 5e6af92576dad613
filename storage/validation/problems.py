"""The problems that a pyramid can have, and the state of one validation: what it found and has done."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Place = tuple[int, int]  # row, column
Kind = Literal["unfinished", "metadata", "shard", "chunk", "pixels", "stray", "unchecked"]
WARNINGS = ("stray", "unchecked")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a pyramid.

    ``what`` is "unfinished" (its conversion was interrupted), "metadata", "shard" (missing, cut, damaged, exchanged,
    or there where none belongs), "chunk" (it does not decode), "pixels" (not the mean of the finer level, or not the
    source's), "stray" (a file that does not belong here) or "unchecked" (it could not be looked at).
    """

    level: int | None  # 0 is the finest; None stands for the pyramid as a whole
    place: Place | None  # the row and column of the chunk where ``what`` is "chunk", else of the shard
    what: Kind
    message: str

    @property
    def warning(self) -> bool:
        """Whether the pyramid is good all the same, as far as could be seen."""
        return self.what in WARNINGS


class Check:
    """One validation, ``full`` or quick, by several threads: the problems that were found and the bytes done."""

    def __init__(self, progress: Callable[[int, int], None] | None, workers: int, *, full: bool) -> None:
        self.problems: list[Problem] = []
        self.workers, self.full = workers, full
        self._progress = progress or (lambda *_: None)
        self._done = self._total = 0
        self._lock = threading.Lock()

    def add(self, level: int | None, place: Place | None, what: Kind, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(level, place, what, message))

    def run(self, tasks: Sequence[Callable[[], object]], total: int) -> None:
        """Run tasks in threads; after an error or an interrupt no more are started."""
        self._total = total
        self.advance(0)  # speed is measured from here
        with ThreadPoolExecutor(self.workers, thread_name_prefix="storage-validate") as pool:
            try:
                for future in as_completed([pool.submit(task) for task in tasks]):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def advance(self, nbytes: int) -> None:
        """Count decoded bytes as done."""
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)
