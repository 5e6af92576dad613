"""Slides as the model reads them: `SlideImage` is a `storage.Slide` behind the `nested_ats.Image` protocol."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nested_ats.config import EncoderConfig, PatchConfig
from nested_ats.images import find_level
from nested_ats.mask import Mask
from pipeline.data.crs import scene_mpp
from pipeline.data.given import FeatureImage
from pipeline.data.manifest import Entry
from pipeline.data.tissue import model_mask
from pipeline.errors import DataError
from pipeline.sections import CacheConfig
from pipeline.units import LONG, shown
from storage import ReadStatistics, Slide
from storage.format.nodata import holds_data
from storage.place.urls import is_remote
from storage.read.cache import ChunkCache

_NEAR = 0.1  # by which a level's pixels may differ from those that the model looks at, and are taken as they are
_SQUARE = 0.02  # by which a pixel's sides may differ
_NOTHING = 1e-6  # share of a pixel that holds data, below which it holds none
_NAMED = 20  # channels, in messages
_SAME = 1e-3  # by which two downsamples are one


Channels = Sequence[int | str] | None
"""Names of channels, or their numbers from 0; None means all."""


class SlideImage:
    """A slide as an image of the model, at the slide's own scale or at that of the model.

    Parameters
    ----------
    slide
        An open slide.
    background
        The value of pixels off the slide and of those that hold no data, from 0 (black) to 1 (white).
    mpp
        Micrometres per pixel of the image's finest level (`EncoderConfig.mpp`); None takes the slide's finest level,
        whatever its pixels measure. Of the slide's levels the one that is nearest is taken as it is where it differs
        by no more than a tenth; else pixels are averaged by area from the next finer level.
    own_mpp
        Micrometres per pixel of the slide's finest level, over what its file says.
    channels
        Names or numbers of the slide's channels that the image has, in this order; None takes all but that of opacity
        (`Slide.alpha`). One that is named is pixels like the others, and hides none.

    Attributes
    ----------
    numbers : of the slide's channels that the image has, from 0
    fill : `background` as a value of the slide's type
    scale : pixels of the slide's finest level to a pixel of the image's, along each axis
    own_mpp : micrometres per pixel of the slide's finest level; None where nothing tells it
    sources : number of the slide's level that each of the image's levels is read from
    mask : where there is something to see; see `open_image`

    Raises
    ------
    DataError
        The slide does not tell what its pixels measure, or they are larger than the model's; or it lacks a channel.
    """

    def __init__(
        self,
        slide: Slide,
        *,
        background: float = 0.0,
        mpp: float | None = None,
        own_mpp: float | None = None,
        channels: Channels = None,
    ) -> None:
        self.slide = slide
        self.numbers = channel_numbers(slide, channels)
        self._all = self.numbers == list(range(len(slide.channels)))
        dtype = np.dtype(slide.dtype)
        self._alpha = None if slide.alpha in self.numbers else slide.alpha
        self._has_gaps = slide.nodata is not None or self._alpha is not None or dtype.kind == "f"
        largest = slide.largest_value
        # PyTorch computes little in the other types, and knows no pixels of 12 bits.
        self._divisor = largest if slide.bits or dtype.name in ("int8", "uint32", "int32") else None
        self.fill = background if dtype.kind == "f" else round(background * largest)
        self.own_mpp = own_mpp or slide.mpp
        self.scale = 1.0 if mpp is None else _scale(slide, mpp, self.own_mpp)
        self._levels = list(_scaled_levels(slide, self.scale))
        self.sources = [level.source for level in self._levels]
        self.mask: Mask | None = None

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every level."""
        return [level.shape_yx for level in self._levels]

    @property
    def downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of every level."""
        return [level.downsample for level in self._levels]

    @property
    def hides_opacity(self) -> bool:
        """Whether the slide has a channel of opacity that is not one of the image's; a mask is never meant to be."""
        return self._alpha is not None and self.slide.channels[self._alpha] != "mask"

    @property
    def memory_bytes(self) -> int:
        """Bytes of pixels and of the mask that are held while it is open."""
        return self.slide.memory_bytes + (self.mask.nbytes if self.mask else 0)

    @property
    def slides(self) -> list[SlideImage]:
        """The one slide; a case has several."""
        return [self]

    @property
    def statistics(self) -> ReadStatistics:
        """Counts of what was read of the slide since it was opened."""
        return self.slide.statistics

    def places(self) -> list[tuple[SlideImage, Tensor]]:
        """Return the slide with its first pixel, which is the image's, (2,)."""
        return [(self, torch.zeros(2, dtype=torch.int64))]

    def close(self) -> None:
        """Close the slide."""
        self.slide.close()

    @property
    def identity(self) -> str | None:
        """Names the slide's pixels, those that are filled in, and the scale; None where the slide's own is none."""
        scale = "" if self.scale == 1 else f"/{self.scale!r}"
        gaps = f"/{self.slide.nodata!r}" if self._has_gaps else ""
        gaps += "" if self._alpha is None else "/alpha"
        bits = f"/{self.slide.bits} bits" if self.slide.bits else ""
        chosen = "" if self._all else f"/channels {self.numbers}"
        return self.slide.identity and f"{self.slide.identity}/{self.fill}{scale}{gaps}{bits}{chosen}"

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes as (N, C, h, w); see `nested_ats.Image.read`.

        They are of the slide's type, or floating point over the largest value of the slide where that is not the
        largest of a type that PyTorch computes in (`Slide.bits`, 32 bits).
        Channels of pixels that hold no data have the value of the background, and count in no mean.
        """
        _, _, source, shrink = self._levels[level]
        if shrink == 1:
            pixels, valid = self._read(source, boxes)
            if valid is not None:
                pixels[~valid] = self.fill
            return self._on_scale(torch.from_numpy(pixels))
        starts, ends = boxes[:, :2].double() * shrink, (boxes[:, :2] + boxes[:, 2:]).double() * shrink
        corners = starts.floor().long()
        sides = (ends - corners).ceil().long().amax(0)
        pixels, valid = self._read(source, torch.cat([corners, sides.expand(len(boxes), 2)], -1))
        rows, columns = (
            _shares(starts[:, axis] - corners[:, axis], int(boxes[0, 2 + axis]), shrink, int(sides[axis]))
            for axis in range(2)
        )

        def weigh(values: NDArray[Any]) -> Tensor:
            return torch.einsum("nij,ncjk,nlk->ncil", rows, torch.from_numpy(values).float(), columns)

        if valid is None:
            mean = weigh(pixels)
        else:
            share = weigh(valid)
            mean = weigh(np.where(valid, pixels, pixels.dtype.type(0))) / share.clamp_min(_NOTHING)
            mean = torch.where(share > _NOTHING, mean, self.fill)
        kind = torch.from_numpy(pixels).dtype
        if kind.is_floating_point or self._divisor:
            return self._on_scale(mean.to(kind) if kind.is_floating_point else mean)
        return (mean + 0.5).floor().to(kind)

    def _on_scale(self, pixels: Tensor) -> Tensor:
        return pixels if self._divisor is None else pixels.float() / self._divisor

    def _read(self, level: int, boxes: Tensor) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Pixels (N, C, h, w) of boxes, and which of them hold data; None where all do."""
        pixels = self.slide.read_many(level, boxes.numpy(), fill=self.fill)
        valid = holds_data(pixels, self.slide.nodata, self._alpha) if self._has_gaps else None
        if not self._all:
            pixels, valid = pixels[:, self.numbers], None if valid is None else valid[:, self.numbers]
        return pixels, None if valid is None or valid.all() else valid


