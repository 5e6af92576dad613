"""Random patches of a slide where it lies, against OpenSlide, tiffslide, rasterio and a pyramid made of it.

The slide is a JPEG SVS of tiles of 256 pixels, as scanners write it: real H&E tissue where --tissue names an SVS,
else noise on a ramp. It is larger than what the readers keep of it. Patches are drawn anew each round, the same for
all; readers take turns, each thread has a share of the patches, and all readers are opened once, before. "tiles" is
what decoding the touched tiles alone allows, with as many threads: it reads and decodes them and does nothing else.

Then the same of a scene, a cloud-optimised GeoTIFF (COG) that GDAL makes of the slide, with a smaller --cog, through
rasterio (one dataset a thread, as GDAL asks for, and GDAL's cache as small as OpenSlide's) and in place.

From a loopback server that waits before it answers, those take part that read by ranges: tiffslide by fsspec,
rasterio by GDAL's /vsicurl/, and ours; OpenSlide does not. The server counts requests and bytes, alike for all.
Files must be larger than the 5 MB that fsspec and the 16 MB that GDAL hold of what they fetched.

    python benchmarks/slides_in_place.py [--size 32768] [--patches 256] [--rounds 5] [--cog 8192] [--latency 20]
        [--tissue FILE] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import openslide
import rasterio
import tifffile
import tiffslide
from rasterio.windows import Window
from training_step import counted, serving

from pipeline.interrupt import run_main
from storage import Slide, TiffImage, convert, processors
from storage.place.files import RandomFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Boxes = NDArray[np.int64]
    Reader = Callable[[Boxes], object]

TILE, PATCH, QUALITY = 256, 256, 80
SCALES = (1, 4, 16)  # of the levels that the SVS stores
PEERS = ("OpenSlide", "tiles", "tiffslide", "COG, rasterio")  # of whose rates those of others are shown as shares
MOST_DIFFERENT = 4  # in the mean, on noise: decoders of JPEG enlarge halved colours in two ways
os.environ["GDAL_CACHEMAX"] = "32"  # megabytes, read at GDAL's first use of its cache
DESCRIPTION = (
    "Aperio Image Library v12\n{side}x{side} [0,0 {side}x{side}] (256x256) JPEG/RGB Q=80|AppMag = 40|MPP = 0.25"
)


def write_svs(path: Path, side: int, tissue: Path | None, glass: float = 0) -> None:
    """Write a slide of (side, side) pixels and two coarser levels, of a few hundred different tiles.

    `glass` is the share of the side that is glass at each border, 0 to 0.5.
    """
    rng = np.random.default_rng(0)
    if tissue:
        whole = tifffile.imread(tissue)
        corners = [(y, x) for y in range(0, whole.shape[0] - TILE, 128) for x in range(0, whole.shape[1] - TILE, 128)]
        tiles = [whole[y : y + TILE, x : x + TILE] for y, x in corners]
    else:
        ramp = np.add.outer(np.arange(TILE), np.arange(TILE))[..., None] // 3
        tiles = [(ramp + rng.integers(0, 80, (TILE, TILE, 3))).clip(0, 255).astype(np.uint8) for _ in range(200)]
    empty, *encoded = (
        bytes(imagecodecs.jpeg_encode(tile, level=QUALITY, subsampling="444"))
        for tile in (np.full((TILE, TILE, 3), 243, np.uint8), *tiles)
    )

    def drawn(count: int) -> Iterator[bytes]:
        inside = range(int(count * glass), count - int(count * glass))
        for row, column in product(range(count), repeat=2):
            yield encoded[rng.integers(len(encoded))] if row in inside and column in inside else empty

    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for scale in SCALES:
            tif.write(
                drawn(side // scale // TILE),
                shape=(side // scale, side // scale, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(1, 1),
                compression="jpeg",
                description=DESCRIPTION.format(side=side) if scale == 1 else "Aperio Image Library v12",
                metadata=None,
            )
            if scale == 1:  # an SVS has a thumbnail in the second place
                tif.write(tiles[0], rowsperstrip=16, photometric="rgb", metadata=None, description="Aperio thumbnail")


def draw(side: int, count: int, seed: int) -> Boxes:
    """(count, 4) boxes of random patches."""
    starts = np.random.default_rng(seed).integers(0, side - PATCH, (count, 2))
    return np.concatenate([starts, np.full((count, 2), PATCH)], 1)


def shared(read: Reader, boxes: Boxes, threads: int) -> float:
    """Patches a second, each thread with its share."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, np.array_split(boxes, threads)))
    return len(boxes) / (time.perf_counter() - started)


