"""How often a request to a server is repeated: the one policy for reading and writing.

obstore's own is switched off (see ``storage.place.objects``): it repeats neither a body that was cut, nor a
conditional put or a delete that timed out, nor a listing that broke off. All our requests can be repeated safely.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits on the repeats of one request."""

    retries: int  # repeats after the first try
    seconds: float  # no repeat starts later than this after the first try


TIMEOUT_S = 60.0  # for one request and its whole answer
READING = Patience(retries=4, seconds=60.0)  # a slide that cannot be read is reported, and the others go on
WRITING = Patience(retries=8, seconds=600.0)  # a conversion or training of hours may depend on it
FIRST_PAUSE_S = 0.1  # pause before the first repeat, doubled before each further one


class Retryable(Exception):  # noqa: N818  the last one becomes a ``TransferError`` that names its place
    """A request failed in a way that may pass."""


def repeat(
    request: Callable[[], T],
    passing: tuple[type[Exception], ...],
    patience: Patience,
    first: Callable[[], T] | None = None,
) -> T:
    """Repeat a request while it fails with one of the ``passing`` errors; in the end raise the last of them.

    ``first`` is tried before it, in place of the first try.
    """
    started, number = time.monotonic(), 0
    while True:
        try:
            return (request if number or first is None else first)()
        except passing:
            if number == patience.retries or time.monotonic() - started > patience.seconds:
                raise
        time.sleep(FIRST_PAUSE_S * 2**number * random.uniform(0.5, 1.5))  # noqa: S311  clients must not repeat in step
        number += 1
