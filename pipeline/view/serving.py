"""A viewer's server: in a thread of this process, on this machine's own address, until it is closed."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import uvicorn

from pipeline.data.slides import Opening
from pipeline.errors import UsageError
from pipeline.view.cohort import Case
from pipeline.view.guard import HOSTS, guarded
from pipeline.view.server import Viewer, application
from pipeline.view.work import CACHE_BYTES, Work

_MOST_CONNECTIONS = 512
_BACKLOG = 128
_END_S = 5.0  # that requests may still take once the server is to end


class Serving:
    """Serves slides on this machine alone.

    Parameters
    ----------
    cases
        The slides; see `pipeline.view.cohort.cases_of`.
    port
        Port of 127.0.0.1; 0 takes one that is free.
    framed
        Whether pages on this machine, such as Jupyter's, may show the page in a frame.
    cache_bytes
        Of tiles that are kept.
    opening
        How slides are opened.

    Attributes
    ----------
    url : address of the page, with its token

    Raises
    ------
    UsageError
        The port is taken, or may not be used.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        port: int = 0,
        framed: bool = False,
        cache_bytes: int = CACHE_BYTES,
        opening: Opening | None = None,
    ) -> None:
        token = secrets.token_urlsafe(32)
        answers = guarded(application(Viewer(cases, Work(cache_bytes), opening or {})), token, framed=framed)
        self._socket = _listen(port)
        self.url = f"http://{HOSTS[0]}:{self._socket.getsockname()[1]}/{token}/"
        config = uvicorn.Config(
            answers,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            access_log=False,  # the paths hold the token
            log_level="error",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=int(_END_S),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="nested-ats view", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])

    def wait(self) -> None:
        """Wait until the server is closed, or has failed."""
        while self._thread.is_alive():
            self._thread.join(1)  # in pieces, so that Ctrl-C comes through

    def close(self) -> None:
        """End the server; requests that are being answered have a few seconds."""
        self._server.should_exit = True
        self._thread.join(2 * _END_S)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _listen(port: int) -> socket.socket:
    # Without its protocol asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an acknowledgement.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOSTS[0], port))
        listening.listen(_BACKLOG)  # from now on connections wait until they are answered
    except OSError as error:
        listening.close()
        raise UsageError(
            f"--port {port}: cannot be used ({error.strerror}); choose another, or leave it out"
        ) from error
    return listening
