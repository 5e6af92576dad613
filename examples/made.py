"""Small data in the layouts of the published sets, so that `--quick` runs the loaders too; nothing is downloaded.

Neither is the published data nor as hard: tissue is blobs that have the sizes and colours of stained cells, and the
street is the textured plane of `pipeline.data.signs`. What they share with it is where the answer lies: in
details of a few pixels, at few places.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
from example_data.published import ANNOTATIONS
from numpy.typing import NDArray
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

from pipeline.data.signs import SignScene, sign_scene

CELLS_PER_MEGAPIXEL = 400  # besides those of glands
GLAND_PITCH = 125  # pixels: glands lie on a jittered grid, two of three places hold one
GLAND_CELLS = 12
STREETS = ("none", "50", "none", "70", "none", "80")  # labels of images in turn; the paper's too are half "none"
NAMES = {"50": "50_SIGN", "70": "70_SIGN", "80": "80_SIGN"}


class Nucleus(NamedTuple):
    """What a kind of cell looks like: an ellipse, in pixels."""

    long: float  # half axes
    short: float
    rgb: tuple[int, int, int]
    rim: float = 0.0  # how much darker its edge is, and a spot within


EPITHELIAL = Nucleus(8.5, 6.5, (150, 115, 190), rim=0.55)
OTHERS = (
    Nucleus(10, 2.5, (110, 75, 150)),  # fibroblasts
    Nucleus(4.5, 4.5, (70, 45, 120)),  # inflammatory cells
    Nucleus(8.5, 6.5, (150, 115, 190)),  # of the size and colour of epithelial ones, without their structure
)


def write_colon_cancer(folder: Path, *, images: int, side: int = 500, seed: int = 0) -> Path:
    """Write ``imgN/imgN.bmp`` and ``imgN/imgN_epithelial.mat``, every other image with epithelial cells.

    Returns
    -------
    The folder, for `example_data.published.colon_cancer`.
    """
    for number in range(1, images + 1):
        rng = np.random.default_rng([seed, number])
        pixels, points = _tissue(rng, side, epithelial=number % 2 == 1)
        place = folder / f"img{number}"
        place.mkdir(parents=True, exist_ok=True)
        _write(place / f"img{number}.bmp", imagecodecs.bmp_encode(pixels))
        # MATLAB counts from 1, and gives x first.
        detection = points[:, ::-1] + 1 if len(points) else np.empty((0, 0))
        savemat(place / f"img{number}_epithelial.mat", {"detection": detection})
    return folder


def _tissue(
    rng: np.random.Generator, side: int, *, epithelial: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """(side, side, 3) pixels of stained tissue, and (cells, 2) centres of its epithelial cells, y and x.

    Rings of cells lie in every image; the cells of every other ring are epithelial where `epithelial` says so.
    """
    noise = np.stack([gaussian_filter(rng.standard_normal((side, side)), s) * s for s in (1.0, 6.0, 30.0)])
    canvas = np.array([226.0, 184, 208]) + noise.sum(0)[..., None] * np.array([10.0, 14, 9])
    for _ in range(round(CELLS_PER_MEGAPIXEL * side * side / 1e6)):
        _draw(canvas, rng, rng.uniform(0, side, 2), OTHERS[rng.integers(len(OTHERS))])
    points = [np.empty((0, 2))]
    for number, middle in enumerate(_gland_places(rng, side)):
        found = epithelial and number % 2 == 0
        centers = _ring(rng, middle)
        _stain(canvas, middle)
        for center in centers:
            _draw(canvas, rng, center, EPITHELIAL if found else OTHERS[2])
        points += [centers] if found else []
    return np.clip(canvas, 0, 255).astype(np.uint8), np.concatenate(points)


def _gland_places(rng: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Centres of glands, (glands, 2), in no order."""
    places = np.indices((side // GLAND_PITCH,) * 2).reshape(2, -1).T * GLAND_PITCH + GLAND_PITCH / 2
    chosen = rng.permutation(places)[: -(-2 * len(places) // 3)]
    return chosen + rng.uniform(-12, 12, chosen.shape)


def _ring(rng: np.random.Generator, middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centres of the cells of a gland, (cells, 2)."""
    angles = np.arange(GLAND_CELLS) * 2 * np.pi / GLAND_CELLS + rng.uniform(0, 7)
    circle = np.stack([np.sin(angles), np.cos(angles)], -1)
    return middle + rng.uniform(32, 40) * circle + rng.normal(0, 1.5, (GLAND_CELLS, 2))


def _stain(canvas: NDArray[np.float64], middle: NDArray[np.float64]) -> None:
    """Darken the ring's cytoplasm."""
    y, x = np.ogrid[: len(canvas), : canvas.shape[1]]
    distance = np.hypot(y - middle[0], x - middle[1])
    ring = np.exp(-(((distance - 36) / 12) ** 2))[..., None]
    canvas -= ring * np.array([18.0, 38, 14])


def _draw(canvas: NDArray[np.float64], rng: np.random.Generator, center: NDArray[np.float64], kind: Nucleus) -> None:
    """Blend a nucleus into the canvas, turned and scaled at random."""
    angle, size = rng.uniform(0, np.pi), rng.uniform(0.85, 1.15)
    reach = int(kind.long * size) + 3
    top, left = (max(int(c) - reach, 0) for c in center)
    part = canvas[top : int(center[0]) + reach, left : int(center[1]) + reach]
    y, x = (
        axis - c for axis, c in zip(np.ogrid[: part.shape[0], : part.shape[1]], center - (top, left), strict=True)
    )
    along, across = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
    radius = np.hypot(along / (kind.long * size), across / (kind.short * size))
    spot = np.hypot(along - 2, across) < 2
    shade = 1 - kind.rim * np.maximum(np.exp(-(((radius - 0.85) / 0.2) ** 2)), spot)
    colour = np.array(kind.rgb) * shade[..., None]
    coverage = np.clip((1 - radius) * kind.short + 0.5, 0, 1)[..., None]
    part += coverage * (colour * rng.uniform(0.9, 1.1) - part)


def write_traffic_signs(
    folder: Path, *, train: int, test: int, size_yx: tuple[int, int] = (960, 1280), signs: int = 2, seed: int = 0
) -> Path:
    """Write ``Set1`` and ``Set2``, each with JPEGs and ``annotations.txt``: `signs` scenes for speed limits.

    Returns
    -------
    The folder, for `example_data.published.traffic_signs`.
    """
    for first, (name, count) in zip((0, train), {"Set1": train, "Set2": test}.items(), strict=True):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            label = STREETS[index % len(STREETS)]
            scene = sign_scene(first + index, seed=seed, size_yx=size_yx, label=label, signs=signs)
            file = f"Image{index:06d}.jpg"
            _write(place / file, imagecodecs.jpeg8_encode(scene.render(0, 0, *size_yx), level=95))
            lines.append(f"{file}:{_annotation(scene)}\n")
        (place / ANNOTATIONS).write_text("".join(lines))
    return folder


def _annotation(scene: SignScene) -> str:
    """What stands behind a scene's name: distractors are signs that nobody named."""
    boxes = [
        f"VISIBLE, {d.x + d.radius + 0.5:f}, {d.y + d.radius + 0.5:f}, {d.x - d.radius - 0.5:f}, "
        f"{d.y - d.radius - 0.5:f}, PROHIBITORY, {NAMES[scene.label]};"
        for d in scene.signs
    ]
    return "".join([*boxes, *(["MISC_SIGNS;"] if len(scene.discs) > len(scene.signs) else [])])


def _write(path: Path, data: bytes | bytearray) -> None:
    """Write a file, unless it is there as it should be: a newer one would have to be converted again."""
    if not path.is_file() or path.read_bytes() != data:
        path.write_bytes(data)
