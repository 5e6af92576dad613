"""Choose when this process gives memory back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what a training step, or the look at a slide, frees for the next one.

    By default it gives blocks of activations back to the system at every step, and their pages are faulted in again
    at the next: 10 to 30 % of a training step's CPU time here, and up to half of a prediction's, against some tens of
    megabytes kept. Nothing happens where the C library is another one.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # a threshold is not taken beyond 32 MB, which activations of a batch exceed
        mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)
