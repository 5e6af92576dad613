"""Ctrl-C ends the command line, and every script beside it, with one line on standard error and exit code 130."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit code that shells give: 128 and the number of SIGINT
RESUMABLE = "interrupted; run the same command again to go on from where it was"


@contextmanager
def interruptible(words: str = "interrupted") -> Iterator[None]:
    """Run a block of work whose interrupt is no error: it ends the process with one line.

    Parameters
    ----------
    words
        The line to print.

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
    """Run a script's `main`, which may be interrupted."""
    with interruptible(words):
        main()
