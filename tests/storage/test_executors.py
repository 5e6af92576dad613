"""Threads, processes, a Dask cluster and a caller's own executor write the same bytes and raise the same errors."""

import multiprocessing
import pickle
import socket
import subprocess
import sys
import time
from operator import itemgetter
from types import SimpleNamespace

import psutil
import pytest
import tifffile

from storage import ConversionError, ConvertOptions, CorruptImageError, Slide, convert
from storage.conversion.executors import open_executor

from .conftest import contents


@pytest.fixture
def damage(tiff):
    """A TIFF, the tile (1, 1) of which does not decode."""
    path, _ = tiff(300, 200, name="damaged.tif")
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[offset : offset + 16] = b"\xff" * 16
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def scheduler():
    """Address of a Dask cluster of two processes on this machine."""
    from distributed import LocalCluster

    free = "127.0.0.1:0"  # by default the scheduler's page takes port 8787, which another's may have
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=free) as cluster:
        yield cluster.scheduler_address


def pooled(make_worker, items):
    """An executor of one's own: two spawned processes, answers as they come, everything pickled."""
    make_worker, items = pickle.loads(pickle.dumps((make_worker, items)))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield from pool.imap_unordered(make_worker(), items)


@pytest.mark.parametrize("executor", ["processes", "dask", pooled])
def test_other_executors_write_the_same_bytes(clean, tmp_path, small, executor, request):
    source, expected = clean
    executor = request.getfixturevalue("scheduler") if executor == "dask" else executor
    seen = []
    report = convert(
        source,
        tmp_path / "p.zarr",
        options=small,
        executor=executor,
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(tmp_path / "p.zarr") == expected
    assert len(seen) == 1 + report.shards  # the first says what was there before
    assert seen[-1] == (report.raw_bytes, report.raw_bytes)


@pytest.mark.parametrize("executor", ["threads", "processes", "dask", pooled])
def test_errors_of_workers_arrive_as_they_are(damage, tmp_path, small, executor, request):
    executor = request.getfixturevalue("scheduler") if executor == "dask" else executor
    with pytest.raises(CorruptImageError, match=r"damaged\.tif: tile \(1, 1\) does not decode as \w+; copy"):
        convert(damage, tmp_path / "p.zarr", options=small, executor=executor, workers=2)
    assert not (tmp_path / "p.zarr").exists()
    if executor in ("threads", "processes"):  # elsewhere a task may still run
        assert not (tmp_path / "p.zarr.partial").exists()


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_errors_that_nobody_foresaw_arrive_as_they_are(executor):
    job = SimpleNamespace(attempt=itemgetter(9))
    with pytest.raises(IndexError, match="out of range"), open_executor(executor, 2, job) as run:
        run(["short", "too"], lambda _: None)


def test_strips_are_banded_in_other_processes(tmp_path, textured, small):
    pixels = textured((3, 300, 200))
    tifffile.imwrite(
        tmp_path / "s.tif", pixels.transpose(1, 2, 0), rowsperstrip=20, compression="zstd", photometric="rgb"
    )
    convert(tmp_path / "s.tif", tmp_path / "p.zarr", options=small, executor="processes", workers=2)
    with Slide(tmp_path / "p.zarr") as slide:
        assert (slide.read(0, (0, 0, 300, 200)) == pixels).all()


def test_a_scheduler_that_does_not_answer(clean, tmp_path, small, monkeypatch):
    monkeypatch.setattr("storage.conversion.executors.CONNECT_TIMEOUT_S", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConversionError, match="no Dask scheduler answers"):
            convert(clean[0], tmp_path / "p.zarr", options=small, executor=address)


def test_a_killed_worker_is_an_error_of_ours(clean, tmp_path, small):
    def progress(*_):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(ConversionError, match="a worker process was killed"):
        convert(clean[0], tmp_path / "p.zarr", options=small, executor="processes", workers=2, progress=progress)
    convert(clean[0], tmp_path / "p.zarr", options=small)
    assert contents(tmp_path / "p.zarr") == clean[1]


DRIVER = """
import multiprocessing, os, sys
from storage import ConvertOptions, convert

def progress(done, _):
    if done:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    options = ConvertOptions(chunk=16, shard=64, min_level_size=8)
    convert(*sys.argv[1:], options=options, executor="processes", workers=2, progress=progress)
"""


def test_workers_end_with_their_driver(clean, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, tmp_path / "driver.py", clean[0], tmp_path / "p.zarr"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        workers = [int(word) for word in driver.stdout.readline().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_unknown_executors_are_programming_errors(clean, tmp_path, small):
    for name in ("magic", "foo://127.0.0.1:1"):
        with pytest.raises(ValueError, match="threads, processes"):
            convert(clean[0], tmp_path / "p.zarr", options=small, executor=name)
    assert not list(tmp_path.glob("p.*"))


def test_a_wave_larger_than_the_workers_keeps_few_tasks_in_flight(tmp_path, textured):
    """Level 0 of 60 blocks over 2 threads: the driver hands out tasks as workers come free, and all are done."""
    tifffile.imwrite(tmp_path / "i.tif", textured((1, 600, 400))[0], tile=(32, 32))
    options = ConvertOptions(chunk=16, shard=32, min_level_size=32)
    assert convert(tmp_path / "i.tif", tmp_path / "p.zarr", options=options, workers=2).shards > 300
