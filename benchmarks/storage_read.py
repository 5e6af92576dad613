"""Random patches per second: ``Slide`` against tensorstore, zarr-python, openslide and tiffslide, in one run.

The first three read level 0 of one pyramid, the last two the JPEG-tiled BigTIFF that it was made of (their pixels are
the same, as the pyramid is lossless), all in one process and in turns of half a second, batch by batch of 32 patches;
each goes through the same batches, as far as it gets, and the rate is the median over its turns. ``Slide`` and
tensorstore are given whole batches, the others one patch at a time. tensorstore at its best: its reads are in flight
together in one ``Batch``, which joins what they share, and it has a cache pool, in which it keeps shard indexes as
``Slide`` does (and a few decoded chunks, too few of a slide to matter); what it has cached it asks for no more.
"warm": the files lie in the page cache; "cold": they were dropped from it before each batch. With --s3 a loopback S3
server (moto) serves the pyramid and counts the requests of single patches, shard indexes included.

    python benchmarks/storage_read.py [--size 24576] [--codec lz4] [--chunk 128] [--s3]
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from storage_convert import make_slide

from pipeline.interrupt import run_main
from storage import ConvertOptions, Slide, convert, processors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Reader = Callable[[NDArray[np.int64]], NDArray[np.generic]]

BATCH = 32
TURNS, TURN_S = 7, 0.5
SIDES = (256, 50)
CACHE_BYTES = 100_000_000  # of tensorstore: more than all shard indexes


def pyramid_readers(path: Path) -> dict[str, Reader]:
    """Functions from (N, 4) boxes to (N, C, h, w) pixels of level 0 of a pyramid."""
    import zarr

    slide = Slide(path)
    store = open_tensorstore({"driver": "file", "path": f"{path}/0"})
    array = zarr.open_array(path / "0", mode="r")
    return {
        "Slide": lambda boxes: slide.read_many(0, boxes),
        "tensorstore": lambda boxes: _with_tensorstore(store, boxes),
        "zarr": lambda boxes: _with_zarr(array, boxes),
    }


def open_tensorstore(kvstore: dict[str, Any]) -> Any:
    """Open an array with the settings that read random patches fastest."""
    import tensorstore

    settings = {
        "context": {"cache_pool": {"total_bytes_limit": CACHE_BYTES}},
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
    }
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore} | settings).result()


def _with_tensorstore(store: Any, boxes: NDArray[np.int64]) -> NDArray[np.generic]:
    import tensorstore

    with tensorstore.Batch() as batch:
        reads = [store[:, y : y + h, x : x + w].read(batch=batch) for y, x, h, w in boxes.tolist()]
    return np.stack([read.result() for read in reads])


def _with_zarr(array: Any, boxes: NDArray[np.int64]) -> NDArray[np.generic]:
    return np.stack([np.asarray(array[:, y : y + h, x : x + w]) for y, x, h, w in boxes.tolist()])


def tiff_readers(path: Path) -> dict[str, Reader]:
    """Functions from (N, 4) boxes to (N, C, h, w) pixels of level 0 of a TIFF."""
    import openslide
    import tiffslide

    slides = {"openslide": openslide.OpenSlide(path), "tiffslide": tiffslide.TiffSlide(path)}

    def reader(slide: Any, **settings: bool) -> Reader:
        def read(boxes: NDArray[np.int64]) -> NDArray[np.generic]:
            patches = [slide.read_region((x, y), 0, (w, h), **settings) for y, x, h, w in boxes.tolist()]
            return np.stack([np.asarray(patch)[:, :, :3].transpose(2, 0, 1) for patch in patches])

        return read

    return {"openslide": reader(slides["openslide"]), "tiffslide": reader(slides["tiffslide"], as_array=True)}


def drop_from_cache(place: Path) -> None:
    """Ask the system to forget a file, or all files of a folder."""
    for path in [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def draw_boxes(size: int, side: int, batches: int) -> list[NDArray[np.int64]]:
    """Batches of random (N, 4) boxes inside the image."""
    rng = np.random.default_rng(side)
    extent = np.full((BATCH, 2), side)
    return [np.hstack([rng.integers(0, size - side, (BATCH, 2)), extent]) for _ in range(batches)]


def rates(ways: dict[str, Reader], boxes: list[NDArray[np.int64]], cold: list[Path]) -> dict[str, float]:
    """Median patches per second of each reader in turns; before each batch the system forgets what is `cold`."""
    expected = ways["Slide"](boxes[0]).astype(int)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, read in ways.items():  # openslide's own JPEG decoder may round otherwise by a few levels
        if np.abs(read(boxes[0]).astype(int) - expected).max() > 4:
            raise RuntimeError(f"{name} reads other pixels")
    batches = {name: itertools.cycle(boxes) for name in ways}
    for _ in range(TURNS):
        for name, read in ways.items():
            own: list[float] = []
            while sum(own) < TURN_S:
                own.append(_time(read, next(batches[name]), cold))
            seconds[name].append(statistics.mean(own))
    return {name: BATCH / statistics.median(own) for name, own in seconds.items()}


def _time(read: Reader, boxes: NDArray[np.int64], cold: list[Path]) -> float:
    for place in cold:
        drop_from_cache(place)
    started = time.perf_counter()
    read(boxes)
    return time.perf_counter() - started


def compare(tiff: Path, pyramid: Path, size: int, batches: int) -> None:
    """Print rates and ratios, warm and cold."""
    ways = pyramid_readers(pyramid) | tiff_readers(tiff)
    print(f"{'patch':>6}{'cache':>6}{'reader':>13}{'patches/s':>11}{'Slide is':>10}")
    for side in SIDES:
        boxes = draw_boxes(size, side, batches)
        with Slide(pyramid) as slide:
            for own in boxes:
                slide.read_many(0, own)  # warms the page cache
            read = slide.statistics
        for cache in ("warm", "cold"):
            cold = [tiff, pyramid] if cache == "cold" else []
            for reader, rate in (found := rates(ways, boxes, cold)).items():
                print(f"{side:6}{cache:>6}{reader:>13}{rate:11.0f}{found['Slide'] / rate:9.1f}x")
        fetched, raw = read.bytes_read / (BATCH * len(boxes)) / 1e3, side * side * 3 / 1e3
        print(f"{side:6}  Slide fetches {fetched:.0f} KB a patch of {raw:.0f} KB raw")


def count_requests(pyramid: Path, size: int, batches: int) -> None:
    """Serve the pyramid from a loopback S3 server and count the requests of single patches."""
    import logging

    import obstore
    import zarr
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from zarr.storage import ObjectStore

    from storage.place.objects import connect

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    seen = [0]
    answer = DomainDispatcherApplication.__call__

    def counted(self: Any, environ: Any, start: Any) -> Any:
        seen[0] += 1
        return answer(self, environ, start)

    setattr(DomainDispatcherApplication, "__call__", counted)  # noqa: B010 - mypy lets no method be assigned
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    _put(f"{endpoint}/slides")
    bucket = connect("s3://slides")
    for path in pyramid.rglob("*"):
        if path.is_file():
            obstore.put(bucket, str(path.relative_to(pyramid)), path.read_bytes())
    kvstore = {"driver": "s3", "bucket": "slides", "path": "0/", "endpoint": endpoint, "aws_region": "us-east-1"}
    store = open_tensorstore(kvstore)
    array = zarr.open_array(ObjectStore(bucket, read_only=True), path="0", mode="r")
    slide = Slide("s3://slides")
    ways: dict[str, Reader] = {
        "Slide": lambda boxes: slide.read_many(0, boxes),
        "tensorstore": lambda boxes: _with_tensorstore(store, boxes),
        "zarr": lambda boxes: _with_zarr(array, boxes),
    }
    print(f"{'patch':>6}  {'loopback S3':13}{'requests a patch':>17}")
    for side in SIDES:
        for name, read in ways.items():
            seen[0] = 0
            boxes = np.concatenate(draw_boxes(size, side, batches))
            before = slide.statistics
            for box in boxes:
                read(box[None])
            kilobytes = f", {(slide.statistics - before).bytes_read / len(boxes) / 1e3:.0f} KB" * (name == "Slide")
            print(f"{side:6}  {name:13}{seen[0] / len(boxes):17.2f}{kilobytes}")
    server.stop()


def _put(url: str) -> None:
    """Make a bucket."""
    from urllib.request import Request, urlopen

    with urlopen(Request(url, method="PUT")):
        pass


def main() -> None:
    """Make a slide and its pyramid, and print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=24576)
    parser.add_argument("--codec", default="lz4")
    parser.add_argument("--chunk", type=int, default=ConvertOptions().chunk)
    parser.add_argument("--batches", type=int, default=600, help="that differ")
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    packages = ("numcodecs", "tensorstore", "zarr", "openslide-python", "openslide-bin", "tiffslide", "numpy")
    print(f"{platform.machine()}, {processors()} processors")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        tiff, pyramid = Path(name, "slide.tif"), Path(name, "slide.ome.zarr")
        make_slide(tiff, args.size)
        convert(tiff, pyramid, options=ConvertOptions(codec=args.codec, chunk=args.chunk))
        print(f"{args.size} x {args.size}, {args.codec}, chunks of {args.chunk}")
        compare(tiff, pyramid, args.size, args.batches)
        if args.s3:
            count_requests(pyramid, args.size, args.batches // 8)


if __name__ == "__main__":
    run_main(main)
