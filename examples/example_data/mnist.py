"""Megapixel MNIST, the paper's artificial task (section 4.2): find five digits and name the most frequent.

The paper's text fixes an empty canvas of 1500 × 1500 pixels, 50 "patches of random noise" of a digit's size, and
five digits of which three share a class. What it leaves open is as in the authors' released data maker. Noise comes
in 50 fixed patterns, others for test images than for training images, each of two thin straight lines from corners of
its box (`noise_patterns`), since strokes are harder to tell from digits than white noise. Digits do not overlap.
Noise boxes lie anywhere but at the border, are placed after the digits, and replace what they cover, with their empty
pixels too: a digit may be cut or covered. Two things are ours: the three digits of a class are different ones, and
the two others are drawn independently from the nine other classes, so both may share one.

The low-resolution view that the attention sees is, in the authors' released data, no downsampled canvas: the same
pieces are shrunk one by one and pasted at scaled places (`MnistScene.render_view`). Pieces of three pixels are
then as sharp as such pieces can be, wherever they lie, where a true pyramid blurs them across pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from example_data.idx import read_idx
from pipeline.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

DIGIT = 28  # side of a digit in pixels
CLASSES = 10
PATTERNS = 50  # of noise, in each split
SAME, OTHER = 3, 2
VIEW = 0.12  # side of the pasted view over that of the canvas: 180 pixels of 1500
# From here on five boxes always fit: four of them forbid at most 4 × 55 × 55 of the 113 × 113 places.
MIN_SIZE = 5 * DIGIT


@dataclass(frozen=True)
class DigitPool:
    """Digits and noise to build images from.

    Attributes
    ----------
    images : (N, 28, 28) uint8, white on black
    labels : (N,) uint8 in 0..9
    noise : (50, 28, 28) uint8, the patterns that lie among them
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    noise: NDArray[np.uint8]


class Placed(NamedTuple):
    """A digit or a noise pattern on the canvas; (y, x) is the first pixel of its box."""

    y: int
    x: int
    number: int  # index into the pool's images, or its noise


@dataclass(frozen=True)
class MnistScene:
    """What lies where on one canvas of `size` × `size` pixels; `label` is the most frequent class, "0" to "9"."""

    size: int
    label: str
    digits: tuple[Placed, ...]
    noise: tuple[Placed, ...]

    def render(self, pool: DigitPool) -> NDArray[np.uint8]:
        """Draw the digits, then the noise, of the pool that the scene was made from, as (size, size) uint8."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        for (y, x, _), image in self._pieces(pool):
            canvas[y : y + DIGIT, x : x + DIGIT] = image
        return canvas

    def render_view(self, pool: DigitPool) -> NDArray[np.uint8]:
        """Draw the pasted low-resolution view, (side, side) uint8 with side = round(0.12 size).

        Each digit and noise pattern is shrunk by the mean over areas to a whole number of pixels (three) and pasted
        where its box begins, times 0.12, rounded, in the order of the canvas.
        """
        side = round(VIEW * self.size)
        scale = side / self.size
        piece = round(DIGIT * scale)
        view = np.zeros((side, side), np.uint8)
        for (y, x, _), image in self._pieces(pool):
            top, left = (min(round(start * scale), side - piece) for start in (y, x))
            view[top : top + piece, left : left + piece] = _shrunk(image, piece)
        return view

    def _pieces(self, pool: DigitPool) -> Iterator[tuple[Placed, NDArray[np.uint8]]]:
        """Give what lies on the canvas in the order in which it is put there."""
        for placed, images in ((self.digits, pool.images), (self.noise, pool.noise)):
            yield from ((each, images[each.number]) for each in placed)


def mnist_scene(index: int, *, seed: int, pool: DigitPool, size: int = 1500, noise: int = 50) -> MnistScene:
    """Make scene number `index` of the set that `seed` stands for; equal arguments give equal scenes.

    Raises
    ------
    UsageError
        The canvas is too small for five digits, or `noise` is negative.
    """
    if size < MIN_SIZE or noise < 0:
        raise UsageError(f"size {size}, noise {noise}: the canvas needs {MIN_SIZE} pixels and noise no less than 0")
    rng = np.random.default_rng([seed, index])
    label = int(rng.integers(CLASSES))
    others = (label + rng.integers(1, CLASSES, OTHER)) % CLASSES
    same = rng.choice(np.flatnonzero(pool.labels == label), SAME, replace=False).tolist()
    numbers = [*same, *(int(rng.choice(np.flatnonzero(pool.labels == other))) for other in others)]
    places = _places(rng, size, len(numbers))
    return MnistScene(
        size=size,
        label=str(label),
        digits=tuple(Placed(y, x, number) for (y, x), number in zip(places, numbers, strict=True)),
        noise=tuple(_random_noise(rng, size) for _ in range(noise)),
    )


def noise_patterns(part: int) -> NDArray[np.uint8]:
    """Make the 50 noise patterns of the training images (`part` 0) or of the test images (1), (50, 28, 28) uint8.

    Each is two lines from corners of its box, one pixel thick. The first leaves the first corner with a slope of
    tan(u), u uniform in [0, pi / 2.5]; the second is the first line of some pattern, mirrored with probability 0.33
    along each axis. Pixels of a line are uniform in [0.8, 1] of white. (The authors' code draws twice whether to
    mirror, but mirrors along one axis both times.)
    """
    rng = np.random.default_rng([part, PATTERNS])
    first = np.stack([_line(slope) for slope in np.tan(rng.uniform(0, np.pi / 2.5, PATTERNS))])
    second = rng.permutation(first)
    for axis in (1, 2):
        mirrored = rng.random(PATTERNS) < 0.33
        second[mirrored] = np.flip(second[mirrored], axis)
    patterns: NDArray[np.uint8] = ((first | second) * rng.uniform(0.8, 1, first.shape) * 255).astype(np.uint8)
    return patterns


def load_pools(
    images: Path | None = None,
    labels: Path | None = None,
    *,
    test_images: Path | None = None,
    test_labels: Path | None = None,
    digit_split: float = 0.8,
) -> tuple[DigitPool, DigitPool]:
    """Load pools for the training and the test images: disjoint digits, and different noise.

    Parameters
    ----------
    images, labels
        IDX files. Without them, the 1797 digits that come with scikit-learn are enlarged from 8 × 8 pixels.
    test_images, test_labels
        IDX files of the test digits. Without them, the first pool gets the first `digit_split` of the digits
        and the second the others.

    Raises
    ------
    UsageError
        An IDX file of a pair is missing or cannot be opened, or the split is not inside (0, 1).
    DataError
        A file is malformed, is not of 28 × 28 digits of classes 0 to 9, or a pool lacks digits of a class.
    """
    if (images is None) != (labels is None) or (test_images is None) != (test_labels is None):
        raise UsageError("digits need both their IDX files: give images and labels, or neither")
    if images is None or labels is None:
        if test_images is not None:
            raise UsageError(f"{test_images}: test digits without training digits; give images and labels too")
        origin, pool = "scikit-learn's digits", _bundled_digits()
    else:
        origin, pool = str(images), _read_pool(images, labels)
    if test_images is not None and test_labels is not None:
        pools = pool, _read_pool(test_images, test_labels)
    else:
        pools = _split_pool(pool, digit_split)
    for part in pools:
        _check_classes(origin, part)
    return pools[0], replace(pools[1], noise=noise_patterns(1))


def _read_pool(images: Path, labels: Path) -> DigitPool:
    digits, classes = read_idx(images), read_idx(labels)
    if digits.ndim != 3 or digits.shape[1:] != (DIGIT, DIGIT):
        raise DataError(f"{images}: values of shape {digits.shape}, expected (N, {DIGIT}, {DIGIT}) digits")
    if classes.shape != digits.shape[:1] or classes.max(initial=0) >= CLASSES:
        raise DataError(f"{labels}: not one label in 0..9 for each of the {len(digits)} digits of {images}")
    return DigitPool(digits, classes, noise_patterns(0))


def _bundled_digits() -> DigitPool:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = _enlarged(bunch.images * (255 / 16))
    return DigitPool(np.rint(images).astype(np.uint8), bunch.target.astype(np.uint8), noise_patterns(0))


def _enlarged(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Resize (N, S, S) images to (N, 28, 28), linearly between pixel centres."""
    side = images.shape[1]
    centres = (np.arange(DIGIT) + 0.5) * side / DIGIT - 0.5
    weights = np.clip(1 - np.abs(np.clip(centres, 0, side - 1)[:, None] - np.arange(side)), 0, 1)
    resized: NDArray[np.float64] = weights @ images @ weights.T
    return resized


