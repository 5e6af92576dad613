"""Find where a slide has tissue or a scene was recorded, once for each slide, on a coarse view of it.

Tissue is told by its colour: glass has no saturation, and a stain has. The threshold is Otsu's (1979) for each slide,
kept between what glass and what stain have, because it splits a slide without glass, or without tissue, somewhere
within the one thing that is there. Ink of a pen and the black border of a scan are left out. What is found is closed,
and specks and holes are taken away by their area.

What was found is kept in the user's cache folder, by the slide's identity; a pyramid may hold it as a label, which
goes where the pyramid goes. Masks in files are kept there too, by the identity of the file, as pixels.

Shape letters: H W pixels of the view.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nested_ats.config import PatchConfig
from nested_ats.files import open_regular
from nested_ats.mask import Mask, Prior
from pipeline.data.manifest import Entry
from pipeline.data.outlines import mask_identity, read_mask
from pipeline.errors import DataError, UsageError
from pipeline.files import cache_folder, write_atomic
from storage import Slide, StorageError, read_label, write_label

_RGB = 3
_VERSION = 1  # of the way in which masks are found: those that an earlier one kept are not looked at
_VIEW_PIXELS = 1024  # on the longer side of the view of a slide that does not tell what its pixels measure
_MOST_PIXELS = 2**24  # of a view
_VALID_DOWNSAMPLE = 8.0  # least of the view on which recorded pixels are found: it needs no detail, and 1/64 is read
_GLASS, _STAINED = 0.03, 0.12  # saturation: that of glass is below the first, that of stained tissue above the second
_DARK = 0.15  # below this largest channel, hue and saturation are noise
_INK, _INK_SATURATION, _RED = 0.06, 0.5, 0.42  # by which channels differ in ink, from 0 to 1
_RIM = 3.0  # pixels, of ink mixed with what is beside it
_BLUR = 1.0  # pixels, of the Gaussian that takes the noise of single pixels away


@dataclass(frozen=True)
class Finding:
    """How tissue is found; sizes are of pixels of the view where a slide does not tell what its pixels measure."""

    mpp: float = 8.0  # micrometres per pixel of the view, at least
    closing_um: float = 24.0  # gaps that are narrower than twice this are closed
    speck_um2: float = 20_000.0  # area under which what was found is taken away
    hole_um2: float = 20_000.0  # area under which a hole is filled
    threshold: float | None = None  # saturation from 0 to 1, in place of Otsu's


@dataclass(frozen=True)
class Found:
    """A mask over the whole of a slide."""

    pixels: NDArray[np.bool_]  # (H, W)
    pitch_yx: tuple[float, float]  # height and width of a pixel, in pixels of the slide's finest level
    name: str = ""  # digest of all that decides it; empty where the slide has no identity

    @property
    def area_l0(self) -> float:
        """In squares of pixels of the slide's finest level."""
        return float(np.count_nonzero(self.pixels)) * self.pitch_yx[0] * self.pitch_yx[1]


def model_mask(slide: Slide, entry: Entry, config: PatchConfig, scale: float, channels: Sequence[int]) -> Mask | None:
    """Find the mask that a model's prior asks for.

    Parameters
    ----------
    slide
        An open slide.
    entry
        Its row of the manifest.
    config
        The configuration of the model.
    scale
        Pixels of the slide's finest level to one of the finest that the model knows (`SlideImage.scale`).
    channels
        The numbers of the slide's channels that the model sees (`SlideImage.numbers`).

    Returns
    -------
    The mask, or None where the model has no prior.

    Raises
    ------
    DataError
        The slide has nothing to see, has no colours to tell tissue by, or lacks a mask or has another slide's.
    storage.StorageError
        The view cannot be read.
    """
    if config.prior == "none":
        return None
    found = find_mask(slide, entry, config.prior, nodata=config.nodata, channels=channels)
    if not found.pixels.any():
        nothing = {"tissue": "no tissue was found on it", "valid": "no pixel of it is valid"}
        raise DataError(
            f"{slide.location}: {nothing.get(config.prior, 'its mask is empty')}; leave it out, give it a mask of "
            "your own in a column mask (prior: column), or set model.prior to none"
        )
    pitch_y, pitch_x = found.pitch_yx
    return Mask(torch.from_numpy(found.pixels), (pitch_y / scale, pitch_x / scale))


