"""Sixty slides with planted nests: what a user's own folder looks like, made of one real slide.

Each slide has 4096 x 4096 pixels: a piece of real H&E tissue, turned, mirrored and stained anew, on glass, with strokes
of ink. Positive slides have two to five nests, pale discs of 60 to 110 pixels radius in which nuclei lie crowded.
Negative ones have half as many such nuclei, scattered over the tissue one by one: what colours a slide has hardly tells
its label, as the last line that is printed shows.

    python examples/sixty_slides.py --svs CMU-1-Small-Region.svs --out slides [--count 60] [--size 4096] [--seed 0]

writes ``slides/*.tif`` and ``slides/labels.csv`` (slide_id, path, label, fold), ready for ``nested-ats convert``.
"""

from __future__ import annotations

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from scipy import ndimage

from pipeline.interrupt import run_main
from pipeline.progress import progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEMATOXYLIN = np.array([0.65, 0.70, 0.29])  # optical density by channel (Ruifrok and Johnston 2001)
EOSIN = np.array([0.40, 0.80, 0.40])
INKS = np.array([[0.10, 0.15, 0.45], [0.05, 0.30, 0.15], [0.12, 0.12, 0.14]])
FOLDS = 3


@dataclass(frozen=True)
class Recipe:
    """What a slide is made of: its number, its label, the seed of all, and how many quarters have tissue."""

    number: int
    positive: bool
    seed: int
    size: int
    pieces: int = 1