def channel_numbers(slide: Slide, channels: Channels) -> list[int]:
    """Numbers, from 0, of the channels of a slide that are named or numbered; of all but opacity where none are.

    Raises
    ------
    DataError
        The slide lacks one of them.
    """
    if channels is None:
        return list(slide.data_channels)
    numbers = []
    for wanted in channels:
        if wanted in slide.channels:  # the names of a file come first, which may be numbers
            numbers.append(slide.channels.index(str(wanted)))
        elif isinstance(wanted, int) and wanted < len(slide.channels):
            numbers.append(wanted)
        else:
            there = ", ".join(slide.channels[:_NAMED]) + (", ..." if len(slide.channels) > _NAMED else "")
            raise DataError(
                f"{slide.location}: no channel {wanted!r}, only {there}; leave it out, or change data.channels"
            )
    return numbers


class _Level(NamedTuple):
    """A level of the image: from which of the slide's it is read, and how many of its pixels are averaged a side."""

    shape_yx: tuple[int, int]
    downsample: float
    source: int
    shrink: float


def _scale(slide: Slide, mpp: float, own_mpp: float | None) -> float:
    """Pixels of the slide's finest level to a pixel of `mpp` micrometres: of a level of the slide, if one is near."""
    if own_mpp is None:
        mend = "give it a column mpp in the manifest, or set data.assume_mpp"
        if mpp > LONG:
            mend = "give it a place on the Earth, in a projected CRS: gdal_edit -a_srs EPSG:... -a_ullr ... FILE"
        raise DataError(
            f"{slide.location}: does not tell what a pixel measures, and the model looks at {shown(mpp)}; {mend}"
        )
    y, x = slide.levels[0].scale_yx
    if max(y / x, x / y) > 1 + _SQUARE:
        raise DataError(
            f"{slide.location}: its pixels are {y / x:.3g} times as high as wide, and model.mpp means square ones; "
            "resample it, or leave it out"
        )
    wanted = mpp / own_mpp
    nearest = min((level.downsample for level in slide.levels), key=lambda each: abs(math.log(each / wanted)))
    if max(nearest / wanted, wanted / nearest) <= 1 + _NEAR:
        return nearest
    if wanted < 1:
        raise DataError(
            f"{slide.location}: recorded at {shown(own_mpp)} per pixel, coarser than the model's {shown(mpp)}; "
            "leave it out, or set model.mpp to that of the coarsest"
        )
    return wanted


