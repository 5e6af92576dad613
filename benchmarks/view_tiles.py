"""How soon the viewer has a screen of tiles, against OpenSlide's DeepZoomGenerator, and what many clients take.

The slide has ten gigapixels: a JPEG SVS as scanners write it, of real H&E tissue where --tissue names an SVS, else of
noise on a ramp, in the middle quarter of its area, and glass around it; and the pyramid made of it. Its coarse levels
show other tissue than its fine ones, which costs the same.

"HTTP": `nested-ats view` in a process of its own is asked by a client with six connections, as a browser has, for the
64 tiles of 256 x 256 of a screen at a place that nobody has looked at before. "made": the same tiles are made in this
process, without a server, by as many threads as there are processors, and so does DeepZoomGenerator, with the same
JPEG encoder at the same quality. Readers take turns. Halving 0 is the finest level, 1 is not stored in the SVS, and 2
is stored in both.

Then clients scroll at once, each by a screen of tiles after another, and give up a third of what they have asked for;
the server's resident memory is looked at meanwhile.

    python benchmarks/view_tiles.py [--size 102400] [--rounds 7] [--clients 20] [--seconds 20] [--tissue FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import openslide
import psutil
from openslide.deepzoom import DeepZoomGenerator
from slides_in_place import TILE, write_svs

from pipeline.interrupt import run_main
from pipeline.view import paint, tiles
from storage import Slide, convert, processors

SCREEN, QUALITY = 8, 90
CONNECTIONS = 6  # of a browser, to one server
HALVINGS = (0, 1, 2)
GIVEN_UP = 1 / 3

Place = tuple[int, int, int]  # halvings, row and column of a tile


def screens(side: int, halvings: int, count: int, seed: int) -> list[list[Place]]:
    """Places of screens within the tissue, none of which shares a tile with another."""
    across = side // 2**halvings // TILE
    first, last = across // 4, across - across // 4
    corners = [
        (y, x) for y in range(first, last - SCREEN + 1, SCREEN) for x in range(first, last - SCREEN + 1, SCREEN)
    ]
    if count > len(corners):
        raise SystemExit(f"{side} pixels a side have {len(corners)} screens at halving {halvings}, not {count}")
    chosen = random.Random(seed).sample(corners, count)
    return [[(halvings, y + i, x + j) for i in range(SCREEN) for j in range(SCREEN)] for y, x in chosen]


def makers(svs: Path, pyramid: Path) -> dict[str, Callable[[Place], object]]:
    """Each way to make a tile in this process, by name."""
    ways: dict[str, Callable[[Place], object]] = {}
    for name, path in (("pyramid", pyramid), ("in place", svs)):
        slide = Slide(path)
        how = paint.painter(slide, paint.default_look(slide, paint.find_ranges(slide)))

        def own(place: Place, slide: Slide = slide, how: tiles.Paint = how) -> object:
            return paint.encode(tiles.draw_tile(slide, tiles.Tile(*place), how, lambda: None))

        ways[f"{name}, made"] = own
    theirs = DeepZoomGenerator(openslide.OpenSlide(svs), tile_size=TILE, overlap=0)

    def deep_zoom(place: Place) -> object:
        halvings, row, column = place
        buffer = io.BytesIO()
        tile = theirs.get_tile(theirs.level_count - 1 - halvings, (column, row))
        tile.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
        return buffer.getvalue()

    ways["DeepZoomGenerator, made"] = deep_zoom
    return ways


@contextmanager
def serving(*slides: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`nested-ats view` in a process of its own: its address and the process."""
    command = [sys.executable, "-m", "pipeline.cli", "view", *map(str, slides), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


async def fetch(session: aiohttp.ClientSession, url: str, number: int, screen: list[Place]) -> int:
    """Get a screen of tiles, and return their bytes."""

    async def one(place: Place) -> int:
        halvings, row, column = place
        async with session.get(f"{url}slides/{number}/tiles/{halvings}/{row}_{column}") as answer:
            answer.raise_for_status()
            return len(await answer.read())

    return sum(await asyncio.gather(*map(one, screen)))


def browser() -> aiohttp.ClientSession:
    """A client with as many connections as a browser."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS))


async def time_http(url: str, number: int, screen: list[Place]) -> float:
    """Seconds until a screen is there."""
    async with browser() as session:
        started = time.perf_counter()
        await fetch(session, url, number, screen)
        return time.perf_counter() - started


def time_made(make: Callable[[Place], object], screen: list[Place]) -> float:
    """Seconds until a screen is made, in threads."""
    started = time.perf_counter()
    with ThreadPoolExecutor(processors()) as pool:
        list(pool.map(make, screen))
    return time.perf_counter() - started


def compare(url: str, svs: Path, pyramid: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print how long a screen takes, in every way at every zoom, and return all."""
    ways = makers(svs, pyramid)
    lines = []
    for halvings in HALVINGS:
        found: dict[str, list[float]] = {}
        # Each way has screens of its own, so that none finds what another has just brought from the disk.
        names = ["pyramid, HTTP", "in place, HTTP", *ways]
        drawn = screens(args.size, halvings, args.rounds * len(names), halvings)
        for i, screen in enumerate(drawn):
            name = names[i % len(names)]
            if name in ways:
                seconds = time_made(ways[name], screen)
            else:
                seconds = asyncio.run(time_http(url, names.index(name), screen))
            found.setdefault(name, []).append(seconds)
        peer = statistics.median(found["DeepZoomGenerator, made"])
        for name, times in found.items():
            median = statistics.median(times)
            print(
                f"{halvings:8}  {name:24}{median * 1e3:9.0f}{max(times) * 1e3:9.0f}{peer / median:9.2f}", flush=True
            )
            lines.append({"halvings": halvings, "way": name, "seconds": times, "of_deep_zoom": peer / median})
    return lines


async def scroll(url: str, number: int, side: int, seed: int, until: float) -> int:
    """Look at one screen after another, and give some up; return how many tiles came."""
    choose, came = random.Random(seed), 0
    async with browser() as session:
        while time.monotonic() < until:
            halvings = choose.choice(HALVINGS)
            [screen] = screens(side, halvings, 1, choose.randrange(2**30))
            patience = choose.uniform(0, 0.2) if choose.random() < GIVEN_UP else None
            with suppress(TimeoutError):
                await asyncio.wait_for(fetch(session, url, number, screen), patience)
                came += len(screen)
    return came


async def crowd(url: str, args: argparse.Namespace) -> int:
    """Let many clients scroll at once."""
    until = time.monotonic() + args.seconds
    came = await asyncio.gather(*(scroll(url, i % 2, args.size, i, until) for i in range(args.clients)))
    return sum(came)


def memory_of(url: str, process: psutil.Process, args: argparse.Namespace) -> dict[str, Any]:
    """Print the server's memory while many clients scroll."""
    seen, ended = [process.memory_info().rss], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            seen.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    came = asyncio.run(crowd(url, args))
    ended.set()
    watching.join()
    second_half = seen[len(seen) // 2 :]
    about = {
        "clients": args.clients,
        "tiles_a_second": came / args.seconds,
        "before_mb": seen[0] / 1e6,
        "peak_mb": max(seen) / 1e6,
        "grown_in_second_half_mb": (max(second_half) - max(seen[: len(seen) // 2])) / 1e6,
    }
    print(
        f"{args.clients} clients for {args.seconds:g} s: {about['tiles_a_second']:.0f} tiles a second came; the "
        f"server held {about['before_mb']:.0f} MB before, {about['peak_mb']:.0f} at most, and the peak of the second "
        f"half was {about['grown_in_second_half_mb']:+.0f} MB beside that of the first",
        flush=True,
    )
    return about


def main() -> None:
    """Write the slide, and print the table and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=102400, help="side of the slide, pixels; a multiple of 4096")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20, help="that the clients scroll, twice")
    parser.add_argument("--tissue", type=Path, help="an SVS whose tissue the slide is made of")
    parser.add_argument("--json", type=Path, help="file to write what was found to")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    names = ("starlette", "uvicorn", "pillow", "numpy", "imagecodecs", "openslide-python")
    about: dict[str, Any] = {
        "machine": f"{platform.machine()}, {processors()} processors",
        "versions": {name: version(name) for name in names} | {"openslide": openslide.__library_version__},
        "size": args.size,
    }
    print(", ".join([about["machine"], *(f"{name} {each}" for name, each in about["versions"].items())]))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        svs, pyramid = Path(folder, "slide.svs"), Path(folder, "pyramid.ome.zarr")
        write_svs(svs, args.size, args.tissue, glass=1 / 4)
        convert(svs, pyramid)
        size = sum(file.stat().st_size for file in pyramid.rglob("*") if file.is_file())
        print(
            f"{args.size**2 / 1e9:.1f} gigapixels: SVS {svs.stat().st_size / 1e9:.2f} GB, pyramid {size / 1e9:.1f} GB"
        )
        with serving(pyramid, svs) as (url, process):
            print("milliseconds; times as long as each takes DeepZoomGenerator")
            print(f"{'halvings':>8}  {'64 tiles':24}{'median':>9}{'worst':>9}{'times':>9}")
            about["lines"] = compare(url, svs, pyramid, args)
        with serving(pyramid, svs) as (url, process):
            about["crowd"] = memory_of(url, process, args)
    if args.json:
        args.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
