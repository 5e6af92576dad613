"""Megapixel MNIST, the paper's artificial task (section 4.2): find five digits and name the most frequent.

The paper's text fixes an empty canvas of 1500 × 1500 pixels, 50 "patches of random noise" of a digit's size, and
five digits of which three share a class. What it leaves open is decided here as follows. A noise patch is a thin
straight line at a random place and angle of its box, as in the authors' released data maker, because strokes are
harder to tell from digits than white noise. Noise patches lie anywhere, also over one another. Digits are placed
afterwards, without overlapping one another, and a digit's box replaces the noise beneath it, so that no stroke
crosses a digit. The two other digits are drawn independently from the nine other classes, so both may share one.

The low-resolution view that the attention sees is, in the authors' released data, no downsampled canvas: the same
pieces are shrunk one by one and pasted at scaled places (`MnistScene.render_view`). Pieces of three pixels are
then as sharp as such pieces can be, wherever they lie, where a true pyramid blurs them across pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import DataError, UsageError
from pipeline.idx import read_idx

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

DIGIT = 28  # side of a digit in pixels
CLASSES = 10
SAME, OTHER = 3, 2
VIEW = 0.12  # side of the pasted view over that of the canvas: 180 pixels of 1500
# From here on five boxes always fit: four of them forbid at most 4 × 55 × 55 of the 113 × 113 places.
MIN_SIZE = 5 * DIGIT


@dataclass(frozen=True)
class DigitPool:
    """Digits to build images from.

    Attributes
    ----------
    images : (N, 28, 28) uint8, white on black
    labels : (N,) uint8 in 0..9
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class PlacedDigit(NamedTuple):
    """A digit on the canvas; (y, x) is the first pixel of its box."""

    y: int
    x: int
    number: int  # index into the pool


class NoiseLine(NamedTuple):
    """A line in a box on the canvas; (y, x) is the first pixel of its box."""

    y: int
    x: int
    angle: float  # radians in [0, pi)
    offset: float  # distance from the middle of the box, in pixels


@dataclass(frozen=True)
class MnistScene:
    """What lies where on one canvas of `size` × `size` pixels; `label` is the most frequent class, "0" to "9"."""

    size: int
    label: str
    digits: tuple[PlacedDigit, ...]
    noise: tuple[NoiseLine, ...]

    def render(self, pool: DigitPool) -> NDArray[np.uint8]:
        """Draw the noise, then the digits of the pool that the scene was made from, as (size, size) uint8."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        for line in self.noise:
            box = canvas[line.y : line.y + DIGIT, line.x : line.x + DIGIT]
            box[_line(line)] = 255
        for digit in self.digits:
            canvas[digit.y : digit.y + DIGIT, digit.x : digit.x + DIGIT] = pool.images[digit.number]
        return canvas

    def render_view(self, pool: DigitPool) -> NDArray[np.uint8]:
        """Draw the pasted low-resolution view, (side, side) uint8 with side = round(0.12 size).

        Each line and digit is shrunk by the mean over areas to a whole number of pixels (three) and pasted where
        its box begins, times 0.12, rounded. As on the canvas, lines add up and digits replace what they cover.
        """
        side = round(VIEW * self.size)
        scale = side / self.size
        piece = round(DIGIT * scale)
        view = np.zeros((side, side), np.uint8)

        def place(y: int, x: int) -> tuple[slice, slice]:
            top, left = (min(round(start * scale), side - piece) for start in (y, x))
            return slice(top, top + piece), slice(left, left + piece)

        for line in self.noise:
            box = view[place(line.y, line.x)]
            np.maximum(box, _shrunk(_line(line) * np.uint8(255), piece), out=box)
        for digit in self.digits:
            view[place(digit.y, digit.x)] = _shrunk(pool.images[digit.number], piece)
        return view


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
        digits=tuple(PlacedDigit(y, x, number) for (y, x), number in zip(places, numbers, strict=True)),
        noise=tuple(_random_line(rng, size) for _ in range(noise)),
    )


def load_pools(
    images: Path | None,
    labels: Path | None,
    *,
    test_images: Path | None = None,
    test_labels: Path | None = None,
    digit_split: float = 0.8,
) -> tuple[DigitPool, DigitPool]:
    """Load disjoint pools of digits for the training and the test images.

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
    return pools


def _read_pool(images: Path, labels: Path) -> DigitPool:
    digits, classes = read_idx(images), read_idx(labels)
    if digits.ndim != 3 or digits.shape[1:] != (DIGIT, DIGIT):
        raise DataError(f"{images}: values of shape {digits.shape}, expected (N, {DIGIT}, {DIGIT}) digits")
    if classes.shape != digits.shape[:1] or classes.max(initial=0) >= CLASSES:
        raise DataError(f"{labels}: not one label in 0..9 for each of the {len(digits)} digits of {images}")
    return DigitPool(digits, classes)


def _bundled_digits() -> DigitPool:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = _enlarged(bunch.images * (255 / 16))
    return DigitPool(np.rint(images).astype(np.uint8), bunch.target.astype(np.uint8))


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
    return DigitPool(pool.images[:first], pool.labels[:first]), DigitPool(pool.images[first:], pool.labels[first:])


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


def _random_line(rng: np.random.Generator, size: int) -> NoiseLine:
    y, x = rng.integers(0, size - DIGIT + 1, 2).tolist()
    return NoiseLine(y, x, angle=float(rng.uniform(0, np.pi)), offset=float(rng.uniform(-6, 6)))


def _line(line: NoiseLine) -> NDArray[np.bool_]:
    """Return which of (28, 28) pixels a line of 1.6 pixels' width covers."""
    y, x = np.mgrid[:DIGIT, :DIGIT] - (DIGIT - 1) / 2
    covered: NDArray[np.bool_] = np.abs(np.cos(line.angle) * y - np.sin(line.angle) * x - line.offset) <= 0.8
    return covered


def _shrunk(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(S, S) -> (side, side), each pixel the mean over the area that it covers."""
    edges = np.arange(side + 1) * len(image) / side
    pixels = np.arange(len(image))
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = overlap.clip(0) * side / len(image)
    return np.rint(weights @ image @ weights.T).astype(np.uint8)
