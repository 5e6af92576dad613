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

    retries: int  # after the first try
    seconds: float  # since the first try, after which there is no further one


TIMEOUT_S = 60.0  # of one request, from its first byte to the last of its answer
READING = Patience(retries=4, seconds=60.0)  # a slide that does not come is reported, and the others go on
WRITING = Patience(retries=8, seconds=600.0)  # a conversion or training of hours may depend on it
FIRST_PAUSE_S = 0.1  # before the first repeat, doubled before each further one


class Retryable(Exception):  # noqa: N818  what fails too often becomes a ``TransferError`` that names its place
    """A request that failed in a way that another one may not."""


def repeat(request: Callable[[], T], passing: tuple[type[Exception], ...], patience: Patience) -> T:
    """Ask for something, and again as long as it fails with one of the ``passing`` errors; the last is raised."""
    started = time.monotonic()
    for number in range(patience.retries):
        try:
            return request()
        except passing:
            if time.monotonic() - started > patience.seconds:
                raise
        time.sleep(FIRST_PAUSE_S * 2**number * random.uniform(0.5, 1.5))  # noqa: S311  so that not all come at once
    return request()
