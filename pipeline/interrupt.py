"""Ctrl-C: one line on standard error and exit code 130, in the command line and in every script beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code, as shells have it: 128 and the number of SIGINT
RESUMABLE = "interrupted; run the same command again to go on from where it was"


@contextmanager
def interruptible(words: str = "interrupted") -> Iterator[None]:
    """A block of work whose interrupt is no error: it ends the process in a line.

    Parameters
    ----------
    words
        The line.

    Raises
    ------
    SystemExit
        The block was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(words, file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


def run_main(main: Callable[[], None], words: str = "interrupted") -> None:
    """Run a script's `main` as `interruptible`."""
    with interruptible(words):
        main()
