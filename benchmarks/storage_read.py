"""Random patches of a pyramid per second: our ``Slide`` against tensorstore and zarr-python, in one run.

All three read the same patches at level 0 of the same pyramid, in one process, page cache warm. ``Slide`` and
tensorstore are given batches of 32 (tensorstore: 32 reads in flight), zarr-python, which has no batches, one patch
at a time. Every reader's pixels are compared before it is timed.

    python benchmarks/storage_read.py [--size 8192] [--codec lz4] [--pyramid PATH]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from storage_convert import make_slide

from storage import ConvertOptions, Slide, convert

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Reader = Callable[[NDArray[np.int64]], NDArray[np.generic]]

BATCH = 32


def readers(path: Path) -> dict[str, Reader]:
    """Functions from (N, 4) boxes to (N, C, h, w) pixels of level 0."""
    import tensorstore
    import zarr

    slide = Slide(path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/0"}}
    store = tensorstore.open(spec).result()
    array = zarr.open_array(path / "0", mode="r")

    def with_tensorstore(boxes: NDArray[np.int64]) -> NDArray[np.generic]:
        reads = [store[:, y : y + h, x : x + w].read() for y, x, h, w in boxes.tolist()]
        return np.stack([read.result() for read in reads])

    def with_zarr(boxes: NDArray[np.int64]) -> NDArray[np.generic]:
        return np.stack([np.asarray(array[:, y : y + h, x : x + w]) for y, x, h, w in boxes.tolist()])

    return {"Slide": lambda boxes: slide.read_many(0, boxes), "tensorstore": with_tensorstore, "zarr": with_zarr}


def rates(path: Path, side: int, batches: int) -> dict[str, float]:
    """Median patches per second of each reader over batches of random boxes, readers taking turns."""
    rng = np.random.default_rng(0)
    with Slide(path) as slide:
        span = np.array(slide.shape_yx) - side
    size = np.full((BATCH, 2), side)
    boxes = [np.hstack([rng.integers(0, span, (BATCH, 2)), size]) for _ in range(batches)]
    ways = readers(path)
    expected = ways["Slide"](boxes[0])
    for name, read in ways.items():
        if not np.array_equal(read(boxes[0]), expected):
            raise RuntimeError(f"{name} reads other pixels")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for own in boxes:
        for name, read in ways.items():
            started = time.perf_counter()
            read(own)
            seconds[name].append(time.perf_counter() - started)
    return {name: BATCH / statistics.median(own) for name, own in seconds.items()}


def main() -> None:
    """Make a pyramid if none is given, and print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--codec", default="lz4")
    parser.add_argument("--chunk", type=int, default=ConvertOptions().chunk)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--pyramid", type=Path)
    args = parser.parse_args()
    packages = ("numcodecs", "tensorstore", "zarr", "numpy")
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as name:
        path = args.pyramid
        if path is None:
            path = Path(name, "slide.ome.zarr")
            make_slide(Path(name, "slide.tif"), args.size)
            convert(Path(name, "slide.tif"), path, options=ConvertOptions(codec=args.codec, chunk=args.chunk))
        print(f"{'patch':>6}{'reader':>13}{'patches/s':>11}{'Slide is':>10}")
        for side in (256, 50):
            found = rates(path, side, args.batches)
            for reader, rate in found.items():
                print(f"{side:6}{reader:>13}{rate:11.0f}{found['Slide'] / rate:9.1f}x")


if __name__ == "__main__":
    main()
