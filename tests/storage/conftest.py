"""Images, pyramids and a loopback web server for the storage tests."""

from __future__ import annotations

import os
import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile

from storage import ConvertOptions, convert

from .s3 import moto_port, s3  # noqa: F401  fixtures


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def small() -> ConvertOptions:
    """Chunks and shards small enough that a small image has many."""
    return ConvertOptions(chunk=16, shard=64, min_level_size=8)


@pytest.fixture
def textured():
    """(C, H, W) pixels with structure, noise, a blank corner and, for floats, NaN."""

    def make(shape, dtype="uint8", seed=0):
        rng = np.random.default_rng(seed)
        c, h, w = shape
        top = 1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
        ramp = np.add.outer(np.arange(h) / max(h, 1), np.arange(w) / max(w, 1)) / 2
        image = (0.7 * ramp + 0.3 * rng.random((c, h, w))) * top
        image[:, : h // 3, : w // 3] = 0
        return image.astype(dtype)

    return make


@pytest.fixture
def tiff(tmp_path, textured):
    """Write a tiled RGB TIFF and return its path and its (C, H, W) pixels."""

    def make(height, width, name="image.tif", **settings):
        pixels = textured((3, height, width))
        options = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate"} | settings
        tifffile.imwrite(tmp_path / name, pixels.transpose(1, 2, 0), **options)
        return tmp_path / name, pixels

    return make


@pytest.fixture
def svs() -> Path:
    folder = os.environ.get("NESTED_ATS_DATA")
    path = Path(folder, "CMU-1-Small-Region.svs") if folder else None
    if path is None or not path.is_file():
        pytest.skip("NESTED_ATS_DATA does not hold CMU-1-Small-Region.svs")
    return path


@pytest.fixture
def halve():
    """Oracle of a coarser level: the float64 mean of the pixels that each 2x2 block really has."""

    def mean(pixels):
        c, h, w = pixels.shape
        padded = np.full((c, h + h % 2, w + w % 2), np.nan)
        padded[:, :h, :w] = pixels
        blocks = padded.reshape(c, (h + 1) // 2, 2, (w + 1) // 2, 2)
        means = np.nanmean(blocks, axis=(2, 4))
        return means.astype(pixels.dtype) if pixels.dtype.kind == "f" else np.floor(means + 0.5).astype(pixels.dtype)

    return mean


HANG_S = 1.0  # longer than clients of hanging servers wait in tests
SLOW_S = 0.1  # before an answer


class _RangeHandler(SimpleHTTPRequestHandler):
    """Serves files with single byte ranges and notes every request.

    Each of ``failures`` spoils one request. A number is the status that it is answered with. "close": the connection
    is closed without an answer. "hang": the answer comes after clients gave up. "cut": half of the promised body.
    "short": half of the range, said to be so. "whole": the whole file, whatever range was asked for.
    """

    log: list[tuple[str, str | None]]
    failures: list[int | str]

    def __init__(self, *args, log, failures, **kwargs):
        self.log, self.failures = log, failures
        super().__init__(*args, **kwargs)

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.log.append((self.path, wanted))
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, int):
            self.send_error(failure)
            return
        if failure in ("close", "hang"):
            time.sleep(HANG_S if failure == "hang" else 0)
            return
        time.sleep(SLOW_S if failure == "slow" else 0)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "") if failure != "whole" else None
        start = 0 if not found else int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
        if start >= len(data):
            self.send_error(416)
            return
        part = data[start : int(found[2]) + 1] if found and found[1] and found[2] else data[start:]
        part = part[: len(part) // 2] if failure == "short" else part
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        if found:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if failure == "cut" else part)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5, many clients at once wait a second for their turn


class WebServer:
    """Address and request log of a running server; ``failures`` spoils its first answers, see ``_RangeHandler``."""

    def __init__(self, folder: Path) -> None:
        self.log: list[tuple[str, str | None]] = []
        self.failures: list[int | str] = []
        handler = partial(_RangeHandler, directory=str(folder), log=self.log, failures=self.failures)
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def web(tmp_path):
    server = WebServer(tmp_path)
    yield server
    server.close()


def contents(folder):
    """Bytes of all files below a folder, by their paths in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def clean(tiff, tmp_path, small):
    """Source, and the files of its pyramid as one undisturbed thread makes them."""
    source, _ = tiff(300, 200)
    (tmp_path / "clean").mkdir()
    convert(source, tmp_path / "clean/p.zarr", options=small, workers=1)
    return source, contents(tmp_path / "clean/p.zarr")
