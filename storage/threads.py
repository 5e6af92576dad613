"""The threads for reading, which all slides of a process share, and the number of processors."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

POOL_THREADS = 128  # eight slides have so many requests in flight, and the threads only wait for them


def processors() -> int:
    """Count the processors that this process may use; on macOS, which binds none, those of the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@cache
def pool() -> ThreadPoolExecutor:
    """Return the threads, which are made at first use."""
    return ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="storage-read")


os.register_at_fork(after_in_child=pool.cache_clear)  # a forked child inherits the pool without its threads


def spread(work: Callable[[list[Any]], None], items: list[Any], concurrency: int) -> None:
    """Run ``work`` on shares of ``items`` in up to ``concurrency`` threads; the first error is raised."""
    shares = min(concurrency, len(items))
    if shares <= 1:
        if items:
            work(items)
        return
    futures = [pool().submit(work, items[i::shares]) for i in range(shares)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
