"""Conversion of a JPEG-tiled BigTIFF to an OME-Zarr pyramid: time and memory, each way in its own process.

Rows: decoding the JPEG tiles alone with tifffile on the same threads (the bound: no pyramid, nothing written), our
``storage.convert``, and ome-zarr-py's ``write_image`` with the same chunks, shards and codec, from an array already
in memory (its decoding is not timed). Throughput is of level 0's raw bytes; every row writes to --folder.

    python benchmarks/storage_convert.py [--size 8192] [--workers 2] [--repeats 3] [--folder /tmp]
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
from typing import TYPE_CHECKING

import numpy as np

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


def decode_only(tiff: Path, _out: Path, workers: int) -> float:
    """Decode every tile with tifffile and drop it."""
    import tifffile

    started = time.perf_counter()
    with tifffile.TiffFile(tiff) as tif:
        for _ in tif.pages[0].segments(maxworkers=workers):
            pass
    return time.perf_counter() - started


def nested_ats(tiff: Path, out: Path, workers: int) -> float:
    """Convert with this package."""
    import dask.threaded  # noqa: F401  imports are not timed, here and below

    from storage import convert

    return convert(tiff, out, workers=workers).seconds


def ome_zarr_py(tiff: Path, out: Path, workers: int) -> float:
    """Write with ome-zarr-py from memory."""
    import dask
    import dask.array as da
    import tifffile
    import zarr
    from ome_zarr.writer import write_image

    pixels = da.from_array(tifffile.imread(tiff).transpose(2, 0, 1), chunks=(3, 2048, 2048))
    layout = {"chunks": (3, 128, 128), "shards": (3, 2048, 2048)}
    codec = {"compressors": [zarr.codecs.BloscCodec(cname="lz4", clevel=5)]}
    started = time.perf_counter()
    with dask.config.set(num_workers=workers):
        write_image(pixels, zarr.open_group(out, mode="w"), axes="cyx", storage_options=layout | codec)
    return time.perf_counter() - started


WAYS = {way.__name__: way for way in (decode_only, nested_ats, ome_zarr_py)}


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


def main() -> None:
    """Run every way in turn, several times, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--run", nargs=3, metavar=("WAY", "TIFF", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        seconds = WAYS[args.run[0]](Path(args.run[1]), Path(args.run[2]), args.workers)
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))
        return
    packages = ("tifffile", "imagecodecs", "numcodecs", "dask", "zarr", "ome-zarr")
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, {args.workers} workers")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_slide(folder / "slide.tif", args.size)
        raw = args.size**2 * 3 / 1e6
        print(
            f"{args.size} x {args.size}: {raw:.0f} MB raw, {(folder / 'slide.tif').stat().st_size / 1e6:.0f} MB JPEG"
        )
        runs = [
            [measure(way, folder / "slide.tif", folder, args.workers) for way in WAYS] for _ in range(args.repeats)
        ]
    medians = [[statistics.median(part) for part in zip(*rows, strict=True)] for rows in zip(*runs, strict=True)]
    bound = medians[0][0]
    print(f"{'way':14}{'seconds':>9}{'MB/s raw':>10}{'of bound':>10}{'peak MB':>9}{'stored MB':>11}")
    for way, (seconds, peak, stored) in zip(WAYS, medians, strict=True):
        print(f"{way:14}{seconds:9.2f}{raw / seconds:10.0f}{bound / seconds:10.2f}{peak:9.0f}{stored:11.0f}")
    print(f"nested_ats is {medians[2][0] / medians[1][0]:.1f} times as fast as ome_zarr_py")


if __name__ == "__main__":
    main()