def find_mask(
    slide: Slide,
    entry: Entry,
    prior: Prior,
    *,
    nodata: float | None = None,
    finding: Finding | None = None,
    channels: Sequence[int] | None = None,
) -> Found:
    """Find, read or look up the mask of a slide; the parameters and errors are those of `model_mask`.

    All channels are looked at where none are named.
    """
    if prior == "column":
        if not entry.mask:
            raise DataError(
                f"{slide.location}: has no mask, and model.prior is column; give it one in the manifest's column "
                "mask, a GeoJSON of QuPath's or an image, or leave it out"
            )
        name = _digest(mask_identity(entry.mask), slide.shape_yx)
        return _recall(name) or _keep(Found(*read_mask(entry.mask, slide.shape_yx), name))
    finding, mpp = finding or Finding(), entry.mpp or slide.mpp
    chosen = list(slide.data_channels if channels is None else channels)
    gaps = (slide.nodata,) if slide.alpha is None else (slide.nodata, slide.alpha)
    coarse = (_VALID_DOWNSAMPLE,) if prior == "valid" else ()
    name = _digest(slide.identity, slide.shape_yx, (prior, mpp, nodata, *gaps, *coarse, finding, chosen))
    kept = _recall(name)
    if kept:
        return kept
    level = view_level(slide, finding.mpp, mpp, least=_VALID_DOWNSAMPLE if prior == "valid" else 1.0)
    pitch = slide.levels[level].downsample
    if name and slide.is_own:
        with suppress(StorageError):  # it holds none
            pixels = read_label(slide.location, prior, {"mask": name}, slide.levels[level].shape_yx)
            if pixels is not None:
                return _keep(Found(pixels, (pitch, pitch), name))
    view = slide.read(level, (0, 0, *slide.levels[level].shape_yx))
    there, view = slide.holds_data(view)[chosen], view[chosen]
    pixel_um = mpp and mpp * slide.levels[level].downsample
    scaled = view.astype(np.float32) / np.float32(slide.largest_value)
    if prior == "tissue":
        pixels = tissue(scaled, finding, pixel_um, slide.location) & np.any(there, axis=0)
    else:
        if slide.nodata is None and nodata is not None:
            there &= np.abs(scaled - nodata) > 0.5 / 255  # half of the step between two values of 8 bits
        pixels = np.any(there, axis=0)  # what any channel has recorded
    return _keep(Found(pixels, (pitch, pitch), name))


def put_into_pyramid(slide: Slide, prior: Prior, found: Found) -> None:
    """Put what `find_mask` has found into the slide's own pyramid, as a label, where it looks for it.

    Raises
    ------
    DataError
        The slide is no pyramid of ours.
    storage.StorageError
        The pyramid cannot be written to.
    """
    if not slide.is_own:
        raise DataError(f"{slide.location}: is no pyramid that convert made, and can hold no mask")
    write_label(slide.location, prior, found.pixels, downsample=found.pitch_yx[0], made_of={"mask": found.name})


def view_level(slide: Slide, wanted_mpp: float, mpp: float | None, *, least: float = 1.0) -> int:
    """Number of the level on which masks are found: the one nearest to `wanted_mpp` micrometres per pixel.

    Its downsample is to be no smaller than `least`, where there is such a level.
    """
    downsample = wanted_mpp / mpp if mpp else max(slide.shape_yx) / _VIEW_PIXELS
    small = [i for i, level in enumerate(slide.levels) if math.prod(level.shape_yx) <= _MOST_PIXELS]
    if not small:
        raise DataError(
            f"{slide.location}: its coarsest level has {math.prod(slide.levels[-1].shape_yx)} pixels, too many to "
            "find a mask on; convert it with a smaller --min-level-size"
        )
    return min(small, key=lambda i: abs(math.log(slide.levels[i].downsample / max(downsample, least))))