def _scaled_levels(slide: Slide, scale: float) -> Iterator[_Level]:
    """Levels of the slide from a scale on, and those at powers of two from there that it lacks."""
    if scale == 1:
        yield from (_Level(each.shape_yx, each.downsample, i, 1.0) for i, each in enumerate(slide.levels))
        return
    there = {each.downsample / scale: i for i, each in enumerate(slide.levels) if each.downsample >= scale}
    coarsest = max(each.downsample for each in slide.levels) / scale
    powers = [2.0**power for power in range(max(1, math.ceil(math.log2(max(coarsest, 1))) + 1))]
    missing = [power for power in powers if not any(abs(each / power - 1) < _SAME for each in there)]
    for downsample in sorted([*there, *missing]):
        if downsample in there:
            source = there[downsample]
            yield _Level(slide.levels[source].shape_yx, downsample, source, 1.0)
            continue
        finer = [i for i, each in enumerate(slide.levels) if each.downsample <= downsample * scale]
        height, width = (math.ceil(side / (downsample * scale)) for side in slide.shape_yx)
        yield _Level((height, width), downsample, finer[-1], downsample * scale / slide.levels[finer[-1]].downsample)


def _shares(starts: Tensor, count: int, shrink: float, read: int) -> Tensor:
    """(N, count, read): share of what was read in each pixel that is made of `shrink` of it, from (N,) starts on."""
    first = starts[:, None] + torch.arange(count) * shrink
    pixel = torch.arange(read)
    overlap = torch.minimum(first[..., None] + shrink, pixel + 1.0) - torch.maximum(first[..., None], pixel)
    return (overlap.clamp_min(0) / shrink).float()