def local_readers(svs: Path, pyramid: Path) -> Iterator[tuple[str, Reader]]:
    """Name each reader of files, and open it."""
    slide, image, file = Slide(svs), TiffImage(svs), RandomFile(svs)
    theirs, other = openslide.OpenSlide(svs), tiffslide.TiffSlide(svs)

    def tiles(boxes: Boxes) -> None:
        [plane] = image.planes
        for y, x, h, w in boxes.tolist():
            rows, columns = range(y // TILE, (y + h - 1) // TILE + 1), range(x // TILE, (x + w - 1) // TILE + 1)
            touched = [row * image.columns + column for row in rows for column in columns]
            for data in file.read_ranges([(int(plane.offsets[i]), int(plane.counts[i])) for i in touched]):
                imagecodecs.jpeg_decode(data)

    yield "tiles", tiles
    yield "in place", lambda boxes: [slide.read(0, box) for box in boxes.tolist()]
    yield "in place, a batch", lambda boxes: slide.read_many(0, boxes)
    yield (
        "OpenSlide",
        lambda boxes: [np.asarray(theirs.read_region((x, y), 0, (w, h)))[..., :3] for y, x, h, w in boxes.tolist()],
    )
    yield (
        "tiffslide",
        lambda boxes: [other.read_region((x, y), 0, (w, h), as_array=True) for y, x, h, w in boxes.tolist()],
    )
    made = Slide(pyramid)
    yield "pyramid", lambda boxes: [made.read(0, box) for box in boxes.tolist()]


def write_cog(cog: Path, folder: Path, args: argparse.Namespace) -> None:
    """Write a scene as GDAL writes it, of the same JPEG tiles without their coarser levels."""
    slide = folder / "scene.svs"
    write_svs(slide, args.cog, args.tissue)
    with Slide(slide) as image:
        pixels = image.read(0, (0, 0, args.cog, args.cog))
    shape = {"count": 3, "height": args.cog, "width": args.cog, "dtype": "uint8"}
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    coded = {"compress": "jpeg", "quality": QUALITY, "blocksize": TILE, "overviews": "none"}
    with rasterio.open(cog, "w", driver="COG", **shape, **place, **coded) as out:
        out.write(pixels)


def remote_readers(url: str) -> Iterator[tuple[str, Reader]]:
    """Name each reader of what a server has, and open it."""
    slide, made = Slide(f"{url}/slide.svs"), Slide(f"{url}/slide.ome.zarr")
    other = tiffslide.TiffSlide(f"{url}/slide.svs")
    yield "in place", lambda boxes: [slide.read(0, box) for box in boxes.tolist()]
    yield "in place, a batch", lambda boxes: slide.read_many(0, boxes)
    yield (
        "tiffslide",
        lambda boxes: [other.read_region((x, y), 0, (w, h), as_array=True) for y, x, h, w in boxes.tolist()],
    )
    yield "pyramid", lambda boxes: [made.read(0, box) for box in boxes.tolist()]
    yield "pyramid, a batch", lambda boxes: made.read_many(0, boxes)


def scene_readers(cog: Path | str) -> Iterator[tuple[str, Reader]]:
    """Name each reader of a COG, in a file or at a URL, and open it."""
    slide, opened = Slide(cog), threading.local()

    def gdal(boxes: Boxes) -> None:
        if not hasattr(opened, "image"):
            opened.image = rasterio.open(cog)
        for y, x, h, w in boxes.tolist():
            opened.image.read(window=Window(x, y, w, h))

    y, x, h, w = check = draw(slide.shape_yx[0], 1, 0)[0].tolist()
    with rasterio.open(cog) as image:
        difference = np.abs(image.read(window=Window(x, y, w, h)).astype(int) - slide.read(0, check)).mean()
    if difference > MOST_DIFFERENT:
        raise SystemExit(f"rasterio and the reader in place see pixels that differ by {difference:.1f}")
    yield "COG, rasterio", gdal
    yield "COG, in place", lambda boxes: [slide.read(0, box) for box in boxes.tolist()]
    yield "COG, a batch", lambda boxes: slide.read_many(0, boxes)


def compare(
    readers: dict[str, Reader], side: int, args: argparse.Namespace, where: str, url: str = ""
) -> list[dict[str, Any]]:
    """Print the median of each reader, its share of OpenSlide's, and what it asks of a server; return all."""
    lines = []
    for threads in args.threads:
        found: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(args.rounds):
            boxes = draw(side, args.patches, number)
            for name, read in readers.items():
                found[name].append(shared(read, boxes, threads))
        medians = {name: statistics.median(rates) for name, rates in found.items()}
        for name, rate in medians.items():
            of = {peer: rate / medians[peer] for peer in PEERS if peer in medians}
            asked = cost(readers[name], url, draw(side, args.patches, args.rounds + threads)) if url else {}
            print(
                f"{where:>8}{threads:8}  {name:18}{rate:9.0f}"
                + "".join(f"{share:11.2f}" for share in of.values())
                + "".join(f"  {value:.4g} {what.replace('_', ' ')}" for what, value in asked.items()),
                flush=True,
            )
            line = {"where": where, "threads": threads, "reader": name, "patches_per_second": rate, "of": of}
            lines.append(line | asked)
    return lines


def cost(read: Reader, url: str, boxes: Boxes) -> dict[str, float]:
    """What a reader asks of the server for a patch, as the server counts it."""
    before = counted(url)
    read(boxes)
    requests, nbytes = np.subtract(counted(url), before) / len(boxes)
    return {"requests_per_patch": float(requests), "kilobytes_per_patch": float(nbytes) / 1e3}


def main() -> None:
    """Write the slide and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32768, help="side of the slide, pixels; a multiple of 4096")
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cog", type=int, default=8192, help="side of the scene, pixels; a multiple of 4096")
    parser.add_argument("--latency", type=float, default=20, help="of the server, milliseconds")
    parser.add_argument("--tissue", type=Path, help="an SVS whose tissue the slide is made of")
    parser.add_argument("--json", type=Path, help="file to write what was found to")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--quick", action="store_true", help="see that it works: a small slide, few patches")
    args = parser.parse_args()
    if args.quick:
        args.size, args.patches, args.rounds, args.cog = 4096, 16, 1, 4096
    about = {
        "machine": f"{platform.machine()}, {processors()} processors",
        "versions": {
            name: version(name)
            for name in ("tifffile", "imagecodecs", "numpy", "openslide-python", "tiffslide", "rasterio")
        }
        | {"openslide": openslide.__library_version__, "gdal": rasterio.__gdal_version__},
        "size": args.size,
        "patches": args.patches,
    }
    print(", ".join([about["machine"], *(f"{name} {v}" for name, v in about["versions"].items())]))
    print(
        f"{args.patches} patches of {PATCH} x {PATCH}, JPEG SVS of {args.size} x {args.size}, median of {args.rounds}"
    )
    print(f"{'where':>8}{'threads':>8}  {'reader':18}{'a second':>9}{'OpenSlide':>11}{'tiles':>11}{'tiffslide':>11}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        svs, pyramid = Path(name, "slide.svs"), Path(name, "slide.ome.zarr")
        write_svs(svs, args.size, args.tissue)
        convert(svs, pyramid)
        lines = compare(dict(local_readers(svs, pyramid)), args.size, args, "disk")
        write_cog(Path(name, "scene.tif"), Path(name), args)
        print(f"a COG of {args.cog} x {args.cog}, of which the last column is a share of rasterio's")
        lines += compare(dict(scene_readers(Path(name, "scene.tif"))), args.cog, args, "disk")
        waits = f"{args.latency:g} ms"
        print("from a server: the slide in shares of tiffslide's, the COG of rasterio's")
        with serving(Path(name), args.latency / 1e3) as url:
            lines += compare(dict(remote_readers(url)), args.size, args, waits, url)
            lines += compare(dict(scene_readers(f"{url}/scene.tif")), args.cog, args, waits, url)
        bytes_ = sum(file.stat().st_size for file in pyramid.rglob("*") if file.is_file())
        print(f"file {svs.stat().st_size / 1e6:.0f} MB, pyramid {bytes_ / 1e6:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps({**about, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