def tissue(view: NDArray[np.float32], finding: Finding, pixel_um: float | None, location: str) -> NDArray[np.bool_]:
    """Find tissue: (C, H, W) pixels in [0, 1] -> (H, W).

    Parameters
    ----------
    view
        The view of a whole slide.
    finding
        How.
    pixel_um
        Side of a pixel of the view in micrometres, if it is known.
    location
        Names the slide in errors.

    Raises
    ------
    DataError
        The slide has no colours.
    """
    from skimage import filters
    from skimage.morphology import isotropic_closing, remove_small_holes, remove_small_objects

    if len(view) != _RGB:
        raise DataError(
            f"{location}: tissue is told by colour, and it has {len(view)} channels, not 3; give it a mask of your "
            "own in a column mask (prior: column), or set model.prior to valid or none"
        )
    colours = filters.gaussian(view, _BLUR, channel_axis=0)
    largest, smallest = colours.max(0), colours.min(0)
    saturation = np.where(largest > _DARK, (largest - smallest) / np.maximum(largest, _DARK), 0.0)
    possible = (largest > _DARK) & ~_ink(colours, saturation)
    threshold = finding.threshold
    if threshold is None:
        seen = saturation[possible]
        otsu = filters.threshold_otsu(seen) if seen.size and np.ptp(seen) > 0 else 0.0
        threshold = float(np.clip(otsu, _GLASS, _STAINED))
    size = pixel_um or finding.mpp
    found = possible & (saturation > threshold)
    found = isotropic_closing(found, finding.closing_um / size)
    found = remove_small_holes(found & possible, max_size=int(finding.hole_um2 / size**2))
    cleaned: NDArray[np.bool_] = remove_small_objects(found, max_size=int(finding.speck_um2 / size**2))
    return cleaned


def _ink(colours: NDArray[Any], saturation: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a pen has drawn in green, blue or red.

    Haematoxylin and eosin, and DAB, let less green through than red, and never much less red than green.
    """
    from skimage.morphology import isotropic_dilation

    red, green, blue = colours
    greenish = (green > red + _INK) & (green > blue + _INK / 2)
    bluish = (green > red + _INK) & (blue > green + _INK) & (saturation > _INK_SATURATION)
    reddish = (red > np.maximum(green, blue) + _RED) & (blue < green + _INK) & (saturation > _INK_SATURATION)
    widened: NDArray[np.bool_] = isotropic_dilation(greenish | bluish | reddish, _RIM)
    return widened


def _digest(identity: object, *decides: object) -> str:
    """Name a mask by all that decides it; empty where what it is made of has no identity."""
    return hashlib.sha256(repr((_VERSION, identity, *decides)).encode()).hexdigest()[:40] if identity else ""


def _kept_at(name: str) -> Path | None:
    """Where a mask is kept; None where it has no name, or there is no home folder."""
    with suppress(RuntimeError):
        return cache_folder() / "masks" / f"{name}.npz" if name else None
    return None


def _recall(name: str) -> Found | None:
    """A mask that was kept, if it is there and whole; ZIP has a checksum of what is in it."""
    path = _kept_at(name)
    if path is None:
        return None
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as kept:
            height, width = kept["shape"].tolist()
            pixels = np.unpackbits(kept["bits"], count=height * width).reshape(height, width).astype(np.bool_)
            pitch_y, pitch_x = kept["pitch_yx"].tolist()
            return Found(pixels, (pitch_y, pitch_x), name)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _keep(found: Found) -> Found:
    """Keep a mask, and return it; where the disk fails it is found again the next time."""
    path = _kept_at(found.name)
    if path is None:
        return found
    data = io.BytesIO()
    np.savez_compressed(
        data, bits=np.packbits(found.pixels), shape=np.array(found.pixels.shape), pitch_yx=np.array(found.pitch_yx)
    )
    with suppress(OSError, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data.getvalue())
    return found
