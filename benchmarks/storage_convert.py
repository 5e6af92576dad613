"""Conversion of a JPEG-tiled BigTIFF to an OME-Zarr pyramid: time, memory and size, each way in its own process.

Limits on the same processors: decoding the JPEG tiles alone with tifffile; decoding and averaging all levels, without
encoding or writing; and the disk, writing as many bytes as ``storage.convert`` stores, with one fsync per 8 MB.
Peers: ngff-zarr with the fastest options found (bin shrink by Dask, zarrista's writer, lz4, chunks as the source's
tiles) and ome-zarr-py, both with 256 x 256 chunks in 2048 x 2048 shards and both reading the TIFF through tifffile's
zarr store. Throughput is of level 0's raw bytes; what is written goes to --folder.

    python benchmarks/storage_convert.py [--sizes 8192 24576] [--workers 3] [--repeats 3] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.interrupt import run_main
from storage import processors

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 512


def make_slide(path: Path, size: int) -> None:
    """Write a synthetic stained section: white glass, pink tissue with dark nuclei, a little sensor noise."""
    from storage import write_tiff

    count = -(-size // TILE)
    tissue = np.random.default_rng(0).random((count + 1, count + 1))
    tiles = (_tile(tissue[y : y + 2, x : x + 2], seed=(y, x)) for y in range(count) for x in range(count))
    write_tiff(path, tiles, shape=(size, size, 3), dtype="uint8", tile=TILE, compression="jpeg", mpp=0.25)


def _tile(corners: NDArray[np.float64], seed: tuple[int, int]) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, TILE)
    rows = corners[0] * (1 - t[:, None]) + corners[1] * t[:, None]
    field = rows[:, :1] * (1 - t) + rows[:, 1:] * t  # bilinear between the corners
    blobs = np.kron(rng.standard_normal((TILE // 8, TILE // 8, 1)), np.ones((8, 8, 1)))
    nuclei = np.kron(rng.random((TILE // 16, TILE // 16, 1)) > 0.8, np.ones((16, 16, 1), bool))
    stain = np.array([225, 160, 200]) + 20 * blobs - nuclei * np.array([110, 110, 60])
    image = np.where(field[..., None] > 0.45, stain + 4 * rng.standard_normal((TILE, TILE, 1)), 243)
    return np.clip(image, 0, 255).astype(np.uint8)


def decode(tiff: Path, _out: Path, workers: int) -> float:
    """Decode every tile with tifffile and drop it."""
    import tifffile

    started = time.perf_counter()
    with tifffile.TiffFile(tiff) as tif:
        for _ in tif.pages[0].segments(maxworkers=workers):
            pass
    return time.perf_counter() - started


def decode_and_average(tiff: Path, _out: Path, workers: int) -> float:
    """Decode the image in blocks of 2048 and average each down to 64 pixels, keeping nothing."""
    from concurrent.futures import ThreadPoolExecutor

    from storage import TiffImage
    from storage.images.halving import downsample

    block = 2048
    with TiffImage(tiff) as image, ThreadPoolExecutor(workers) as pool:
        _, height, width = image.shape

        def work(corner: tuple[int, int]) -> None:
            y, x = corner
            pixels = image.read(y, x, min(block, height - y), min(block, width - x))
            while max(pixels.shape[1:]) > 64:
                pixels = downsample(pixels)

        started = time.perf_counter()
        list(pool.map(work, [(y, x) for y in range(0, height, block) for x in range(0, width, block)]))
        return time.perf_counter() - started


def nested_ats(tiff: Path, out: Path, workers: int) -> float:
    """Convert with this package."""
    import dask.threaded  # noqa: F401  imports are not timed, here and below

    import storage.images.raster  # noqa: F401
    from storage import convert

    return convert(tiff, out, workers=workers).seconds


def _lazy(tiff: Path, chunk: int) -> Any:
    """The (C, H, W) image as a Dask array that decodes when it is computed."""
    import dask.array as da
    import tifffile
    import zarr

    pixels = da.from_zarr(zarr.open(tifffile.imread(tiff, aszarr=True, level=0), mode="r"), chunks=(chunk, chunk, 3))
    return pixels.transpose(2, 0, 1)


def ngff_zarr(tiff: Path, out: Path, workers: int) -> float:
    """Convert with ngff-zarr."""
    import dask
    from ngff_zarr import Methods, to_multiscales, to_ngff_image, to_ngff_zarr
    from zarr.codecs import BloscCodec

    started = time.perf_counter()
    with dask.config.set(num_workers=workers):
        image = to_ngff_image(_lazy(tiff, TILE), dims=("c", "y", "x"), scale={"y": 0.25, "x": 0.25})
        levels = to_multiscales(
            image, [2, 4, 8, 16, 32], Methods.DASK_BIN_SHRINK, {"c": 3, "y": 256, "x": 256}, cache=False
        )
        codec = BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle")
        shards = {"c": 1, "y": 8, "x": 8}
        to_ngff_zarr(out, levels, version="0.5", use_tensorstore=True, chunks_per_shard=shards, compressors=[codec])
    return time.perf_counter() - started


def ome_zarr_py(tiff: Path, out: Path, workers: int) -> float:
    """Convert with ome-zarr-py."""
    import dask
    import zarr
    from ome_zarr.writer import write_image

    layout = {"chunks": (3, 256, 256), "shards": (3, 2048, 2048)}
    codec = {"compressors": [zarr.codecs.BloscCodec(cname="lz4", clevel=1)]}
    started = time.perf_counter()
    with dask.config.set(num_workers=workers):
        group = zarr.open_group(out, mode="w")
        write_image(_lazy(tiff, 2048), group, axes="cyx", storage_options=layout | codec)
    return time.perf_counter() - started


WAYS = {way.__name__: way for way in (decode, decode_and_average, nested_ats, ngff_zarr, ome_zarr_py)}
PEERS = ("ngff_zarr", "ome_zarr_py")


def write_alone(folder: Path, megabytes: float) -> float:
    """Seconds to write that much, in files of 8 MB flushed one by one."""
    data = os.urandom(8_000_000)
    started = time.perf_counter()
    for number in range(max(1, round(megabytes / 8))):
        with open(folder / f"disk-{number}", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    for path in folder.glob("disk-*"):
        path.unlink()
    return seconds


def measure(way: str, tiff: Path, folder: Path, workers: int) -> tuple[float, float, float]:
    """Seconds, peak memory in MB and MB stored of one run in a fresh process."""
    out = folder / "out.ome.zarr"
    command = [sys.executable, __file__, "--run", way, str(tiff), str(out), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    stored = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    shutil.rmtree(out, ignore_errors=True)
    return seconds, peak, stored


def compare(size: int, folder: Path, ways: list[str], workers: int, repeats: int) -> float:
    """Print one table and return this package's peak memory in MB."""
    tiff = folder / "slide.tif"
    make_slide(tiff, size)
    raw, source = size**2 * 3 / 1e6, tiff.stat().st_size / 1e6
    runs: dict[str, list[tuple[float, ...]]] = {way: [] for way in [*ways, "disk"]}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(measure(way, tiff, folder, workers))
        runs["disk"].append((write_alone(folder, runs["nested_ats"][-1][2]), 0.0, 0.0))
    table = {way: [statistics.median(part) for part in zip(*rows, strict=True)] for way, rows in runs.items()}
    own = table["nested_ats"][0]
    print(f"\n{size} x {size}: {raw:.0f} MB raw, {source:.0f} MB of JPEG tiles; medians of {repeats}")
    print(f"{'way':20}{'seconds':>9}{'MB/s raw':>10}{'nested_ats is':>15}{'peak MB':>9}{'stored MB':>11}")
    for way, (seconds, peak, stored) in table.items():
        print(f"{way:20}{seconds:9.2f}{raw / seconds:10.0f}{seconds / own:13.2f} x{peak:9.0f}{stored:11.0f}")
    stored = table["nested_ats"][2]
    print(f"stored: {stored / raw:.2f} of the raw pixels of level 0, {stored / source:.1f} times the JPEG source")
    tiff.unlink()
    return table["nested_ats"][1]


def main() -> None:
    """Run every way in turn, several times, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 24576])
    parser.add_argument("--workers", type=int, default=processors() + 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--run", nargs=3, metavar=("WAY", "TIFF", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        seconds = WAYS[args.run[0]](Path(args.run[1]), Path(args.run[2]), args.workers)
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))
        return
    packages = ("tifffile", "imagecodecs", "numcodecs", "dask", "zarr", "ngff-zarr", "ome-zarr")
    print(f"{platform.machine()}, {processors()} processors, {args.workers} workers")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    ways = [way for way in WAYS if not (args.no_peers and way in PEERS)]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        peaks = [compare(size, Path(name), ways, args.workers, args.repeats) for size in args.sizes]
    print(f"peak memory of nested_ats, largest against smallest size: {max(peaks) / min(peaks):.2f}")


if __name__ == "__main__":
    run_main(main)