def _split_pool(pool: DigitPool, digit_split: float) -> tuple[DigitPool, DigitPool]:
    if not 0 < digit_split < 1:
        raise UsageError(f"digit_split {digit_split}: give the share of digits for training images, inside (0, 1)")
    first = round(digit_split * len(pool.labels))
    parts = slice(None, first), slice(first, None)
    one, other = (replace(pool, images=pool.images[part], labels=pool.labels[part]) for part in parts)
    return one, other


def _check_classes(origin: str, pool: DigitPool) -> None:
    scarce = np.flatnonzero(np.bincount(pool.labels, minlength=CLASSES) < SAME)
    if len(scarce):
        raise DataError(f"{origin}: fewer than {SAME} digits of class {scarce[0]} in a part; give more digits")


def _places(rng: np.random.Generator, size: int, count: int) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    while len(places) < count:
        y, x = rng.integers(0, size - DIGIT + 1, 2).tolist()
        if all(max(abs(y - other_y), abs(x - other_x)) >= DIGIT for other_y, other_x in places):
            places.append((y, x))
    return places


def _random_noise(rng: np.random.Generator, size: int) -> Placed:
    y, x = rng.integers(DIGIT, size - DIGIT, 2).tolist()
    return Placed(y, x, int(rng.integers(PATTERNS)))


def _line(slope: float) -> NDArray[np.bool_]:
    """Return which of (28, 28) pixels lie on the line x = slope y, from the first corner to the far border."""
    end = DIGIT - 0.51  # rounds to the last pixel
    y = np.linspace(0, end / max(slope, 1), 2 * DIGIT)
    covered = np.zeros((DIGIT, DIGIT), np.bool_)
    covered[np.rint(y).astype(int), np.rint(slope * y).astype(int)] = True
    return covered


def _shrunk(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(S, S) -> (side, side), each pixel the mean over the area that it covers."""
    edges = np.arange(side + 1) * len(image) / side
    pixels = np.arange(len(image))
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = overlap.clip(0) * side / len(image)
    return np.rint(weights @ image @ weights.T).astype(np.uint8)
