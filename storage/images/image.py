"""The base of images that are opened for reading: their description, their boxes, and errors that name their file.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from storage.errors import CorruptImageError, UnsupportedImageError
from storage.images.tiff_kinds import AGAIN

if TYPE_CHECKING:
    import numpy as np

    from storage.format.georeference import Georeference
    from storage.limits import Limits


ACCEPTED = "TIFF (BigTIFF, OME-TIFF, SVS and other whole-slide TIFFs), PNG, JPEG or BMP"
# By these names, files at URLs are told apart; local ones by their first bytes.
RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
TIFF_SUFFIXES = (".tif", ".tiff", ".svs", ".btf", ".tf2", ".tf8", ".scn", ".bif", ".ndpi", ".qptiff")
# Of files that OpenSlide may read, with the extra "slides", where nothing else does.
DICOM_SUFFIX = ".dcm"
OPENSLIDE_SUFFIXES = (".ndpi", ".bif", ".mrxs", ".vms", ".vmu", ".svslide", DICOM_SUFFIX, ".svs", ".scn")


def series_files(folder: str) -> list[str]:
    """Paths of the files of DICOM series in a folder, sorted; hidden ones, as other systems leave them, are none."""
    with os.scandir(folder) as files:
        return sorted(
            file.path for file in files if file.name.lower().endswith(DICOM_SUFFIX) and file.name[:1] != "."
        )


class Image:
    """An image in a file; a context manager, picklable as its location.

    Attributes
    ----------
    location : path or URL
    shape : (C, H, W)
    dtype : one of ``DTYPES``, that of the file or the next that holds its values
    mpp_yx : micrometres per pixel (y, x), or None where the file does not tell
    channels : channel names
    bits : bits of a sample, where it has fewer than its type: the largest value is ``2**bits - 1``; None elsewhere
    nodata : value of pixels that hold no data, each channel for itself; None where the file names none
    alpha : number of the channel whose zeros say that no channel holds data there; None where there is none
    georeference : where on the Earth it lies; None where the file does not tell
    segment_yx : height and width of what is decoded at once, in pixels
    direct : whether a box is read without decoding whole segments
    """

    location: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    mpp_yx: tuple[float, float] | None = None
    channels: tuple[str, ...]
    bits: int | None = None
    nodata: float | None = None
    alpha: int | None = None
    georeference: Georeference | None = None
    segment_yx: tuple[int, int]
    direct = True

    def __init__(self, location: str, limits: Limits, **options: Any) -> None:
        self.location, self._limits = location, limits
        self._options = {"limits": limits, **options}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.location, **self._options), ()

    @property
    def nbytes(self) -> int:
        """The number of bytes of the decoded image."""
        return math.prod(self.shape) * self.dtype.itemsize

    def close(self) -> None:
        """Give back what the image holds."""
        raise NotImplementedError

    def _check_box(self, y: int, x: int, h: int, w: int) -> None:
        if not (0 <= y <= y + h <= self.shape[1] and 0 <= x <= x + w <= self.shape[2]):
            raise ValueError(f"the box y={y} x={x} h={h} w={w} leaves the image of shape {self.shape}")

    def _check_ratio(self, raw_bytes: int, file_bytes: int, ratio: int) -> None:
        if raw_bytes > self._limits.ratio_free_bytes and raw_bytes > file_bytes * ratio:
            raise self._unsupported(f"claims {raw_bytes} bytes of pixels in a file of {file_bytes}; {AGAIN}")

    def _corrupt(self, reason: str) -> CorruptImageError:
        return CorruptImageError(f"{self.location}: {reason}; {AGAIN}")

    def _unsupported(self, reason: str) -> UnsupportedImageError:
        return UnsupportedImageError(f"{self.location}: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
