"""The net under every slide: whatever goes wrong with one becomes its failure, and the others go on."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import Self

from pipeline.errors import DataError, is_ours

DEBUG = "NESTED_ATS_DEBUG"  # environment variable: set, tracebacks of errors that nobody foresaw are printed


class Net:
    """A block of work on one slide; what it raises ends here, and nothing else than the block.

    Interrupts and exits go through, and so do errors of the cluster, which no slide has caused; panics of libraries
    written in Rust do not, though Python takes them for exits.

    Parameters
    ----------
    slide_id
        Of the slide, to name it where its failure ends everything.
    fail_fast
        Whether it does: by a `DataError`.

    Attributes
    ----------
    error
        Why the slide failed, in one line; empty where it did not.
    cause
        What was raised.
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
    """Say in a line what went wrong: our own errors as they are, anything else as an internal error to report."""
    if is_ours(error):
        return str(error)
    if os.environ.get(DEBUG):
        traceback.print_exception(error, file=sys.stderr)
    words = " ".join(str(error).split())[:300]
    named = f"{type(error).__name__}: {words}" if words else type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return f"not enough memory ({named})"
    return f"internal error: {named}; please report it, with the traceback that {DEBUG}=1 shows"