class Opening(TypedDict, total=False):
    """How slides are opened, beside what their model looks at; these are keys of `DataConfig`."""

    background: float  # the value of pixels off the slide; see `SlideImage`
    cache: CacheConfig | None  # where chunks of slides at URLs are kept
    channels: Channels  # which the model sees; see `SlideImage`
    assume_mpp: float | None  # micrometres per pixel of slides of which neither file nor manifest tells it


def open_image(entry: Entry, config: EncoderConfig, **options: Unpack[Opening]) -> SlideImage:
    """Open a slide as a model looks at it, with the mask that the model's prior asks for.

    Parameters
    ----------
    entry
        The slide.
    config
        The configuration of the model.
    options
        See `Opening`.

    Raises
    ------
    storage.StorageError, DataError
        The slide cannot be opened, or not at the model's scale, or there is nothing to see on it.
    """
    slide = open_slide(entry.path, options.get("cache"))
    with ExitStack() as stack:
        stack.enter_context(slide)
        own_mpp = entry.mpp or slide.mpp or options.get("assume_mpp")
        if config.mpp is not None and own_mpp is None and slide.georeference is not None:
            own_mpp = scene_mpp(slide.georeference, slide.location)
        image = SlideImage(
            slide,
            background=options.get("background", 0.0),
            mpp=config.mpp,
            own_mpp=own_mpp,
            channels=options.get("channels"),
        )
        if isinstance(config, PatchConfig):
            image.mask = model_mask(slide, entry, config, image.scale, image.numbers)
        stack.pop_all()
    return image


def open_slide(path: str, cache: CacheConfig | None = None) -> Slide:
    """Open a pyramid, PNG, JPEG or BMP; chunks of those at URLs are kept in ``cache``.

    Raises
    ------
    storage.StorageError
        The slide cannot be opened, or the cache's folder cannot be used.
    """
    if cache is None or not is_remote(path):
        return Slide(path)
    return Slide(path, cache=ChunkCache(cache.folder, int(cache.gigabytes * 1e9)))


def check_slide(image: SlideImage | FeatureImage, config: EncoderConfig, channels: int | None = None) -> list[int]:
    """See that a slide has what a model reads, and return the numbers of the slide's levels that are read.

    Parameters
    ----------
    image
        The slide as the model looks at it.
    config
        The configuration of the model.
    channels
        The number of channels that the model has.

    Raises
    ------
    DataError
        The slide has other channels, lacks a level, or is too small for the model's encoder.
    """
    path, count = image.slide.location, len(image.numbers)
    if channels is not None and count != channels:
        raise DataError(f"{path}: {count} channels where the model has {channels}; {_cure(image)}")
    try:
        found = [find_level(image, downsample) for downsample in config.downsamples]
    except ValueError as error:
        raise DataError(
            f"{path}: {error}; set the model's downsamples to levels there are, "
            "or convert with a smaller --min-level-size"
        ) from error
    height, width = image.shapes[max(found)]
    if min(height, width) < config.smallest_view:
        raise DataError(
            f"{path}: {height} x {width} pixels where the model looks first, and its encoder takes no less than "
            f"{config.smallest_view} on a side; leave it out, or choose a finer downsample"
        )
    return [image.sources[level] for level in found]


def _cure(image: SlideImage | FeatureImage) -> str:
    """What to do about a slide that has another number of channels than the model."""
    if not isinstance(image, SlideImage):
        return "take features of one encoder"
    alpha = image.slide.alpha
    if alpha is None:
        return "convert slides of one kind"
    return (
        f"name {image.slide.channels[alpha]!r}, which is read as opacity, in data.channels if it is a band, or "
        "convert slides of one kind"
    )


def draw_key(*parts: object) -> int:
    """Make a random key of 64 bits from what names a draw: seed, epoch, slide, number."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
