"""Choose when this process gives memory back to the system."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h
_GROWTH = 256 * 2**20  # bytes that the process may grow by before it gives back what it does not use
_NAME = "give memory back"  # of the thread, of which a process has one
_LOOK, _SETTLE = 0.25, 0.5  # seconds between looks, and until the blocks of a step are there again


def keep_freed_memory() -> None:
    """Let glibc keep what a training step, or the look at a slide, frees for the next one.

    By default it gives blocks of activations back to the system at every step, and their pages are faulted in again
    at the next: 10 to 30 % of a training step's CPU time here, and up to half of a prediction's, against some tens of
    megabytes kept. Nothing happens where the C library is another one.

    From then on a thread looks whether the process grows, and gives back what lies free between blocks in use: glibc
    does not take a freed block again for an aligned one of the same size, as torch asks for, once something small
    lies beside it, so that the training of sixty slides held 1.1 GB free beside the 0.6 that it used.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)  # a threshold is not taken beyond 32 MB, which activations of a batch exceed
        libc.mallopt(_M_TRIM_THRESHOLD, _GROWTH)
        trim = libc.malloc_trim
        if resident() and not any(thread.name == _NAME for thread in threading.enumerate()):
            threading.Thread(target=_give_back, args=(trim,), name=_NAME, daemon=True).start()


def resident() -> int:
    """Bytes of memory of this process's own, without those of files; 0 where the system does not tell."""
    held = psutil.Process().memory_info()
    return held.rss - held.shared if hasattr(held, "shared") else 0


def _give_back(trim: Callable[[int], int]) -> None:
    """Give back what is free whenever the process has grown; runs for as long as the process."""
    while True:
        held = resident()
        while resident() < held + _GROWTH:
            time.sleep(_LOOK)
        trim(0)
        time.sleep(_SETTLE)
