"""Pictures of pixels of any kind: each shown channel adds light of its colour, and attention is a colour map.

Shape letters: C channels, H W pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UsageError
from pipeline.view.tiles import Paint, sample
from storage import Slide

MOST_SHOWN = 12  # channels at once
COLOUR_MAPS = ("inferno", "viridis", "turbo", "cividis")
DIVERGING = "coolwarm"  # of contributions: blue takes, red adds
_QUALITY = 90  # of JPEG, without halved colours: differences to the slide are then not to be seen
_PRIMARY = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
_TWO = ((0, 255, 0), (255, 0, 255))  # green and magenta, which the colour-blind tell apart
_WHITE = ((255, 255, 255),)
_LOW, _HIGH = 0.5, 99.8  # percentiles at which values are shown black and bright
_FAINTEST = 0.15  # opacity where attention is at the threshold; it is 1 at the peak
_CHANNEL = re.compile(r"(\d{1,4})~([0-9a-f]{6})~([^~]{1,40})~([^~]{1,40})")


class Shown(NamedTuple):
    """How a channel is shown."""

    number: int  # of the slide's channels, from 0
    colour: tuple[int, int, int]
    low: float  # the value that is black
    high: float  # the value that has the full colour


@dataclass(frozen=True)
class Look:
    """How a slide is shown."""

    channels: tuple[Shown, ...]
    gamma: float = 1.0  # shown is value ** gamma, with values from 0 (low) to 1 (high)


def is_photograph(slide: Slide) -> bool:
    """Tell whether the channels of a slide are the colours that were seen."""
    return bool(slide.dtype == np.uint8) and len(slide.data_channels) == len(_PRIMARY)


def find_ranges(slide: Slide) -> list[tuple[float, float]]:
    """The values of each channel that are black and bright at first: colours as they are, others as they occur."""
    count = len(slide.channels)
    if slide.dtype == np.uint8 and len(slide.data_channels) in (1, len(_PRIMARY)):
        return [(0.0, 255.0)] * count
    pixels = sample(slide)[:, None]  # as (C, H, W)
    there = slide.holds_data(pixels)
    return [_stretch(values[own]) for values, own in zip(pixels, there, strict=True)]


def default_look(slide: Slide, ranges: Sequence[tuple[float, float]]) -> Look:
    """How a slide whose channels have these ranges is shown at first; of many channels, the first three."""
    numbers = slide.data_channels
    colours = _WHITE if len(numbers) == 1 else _TWO if len(numbers) == 2 else _PRIMARY
    return Look(
        tuple(Shown(number, colour, *ranges[number]) for number, colour in zip(numbers, colours, strict=False))
    )


def _stretch(values: NDArray[Any]) -> tuple[float, float]:
    there = values[np.isfinite(values)]
    if not there.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(there, (_LOW, _HIGH)))
    return (low, high) if high > low else (low, low + 1.0)


def read_look(query: Mapping[str, str], slide: Slide, usual: Look) -> Look:
    """Read how a slide is to be shown: ``channels=0~ff0000~LOW~HIGH,...`` and ``gamma=``, where they are given.

    Raises
    ------
    UsageError
        What is given is not of this form, or the slide lacks a channel.
    """
    text = query.get("channels", "")
    found = [_CHANNEL.fullmatch(part) for part in text.split(",")] if text else []
    try:
        channels = tuple(
            Shown(int(match[1]), (red, green, blue), float(match[3]), float(match[4]))
            for match in found
            if match is not None
            for red, green, blue in [bytes.fromhex(match[2])]
        )
        gamma = float(query.get("gamma", usual.gamma))
    except ValueError:
        channels, gamma = (), math.nan
    wrong = len(channels) < len(found) or len(channels) > MOST_SHOWN or not 0.05 <= gamma <= 20
    numbers = [value for each in channels for value in (each.low, each.high)]
    if wrong or not all(map(math.isfinite, numbers)) or any(each.number >= len(slide.channels) for each in channels):
        raise UsageError(f"{dict(query)}: not how this slide can be shown; reload the page")
    return Look(channels or usual.channels, gamma)


def painter(slide: Slide, look: Look) -> Paint:
    """Make the function that shows pixels (C, H, W) of a slide; pixels that hold no data are transparent."""
    numbers = [shown.number for shown in look.channels]
    plain = look.gamma == 1 and slide.dtype == np.uint8
    as_it_is = plain and [each[1:] for each in look.channels] == [(colour, 0.0, 255.0) for colour in _PRIMARY]

    def paint(pixels: NDArray[Any]) -> NDArray[np.uint8]:
        chosen = pixels[numbers]
        picture = np.moveaxis(chosen, 0, -1) if as_it_is else _add_light(chosen, look)
        there = np.any(slide.holds_data(pixels)[numbers], axis=0) if slide.has_gaps else None
        if there is None or there.all():
            return np.ascontiguousarray(picture)
        return np.dstack([picture, there * np.uint8(255)])

    return paint


def _add_light(pixels: NDArray[Any], look: Look) -> NDArray[np.uint8]:
    light = np.zeros((*pixels.shape[1:], 3), np.float32)
    for values, shown in zip(pixels, look.channels, strict=True):
        span = (shown.high - shown.low) or 1.0
        share = np.nan_to_num((values.astype(np.float32) - np.float32(shown.low)) / np.float32(span)).clip(0, 1)
        light += (share if look.gamma == 1 else share**look.gamma)[..., None] * np.array(shown.colour, np.float32)
    return (light.clip(0, 255) + 0.5).astype(np.uint8)


class Heat(NamedTuple):
    """How attention, or contribution by its size, is shown."""

    colours: str  # name of a colour map; `DIVERGING` for contributions, which have a sign
    low: float  # where colour begins; below, the slide alone is seen
    high: float  # where it ends


def read_heat(query: Mapping[str, str], usual: Heat) -> Heat:
    """Read how attention is to be shown: ``colours=``, ``low=`` and ``high=``, where they are given.

    Raises
    ------
    UsageError
        There is no such colour map, or the numbers are no positive range.
    """
    try:
        ends = (float(query.get(name, getattr(usual, name))) for name in ("low", "high"))
        heat = Heat(query.get("colours", usual.colours), *ends)
    except ValueError:
        heat = Heat("", 0, 0)
    known = (DIVERGING,) if usual.colours == DIVERGING else COLOUR_MAPS
    if heat.colours not in known or not 0 < heat.low < heat.high < math.inf:
        raise UsageError(f"{dict(query)}: not how attention can be shown; reload the page")
    return heat


def heat_painter(heat: Heat) -> Paint:
    """Make the function that shows a map (1, H, W), on a scale of logarithms, with opacity."""
    table, diverging = colour_table(heat.colours), heat.colours == DIVERGING
    span = math.log(heat.high / heat.low)

    def paint(pixels: NDArray[Any]) -> NDArray[np.uint8]:
        signed = np.nan_to_num(pixels[0].astype(np.float32))
        values = np.abs(signed) if diverging else signed
        share = (np.log(np.maximum(values, heat.low) / heat.low) / span).clip(0, 1)
        place = 0.5 + np.sign(signed) * share / 2 if diverging else share
        colour = table[(place * (len(table) - 1) + 0.5).astype(np.intp)]
        opacity = np.where(values > heat.low, _FAINTEST + (1 - _FAINTEST) * share, 0)
        return np.dstack([colour, (opacity * 255 + 0.5).astype(np.uint8)])

    return paint


@lru_cache(maxsize=len(COLOUR_MAPS) + 1)
def colour_table(name: str) -> NDArray[np.uint8]:
    """(256, 3) colours of one of `COLOUR_MAPS`, or `DIVERGING`."""
    from matplotlib import colormaps

    return colormaps[name](np.arange(256), bytes=True)[:, :3].copy()


def encode(picture: Image.Image) -> tuple[str, bytes]:
    """Make a file of a picture, and tell its media type: JPEG, or PNG where it has opacity."""
    buffer = io.BytesIO()
    if picture.mode == "RGBA":
        picture.save(buffer, "PNG", compress_level=1)
        return "image/png", buffer.getvalue()
    picture.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return "image/jpeg", buffer.getvalue()


def legend(name: str) -> bytes:
    """A PNG of one row of the colours of a colour map."""
    return encode(Image.fromarray(np.dstack([colour_table(name)[None], np.full((1, 256), 255, np.uint8)])))[1]


def plain_look(look: Look) -> list[dict[str, Any]]:
    """The channels of a look as the page wants them."""
    return [
        {"number": number, "colour": "#" + bytes(colour).hex(), "low": low, "high": high}
        for number, colour, low, high in look.channels
    ]
