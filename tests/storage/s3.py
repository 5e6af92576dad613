"""A loopback S3 server (moto) behind a proxy that fails on demand; ``s3`` gives each test its own bucket.

The proxy sees every request, so tests also count and inspect them (``log``), and breaks those that a ``Fault`` names.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import obstore
import pytest

from storage.place.retry import Patience

TIMEOUT_S = 1.0  # of the client, in tests
ATTEMPTS = 6  # of a put before it is given up
FAULTS = ("409", "500", "503", "delay", "close", "lost", "cut", "unconditional")


@dataclass
class Fault:
    """Break requests of one method whose path contains ``path``: after ``skip`` good ones, ``times`` bad ones.

    409, 500, 503: answered so, not forwarded. delay: forwarded, answered after the client gave up. close: connection
    closed, not forwarded. lost: forwarded, then closed without an answer. cut: half of the body. unconditional: the
    store knows nothing of If-Match and If-None-Match.
    """

    kind: str
    method: str = "PUT"
    path: str = ""
    skip: int = 0
    times: float = 1

    def __post_init__(self) -> None:
        assert self.kind in FAULTS

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is to be broken; counts it."""
        if method != self.method or self.path not in path:
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times <= 0:
            return False
        self.times -= 1
        return True


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else each answer waits 40 ms for an acknowledgement
    server: FaultyProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.judge(self.command, self.path)
        if fault in {"409", "500", "503"}:
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "close":
            self.close_connection = True
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: str | None) -> None:
        headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
        if fault == "unconditional":
            headers = {
                key: value for key, value in headers.items() if key.lower() not in {"if-match", "if-none-match"}
            }
        upstream = HTTPConnection("127.0.0.1", self.server.upstream_port)
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "delay":
            time.sleep(1.2 * TIMEOUT_S)
        self.close_connection = fault in {"delay", "lost", "cut"}
        if fault in {"delay", "lost"}:
            return
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in {"connection", "transfer-encoding", "content-length", "date", "server"}:
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815  names that http.server asks for

    def log_message(self, *args: object) -> None:
        pass


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to the store what no fault strikes."""

    def __init__(self, upstream_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.upstream_port = upstream_port
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def judge(self, method: str, path: str) -> str | None:
        with self._mutex:
            self.log.append((method, path))
            struck = [fault.kind for fault in self.faults if fault.strikes(method, path)]
            return struck[0] if struck else None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is part of the game."""

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


@dataclass
class S3:
    """One bucket of the loopback store."""

    url: str
    proxy: FaultyProxy
    direct: obstore.store.S3Store  # past the proxy: never fails, is not logged

    def fail(self, kind: str, **where: object) -> None:
        self.proxy.faults.append(Fault(kind, **where))

    def heal(self) -> None:
        self.proxy.faults.clear()

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Contents of all objects below a prefix."""
        prefix = prefix.rstrip("/") + "/"
        metas = [meta for batch in self.direct.list(prefix) for meta in batch]
        return {m["path"].removeprefix(prefix): bytes(self.direct.get(m["path"]).bytes()) for m in metas}

    def put(self, key: str, data: bytes) -> None:
        self.direct.put(key, data)

    def clear(self, prefix: str = "") -> None:
        self.direct.delete([meta["path"] for batch in self.direct.list(prefix) for meta in batch])

    def puts(self) -> list[str]:
        """Paths of all puts that the proxy saw."""
        return [path for method, path in self.proxy.log if method == "PUT"]


_numbers = count()


@pytest.fixture(scope="session")
def moto_port():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto_port, monkeypatch):
    """Make a bucket, put its settings in the environment, and let clients be impatient."""
    proxy = FaultyProxy(moto_port)
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    for name in (
        "place.retry.TIMEOUT_S",
        "conversion.object_target.SHARD_TIMEOUT_S",
        "conversion.object_target.STATE_TIMEOUT_S",
    ):
        monkeypatch.setattr(f"storage.{name}", TIMEOUT_S)
    monkeypatch.setattr("storage.place.retry.READING", Patience(ATTEMPTS - 1, 60.0))
    monkeypatch.setattr("storage.place.retry.WRITING", Patience(ATTEMPTS - 1, 600.0))
    monkeypatch.setattr("storage.place.retry.FIRST_PAUSE_S", 0.01)
    bucket = f"bucket-{next(_numbers)}"
    connection = HTTPConnection("127.0.0.1", moto_port)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()
    direct = obstore.store.S3Store(
        bucket,
        endpoint=f"http://127.0.0.1:{moto_port}",
        client_options={"allow_http": True},
        **{k.lower(): v for k, v in settings.items()},
    )
    yield S3(f"s3://{bucket}", proxy, direct)
    proxy.close()
