"""Draw textured scenes with small number signs: the speed-limit task of the paper (section 4.4), at any size.

A scene is a textured plane with discs of about 40 pixels. Discs with a red ring are *signs* and all bear the
scene's number, which is its label; discs with rings of other colours are *distractors* and bear any number.
From a thumbnail one sees coloured spots and no numbers, so a classifier has to find the red ones and read
them at full resolution, which is the property of the Swedish traffic signs that the paper relies on.

Two things are notable. A scene is a function of the pixel's coordinates: every window renders by itself, and alike
for any tiling, so a gigapixel scene is written tile by tile in bounded memory. And the number is hardly to be read
at downsample 16, though a network sees more there than a person (at 8 it can read it): every digit has the same
amount of ink, the number lies a few pixels off the disc's centre at random, and dirt of the digits' size covers the
disc.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

LABELS = ("none", "50", "70", "80")
SIGN_RING = "red"
RING_RGB = {
    SIGN_RING: (205, 22, 34),
    "blue": (24, 60, 190),
    "yellow": (225, 185, 20),
    "green": (20, 135, 55),
    "violet": (120, 45, 165),
    "black": (30, 30, 32),
}
DISTRACTOR_RINGS = tuple(ring for ring in RING_RGB if ring != SIGN_RING)
# The labels' numbers twice, so that half of the distractors bear one of them.
DISTRACTOR_NUMBERS = ("50", "70", "80", "50", "70", "80", "20", "30", "40", "60", "90", "10")
RADII = (18, 19, 20, 21, 22)
MAX_SHIFT = 2
SHADES = (0.84, 0.88, 0.92, 0.96, 1.0)
DISTRACTORS_PER_MEGAPIXEL = 8

# Discs keep this distance from each other and from the border, so that their soft edges never meet.
_CLEARANCE = 2
_CELL = 2 * max(RADII) + _CLEARANCE  # no two discs that touch lie more than one cell apart


class DiscKind(NamedTuple):
    """What a disc looks like, apart from its size."""

    ring: str  # a key of RING_RGB; SIGN_RING makes the disc a sign
    number: str  # the two digits on the disc
    shade: float  # the brightness, one of SHADES
    shift_yx: tuple[int, int]  # the number's place relative to the disc's centre, in pixels


class Disc(NamedTuple):
    """A disc of a scene, in full-resolution pixels; (y, x) is the centre pixel."""

    y: int
    x: int
    radius: int
    kind: DiscKind


@dataclass(frozen=True)
class SignScene:
    """One scene: a textured background and the discs on it.

    Attributes
    ----------
    size_yx
        The height and width in pixels.
    label
        One of ``LABELS``: the number that all signs bear, or "none" where there is no sign.
    discs
        The signs and distractors, sorted by their centres; they lie inside the scene and do not touch each other.
    phases_yx
        Where the scene lies in each of the background's periodic textures.
    tint_rgb
        The background's darkest colour.
    """

    size_yx: tuple[int, int]
    label: str
    discs: tuple[Disc, ...]
    phases_yx: tuple[tuple[int, int], ...]
    tint_rgb: tuple[int, int, int]

    @property
    def signs(self) -> tuple[Disc, ...]:
        """The discs with a red ring."""
        return tuple(disc for disc in self.discs if disc.kind.ring == SIGN_RING)

    def render(self, y: int, x: int, h: int, w: int) -> NDArray[np.uint8]:
        """Return the window of `h` × `w` pixels whose first pixel is (y, x).

        The plane goes on past the scene's border (without discs), so a border tile can be asked for whole.

        Returns
        -------
        (h, w, 3) uint8
            RGB; a pixel is the same in whatever window it is asked for.
        """
        window = self._background(y, x, h, w)
        for disc in self.discs_in(y, x, h, w):
            _draw(window, disc, y, x)
        return window

    def discs_in(self, y: int, x: int, h: int, w: int) -> Iterator[Disc]:
        """Yield the discs that may touch a window, looking only at those of its rows."""
        reach = max(RADII) + 1
        first = bisect_left(self._rows, y - reach)
        last = bisect_right(self._rows, y + h - 1 + reach)
        return (disc for disc in self.discs[first:last] if x - reach <= disc.x <= x + w - 1 + reach)

    @cached_property
    def _rows(self) -> list[int]:
        return [disc.y for disc in self.discs]

    def _background(self, y: int, x: int, h: int, w: int) -> NDArray[np.uint8]:
        window = np.empty((h, w, 3), np.uint8)
        window[:] = self.tint_rgb
        for texture, (phase_y, phase_x) in zip(_textures(), self.phases_yx, strict=True):
            period = len(texture)
            for rows, texture_rows in _wrapped(y + phase_y, h, period):
                for columns, texture_columns in _wrapped(x + phase_x, w, period):
                    window[rows, columns] += texture[texture_rows, texture_columns]
        return window


def sign_scene(
    index: int, *, seed: int, size_yx: tuple[int, int], label: str, signs: int = 3, distractors: int | None = None
) -> SignScene:
    """Make scene number `index` of the set that `seed` stands for; equal arguments give equal scenes.

    Parameters
    ----------
    label
        One of ``LABELS``. A scene with "none" has no sign, whatever `signs` says.
    signs
        How many signs bear the label's number.
    distractors
        How many discs have other colours; by default there are eight in a megapixel.

    Raises
    ------
    UsageError
        The label is unknown, a count is negative, a scene whose label needs a sign is to have none, or the discs do
        not fit.
    """
    if distractors is None:
        distractors = round(DISTRACTORS_PER_MEGAPIXEL * size_yx[0] * size_yx[1] / 2**20)
    _check_scene(size_yx, label, signs, distractors)
    rng = np.random.default_rng([seed, index])
    kinds = [_sign_kind(rng, label) for _ in range(0 if label == "none" else signs)]
    kinds += [_distractor_kind(rng) for _ in range(distractors)]
    tint = rng.integers(40, 64) + rng.integers(0, 16, 3)
    return SignScene(
        size_yx=size_yx,
        label=label,
        phases_yx=tuple((int(rng.integers(len(t))), int(rng.integers(len(t)))) for t in _textures()),
        tint_rgb=(int(tint[0]), int(tint[1]), int(tint[2])),
        discs=tuple(sorted(_place(rng, kinds, size_yx))),
    )


def _check_scene(size_yx: tuple[int, int], label: str, signs: int, distractors: int) -> None:
    if label not in LABELS:
        raise UsageError(f"unknown label {label!r}: use one of {', '.join(LABELS)}")
    if signs < (label != "none") or distractors < 0:
        raise UsageError(f"{signs} signs and {distractors} distractors: ask for at least one sign and no less than 0")
    if min(size_yx) < 2 * (max(RADII) + _CLEARANCE) + 1:
        raise UsageError(f"a scene of {size_yx[0]} x {size_yx[1]} pixels holds no disc: use at least 49 x 49")


def _sign_kind(rng: np.random.Generator, label: str) -> DiscKind:
    return DiscKind(SIGN_RING, label, float(rng.choice(SHADES)), _shift(rng))


def _distractor_kind(rng: np.random.Generator) -> DiscKind:
    ring = DISTRACTOR_RINGS[rng.integers(len(DISTRACTOR_RINGS))]
    number = DISTRACTOR_NUMBERS[rng.integers(len(DISTRACTOR_NUMBERS))]
    return DiscKind(ring, number, float(rng.choice(SHADES)), _shift(rng))


def _shift(rng: np.random.Generator) -> tuple[int, int]:
    shift_y, shift_x = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2).tolist()
    return shift_y, shift_x


def _place(rng: np.random.Generator, kinds: list[DiscKind], size_yx: tuple[int, int]) -> list[Disc]:
    """Throw the discs one by one, uniformly, and throw again where one would touch another."""
    placed: dict[tuple[int, int], list[Disc]] = {}
    tries = 200
    for kind in kinds:
        radius = int(rng.choice(RADII))
        margin = radius + _CLEARANCE
        throws = (rng.integers(margin, np.subtract(size_yx, margin), 2).tolist() for _ in range(tries))
        disc = next((d for y, x in throws if _is_free(d := Disc(y, x, radius, kind), placed)), None)
        if disc is None:
            raise UsageError(f"{len(kinds)} discs do not fit into {size_yx[0]} x {size_yx[1]} pixels: ask for fewer")
        placed.setdefault((disc.y // _CELL, disc.x // _CELL), []).append(disc)
    return [disc for discs in placed.values() for disc in discs]


def _is_free(disc: Disc, placed: dict[tuple[int, int], list[Disc]]) -> bool:
    row, column = disc.y // _CELL, disc.x // _CELL
    near = (placed.get((row + i, column + j), []) for i in (-1, 0, 1) for j in (-1, 0, 1))
    return all(
        (disc.y - other.y) ** 2 + (disc.x - other.x) ** 2 > (disc.radius + other.radius + _CLEARANCE) ** 2
        for others in near
        for other in others
    )


# --- background -------------------------------------------------------------------------------------------


@cache
def _textures() -> tuple[NDArray[np.uint8], ...]:
    """Return three periodic (P, P, 3) textures: large patches of colour, clouds, grain.

    Their periods have no common divisor, so their sum repeats only after 2048 × 625 × 567 pixels. The values
    stay below 67, 25 and 27, so that uint8 sums of all three and a tint never overflow.
    """
    rng = np.random.default_rng(20190513)
    patches = _field(rng, 2048, 140.0)[..., None] * 50 + np.stack([_field(rng, 2048, 90.0) for _ in "rgb"], -1) * 16
    clouds = _field(rng, 625, 9.0)[..., None] * np.array([24, 24, 24])
    grain = _field(rng, 567, 1.0)[..., None] * 16 + np.stack([_field(rng, 567, 1.5) for _ in "rgb"], -1) * 10
    return tuple(texture.astype(np.uint8) for texture in (patches, clouds, grain))


def _field(rng: np.random.Generator, period: int, sigma: float) -> NDArray[np.float64]:
    """Return a periodic Gaussian-smoothed white noise of (period, period) values in [0, 1]."""
    frequency_y = np.fft.fftfreq(period)[:, None]
    frequency_x = np.fft.rfftfreq(period)[None, :]
    response = np.exp(-2 * (np.pi * sigma) ** 2 * (frequency_y**2 + frequency_x**2))
    response[0, 0] = 0.0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((period, period))) * response, (period, period))
    scaled: NDArray[np.float64] = np.clip(0.5 + field / (5 * field.std()), 0, 1)
    return scaled


@cache
def _dirt() -> NDArray[np.uint16]:
    """Return the brightness that dirt leaves of a disc, a periodic (P, P, 1) texture of values in 125..255."""
    rng = np.random.default_rng(20190610)
    stains = (_field(rng, 600, 2.0) + _field(rng, 600, 4.0) + _field(rng, 600, 8.0)) / 3
    return np.rint(np.minimum(275 - 150 * stains, 255)).astype(np.uint16)[..., None]


def _wrapped(start: int, length: int, period: int) -> Iterator[tuple[slice, slice]]:
    """Yield (slice of the window, slice of the texture) for each stretch between two wraps."""
    done = 0
    while done < length:
        offset = (start + done) % period
        step = min(period - offset, length - done)
        yield slice(done, done + step), slice(offset, offset + step)
        done += step


# --- discs ------------------------------------------------------------------------------------------------


def _draw(window: NDArray[np.uint8], disc: Disc, y: int, x: int) -> None:
    """Blend a disc into a window whose first pixel is (y, x)."""
    colour, coverage = disc_sprite(disc.radius, disc.kind)
    side, period = len(colour), len(_dirt())
    dirt_y, dirt_x = disc.y % (period - side), disc.x % (period - side)
    colour = colour * _dirt()[dirt_y : dirt_y + side, dirt_x : dirt_x + side] // 255
    top, left = disc.y - side // 2 - y, disc.x - side // 2 - x
    rows = slice(max(0, -top), max(0, len(window) - top))
    columns = slice(max(0, -left), max(0, window.shape[1] - left))
    colour, coverage = colour[rows, columns], coverage[rows, columns]
    under = window[max(0, top) :, max(0, left) :][: len(colour), : colour.shape[1]]
    under[:] = (under * (255 - coverage) + colour * coverage) // 255


@lru_cache(maxsize=4096)
def disc_sprite(radius: int, kind: DiscKind) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return a clean disc's colour, (S, S, 3), and coverage, (S, S, 1), in 0..255; S is ``2 * radius + 3``."""
    offset = np.arange(-radius - 1.0, radius + 2.0)
    distance = np.hypot(offset[:, None], offset[None, :])
    ink = np.roll(_number(radius, kind.number), kind.shift_yx, (0, 1))[..., None]
    ring = np.clip(distance - 0.75 * radius + 0.5, 0, 1)[..., None]
    colour = np.array([250.0, 248.0, 240.0]) * (1 - ink) + 16.0 * ink
    colour = (colour * (1 - ring) + np.array(RING_RGB[kind.ring]) * ring) * kind.shade
    coverage = np.clip(radius - distance + 0.5, 0, 1)[..., None] * 255
    return np.rint(colour).astype(np.uint16), np.rint(coverage).astype(np.uint16)


