"""Scenes with and without ships: what a folder of satellite scenes looks like, made from nothing.

Each scene has four bands of reflectance (times 10,000, in 16 bits) at 10 m a pixel: a coast between sea and land, and a
corner that was never recorded (nodata). Scenes of harbours have some ships, bright bars of about 250 m, on the sea;
the others have as many small islands of the same brightness and area. Scenes lie 20 km from each other in UTM zone 32.

    python examples/port_scenes.py --out scenes [--count 60] [--size 1536] [--seed 0]

writes ``scenes/*.tif`` and ``scenes/labels.csv`` (slide_id, path, label). It needs the extras ``geo`` and ``examples``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from rasterio.transform import from_origin
from scipy import ndimage

from pipeline.interrupt import run_main

if TYPE_CHECKING:
    from numpy.typing import NDArray

BANDS = ("B02", "B03", "B04", "B08")
SEA, LAND = np.array([700, 550, 350, 150]), np.array([700, 950, 1000, 2800])
BRIGHT = np.array([2600, 2700, 2800, 2900])
METRES, APART = 10, 20_000  # of a pixel; from one scene to the next
REACH = 20  # pixels around the middle of a ship


def make_scene(seed: int, number: int, size: int, *, harbour: bool) -> NDArray[np.uint16]:
    """Draw a scene (4, size, size); 0 is where nothing was recorded."""
    rng = np.random.default_rng([seed, number])
    rough = ndimage.zoom(rng.normal(size=(12, 12)), size / 12, order=3)[:size, :size]
    slope = np.linspace(-1.5, 1.5, size)[:, None] * rng.choice([-1, 1])
    land = rough + slope > rng.uniform(0, 0.6)
    bright = np.zeros((size, size), bool)
    open_sea = np.argwhere(ndimage.distance_transform_edt(~land)[REACH:-REACH, REACH:-REACH] > REACH)
    dy, dx = np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]
    for top, left in rng.permutation(open_sea)[: rng.integers(4, 9)]:
        angle = rng.uniform(0, np.pi)
        along, across = dy * np.sin(angle) + dx * np.cos(angle), dy * np.cos(angle) - dx * np.sin(angle)
        shape = (abs(along) < 13) & (abs(across) < 3.5) if harbour else np.hypot(dy, dx) < 5.4
        bright[top : top + len(dy), left : left + len(dx)] |= shape
    values = np.where(land[..., None], LAND, SEA) * rng.uniform(0.8, 1.2)
    values[bright] = BRIGHT
    values = values * (1 + 0.1 * rough[..., None]) + 40 * rng.standard_normal((size, size, len(BANDS)), np.float32)
    pixels: NDArray[np.uint16] = np.moveaxis(values.clip(1, 10_000), -1, 0).astype(np.uint16)
    pixels[:, np.add.outer(np.arange(size), np.arange(size)) < size * rng.uniform(0.1, 0.4)] = 0
    return pixels


def write_scene(path: Path, pixels: NDArray[np.uint16], number: int) -> None:
    """Write a tiled GeoTIFF with names of bands, nodata and a place on the Earth."""
    side = pixels.shape[-1]
    row, column = divmod(number, 8)
    place = from_origin(400_000 + column * APART, 5_900_000 - row * APART, METRES, METRES)
    about = {"count": len(BANDS), "width": side, "height": side, "dtype": "uint16", "nodata": 0}
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32632", transform=place, **about, **tiles) as file:
        file.write(pixels)
        file.descriptions = BANDS


def main() -> None:
    """Make the scenes and the table of their labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--size", type=int, default=1536, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["slide_id", "path", "label"])
        for number in range(chosen.count):
            harbour = number % 2 == 1
            path = chosen.out / f"scene-{number:02d}.tif"
            write_scene(path, make_scene(chosen.seed, number, chosen.size, harbour=harbour), number)
            table.writerow([path.stem, path.name, "harbour" if harbour else "none"])
    print(f"{chosen.count} scenes in {chosen.out}")


if __name__ == "__main__":
    run_main(main, "interrupted; run it again to make all scenes")
