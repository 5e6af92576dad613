"""Catch whatever goes wrong with one slide, so that it becomes that slide's failure and the others go on."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import Self

from pipeline.errors import DataError, is_ours

DEBUG = "NESTED_ATS_DEBUG"  # where this environment variable is set, unforeseen errors show their tracebacks


class Net:
    """A block of work on one slide: what it raises ends the block and nothing else.

    Interrupts and exits go through, and so do errors of the cluster, which no slide has caused. Panics of libraries
    written in Rust are caught, though Python takes them for exits.

    Parameters
    ----------
    slide_id
        The id that names the slide where its failure ends everything.
    fail_fast
        Whether a failure ends everything, by a `DataError`.

    Attributes
    ----------
    error
        Why the slide failed, in one line; it is empty where the slide did not fail.
    cause
        The exception that was raised.
    """

    def __init__(self, slide_id: str = "", *, fail_fast: bool = False) -> None:
        self._slide_id, self._fail_fast = slide_id, fail_fast
        self.error = ""
        self.cause: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        if error is None or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            return False
        if type(error).__module__ == "cluster.errors":
            return False
        self.error, self.cause = explain(error), error
        if self._fail_fast:
            raise DataError(f"slide {self._slide_id}: {self.error}") from error
        return True


def explain(error: BaseException) -> str:
    """Say in a line what went wrong; an error that is not ours is an internal one, to be reported."""
    if is_ours(error):
        return str(error)
    if os.environ.get(DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    words = " ".join(str(error).split())[:300]
    named = f"{type(error).__name__}: {words}" if words else type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return f"not enough memory ({named})"
    return f"internal error: {named}; please report it, with the traceback that {DEBUG}=1 shows"