@cache
def _number(radius: int, number: str) -> NDArray[np.float64]:
    """Return the ink of a two-digit number, (S, S) in [0, 1], centred in a disc of that radius."""
    height, width, gap = 0.68 * radius, 0.38 * radius, 0.2 * radius
    ink = np.zeros((2 * radius + 3, 2 * radius + 3))
    for digit, x_centre in zip(number, (-(width + gap) / 2, (width + gap) / 2), strict=True):
        strokes = [
            (np.array(s) - 0.5) * (height, width) + (radius + 1, radius + 1 + x_centre) for s in _STROKES[digit]
        ]
        ink += _drawn(strokes, ink.shape[0], 0.82 * height * width)
    return np.clip(ink, 0, 1)


def _drawn(strokes: list[NDArray[np.float64]], side: int, ink: float) -> NDArray[np.float64]:
    """Draw polylines of (y, x) points with the pen that uses that much ink, anti-aliased."""
    distance = np.min([_segment_distance(a, b, side) for s in strokes for a, b in pairwise(s)], axis=0)
    thin, thick = 0.0, side / 2
    for _ in range(30):
        pen = (thin + thick) / 2
        thin, thick = (pen, thick) if np.clip(pen + 0.5 - distance, 0, 1).sum() < ink else (thin, pen)
    drawn: NDArray[np.float64] = np.clip(thin + 0.5 - distance, 0, 1)
    return drawn