def make_slide(recipe: Recipe, tissue: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a slide from the optical density (h, w, 3) of a real one."""
    rng = np.random.default_rng([recipe.seed, recipe.number])
    density = lay_tissue(rng, tissue, recipe.size, recipe.pieces)
    tone = density.sum(-1)
    stained = ndimage.uniform_filter(tone[::4, ::4], 8) > 0.25  # what is tissue, a quarter as fine
    nests = [(nest_center(rng, stained), rng.uniform(60, 110)) for _ in range(rng.integers(2, 6))]
    places = np.concatenate([crowd(rng, center, radius) for center, radius in nests])
    if recipe.positive:
        for center, radius in nests:
            clear(density, center, radius)
    else:
        rows, columns = np.nonzero(stained)
        chosen = rng.integers(len(rows), size=len(places) // 2)
        places = np.stack([rows[chosen], columns[chosen]], 1) * 4 + rng.uniform(0, 4, (len(chosen), 2))
    for place in places:
        add_nucleus(rng, density, place)
    density *= rng.uniform(0.85, 1.15, 3) * rng.uniform(0.85, 1.15)  # another laboratory, another scanner
    pixels = 255 * rng.uniform(0.93, 0.99) * np.exp(-density)
    pixels += rng.normal(0, 1.0, pixels.shape[:2])[..., None]
    for _ in range(rng.integers(1, 4)):
        draw_ink(rng, pixels)
    return pixels.clip(0, 255).round().astype(np.uint8)


def lay_tissue(rng: np.random.Generator, tissue: NDArray[np.float32], size: int, pieces: int) -> NDArray[np.float32]:
    """Optical density of glass with pieces of tissue in so many quarters, each piece turned and mirrored."""
    density = np.zeros((size, size, 3), np.float32)
    half = size // 2
    for corner in rng.permutation(4)[:pieces]:
        piece = np.rot90(tissue, int(rng.integers(4)))
        piece = piece[:, ::-1] if rng.integers(2) else piece
        y, x = (int(rng.integers(max(1, side - half + 1))) for side in piece.shape[:2])
        piece = piece[y : y + half, x : x + half]
        top, left = divmod(int(corner), 2)
        density[top * half : top * half + piece.shape[0], left * half : left * half + piece.shape[1]] = piece
    return density


def nest_center(rng: np.random.Generator, stained: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A place on tissue, far enough from its border that most of a nest lies on it."""
    inner = ndimage.uniform_filter(stained.astype(np.float32), 45) > 0.7
    rows, columns = np.nonzero(inner if inner.any() else stained)
    chosen = rng.integers(len(rows))
    return np.array([rows[chosen], columns[chosen]]) * 4.0


def clear(density: NDArray[np.float32], center: NDArray[np.float64], radius: float) -> None:
    """Make a disc as pale as what lies between cells."""
    reach = int(radius) + 12
    top, left = (max(0, int(place) - reach) for place in center)
    window = density[top : int(center[0]) + reach, left : int(center[1]) + reach]
    y, x = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
    inside = 1 / (1 + np.exp((np.hypot(y - center[0], x - center[1]) - radius) / 4))[..., None]
    window += inside * (0.2 * window + 0.15 * EOSIN - window)


def crowd(rng: np.random.Generator, center: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Places (N, 2) of nuclei that lie close to each other in a disc."""
    pitch = 10.5
    steps = np.arange(-radius, radius, pitch)
    places = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    places = places[np.hypot(*places.T) < radius]
    return center + places + rng.normal(0, 2.0, places.shape)


def add_nucleus(rng: np.random.Generator, density: NDArray[np.float32], place: NDArray[np.float64]) -> None:
    """Stain an ellipse as a nucleus."""
    reach = 12
    y, x = np.round(place).astype(int)
    if min(y, x) < reach or max(y, x) >= len(density) - reach:
        return
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    angle = rng.uniform(0, np.pi)
    along, across = dy * np.cos(angle) + dx * np.sin(angle), dx * np.cos(angle) - dy * np.sin(angle)
    distance = np.hypot(along / rng.uniform(7, 10), across / rng.uniform(5, 7))
    inside = 1 / (1 + np.exp((distance - 1) * 8))
    window = density[y - reach : y + reach + 1, x - reach : x + reach + 1]
    window += (inside * rng.uniform(1.2, 1.9))[..., None] * HEMATOXYLIN


def draw_ink(rng: np.random.Generator, pixels: NDArray[Any]) -> None:
    """Draw a stroke of a felt-tip pen over the slide."""
    size = len(pixels)
    ink = INKS[rng.integers(len(INKS))] * 255
    start, heading = rng.uniform(0, size, 2), rng.uniform(0, 2 * np.pi)
    small = np.zeros((size // 8, size // 8), np.float32)
    for _ in range(int(rng.integers(60, 200))):
        heading += rng.normal(0, 0.15)
        start = start + 8 * np.array([np.sin(heading), np.cos(heading)])
        y, x = (start / 8).astype(int)
        if 0 <= y < len(small) and 0 <= x < len(small):
            small[y, x] = 1
    stroke = ndimage.gaussian_filter(small, rng.uniform(1.5, 3.0)) > 0.03
    cover = (np.kron(stroke, np.ones((8, 8), np.float32)) * 0.75)[..., None]
    height, width = cover.shape[:2]
    pixels[:height, :width] = pixels[:height, :width] * (1 - cover) + ink * cover


def read_tissue(svs: Path) -> NDArray[np.float32]:
    """Optical density (h, w, 3) of a slide, zero on glass."""
    pixels = tifffile.imread(svs, series=0).astype(np.float32)
    density = -np.log((pixels / np.percentile(pixels, 97, axis=(0, 1))).clip(1 / 255, 1))
    return density.astype(np.float32)


def write_slide(recipe: Recipe, svs: Path, out: Path) -> tuple[str, NDArray[np.float64]]:
    """Write a slide; return its file's name and its colour statistics."""
    path = out / f"slide-{recipe.number:02d}.tif"
    pixels = make_slide(recipe, read_tissue(svs))
    tifffile.imwrite(
        path, pixels, tile=(256, 256), compression="jpeg", compressionargs={"level": 92}, photometric="rgb"
    )
    coarse = pixels[::8, ::8].reshape(-1, 3) / 255.0
    histograms = [np.histogram(channel, 8, (0, 1), density=True)[0] / 8 for channel in coarse.T]
    return path.name, np.concatenate([coarse.mean(0), coarse.std(0), *histograms])


def colour_auc(statistics: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> float:
    """AUC of a logistic regression of the colour statistics, in five folds; one half where they tell nothing."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(min(5, len(labels) // 2), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    scores = cross_val_predict(model, statistics, labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, scores))


def main() -> None:
    """Make the slides and the table of their labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svs", type=Path, required=True, help="a real slide whose tissue is used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument(
        "--pieces", type=int, default=1, choices=range(1, 5), help="quarters with tissue; more is harder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    recipes = [
        Recipe(number, number % 2 == 1, chosen.seed, chosen.size, chosen.pieces) for number in range(chosen.count)
    ]
    with ProcessPoolExecutor(chosen.workers) as pool:
        made = []
        with progress("slides") as update:
            for one in pool.map(partial(write_slide, svs=chosen.svs, out=chosen.out), recipes):
                made.append(one)
                update(len(made), len(recipes), one[0])
    order = np.random.default_rng(chosen.seed).permutation(chosen.count // 2)
    with (chosen.out / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["slide_id", "path", "label", "fold"])
        for recipe, (name, _) in zip(recipes, made, strict=True):
            fold = order[recipe.number // 2 % len(order)] % FOLDS
            table.writerow([Path(name).stem, name, "nests" if recipe.positive else "none", fold])
    labels = np.array([int(recipe.positive) for recipe in recipes])
    auc = colour_auc(np.stack([statistics for _, statistics in made]), labels, chosen.seed)
    print(f"{chosen.count} slides in {chosen.out}; AUC of their colours alone {auc:.2f}")


if __name__ == "__main__":
    run_main(main, "interrupted; run it again to make all slides")