def _segment_distance(a: NDArray[np.float64], b: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Return the distance of each of (side, side) pixels to the segment from `a` to `b`."""
    pixels = np.moveaxis(np.mgrid[:side, :side].astype(float), 0, -1)
    along = np.clip((pixels - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)[..., None]
    distance: NDArray[np.float64] = np.linalg.norm(pixels - a - along * (b - a), axis=-1)
    return distance


def _arc(y: float, x: float, ry: float, rx: float, start: int, end: int) -> list[tuple[float, float]]:
    """Return points of an ellipse; angles in degrees, 0 to the right and 90 downwards."""
    angles = np.radians(np.linspace(start, end, 2 + abs(end - start) // 20))
    return [(y + ry * float(np.sin(t)), x + rx * float(np.cos(t))) for t in angles]


# Centre lines of the digits as (y, x) points in the unit square, y downwards.
_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [_arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
    "1": [[(0.22, 0.15), (0.0, 0.6), (1.0, 0.6)]],
    "2": [[*_arc(0.28, 0.5, 0.28, 0.5, 180, 390), (1.0, 0.0), (1.0, 1.0)]],
    "3": [_arc(0.25, 0.46, 0.25, 0.46, 200, 450), _arc(0.74, 0.46, 0.26, 0.54, 270, 520)],
    "4": [[(1.0, 0.72), (0.0, 0.72), (0.68, 0.0), (0.68, 1.0)]],
    "5": [[(0.0, 0.95), (0.0, 0.1), (0.44, 0.04), *_arc(0.68, 0.46, 0.32, 0.54, 225, 515)]],
    "6": [_arc(0.68, 0.5, 0.32, 0.5, 0, 360), [(0.62, 0.0), (0.3, 0.2), (0.0, 0.75)]],
    "7": [[(0.0, 0.0), (0.0, 1.0), (1.0, 0.3)]],
    "8": [_arc(0.24, 0.5, 0.24, 0.42, 0, 360), _arc(0.74, 0.5, 0.26, 0.5, 0, 360)],
    "9": [_arc(0.32, 0.5, 0.32, 0.5, 0, 360), [(0.38, 1.0), (0.7, 0.8), (1.0, 0.25)]],
}
