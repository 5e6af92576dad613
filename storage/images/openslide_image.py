"""Slides that OpenSlide reads and tifffile does not: MRXS, BIF, VMS, DICOM and others; with the extra "slides".

OpenSlide gives pixels with an alpha channel; what a scanner left out is transparent and becomes the slide's
background colour, white where it names none. Only local files are read. OpenSlide believes what a file claims and
ends the process where memory for that is not to be had, so a process of its own first opens each file and reads a
pixel of each level.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import CorruptImageError, MissingImageError, StorageError
from storage.images.image import DICOM_SUFFIX, OPENSLIDE_SUFFIXES, Image, series_files
from storage.images.tiff_metadata import of_magnification
from storage.limits import LIMITS, Limits
from storage.place.urls import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable

    import openslide
    from numpy.typing import NDArray

INSTALL = 'to read it by OpenSlide: pip install "nested-ats[slides]"'
PROBE = """
import resource, sys, openslide
_, most = resource.getrlimit(resource.RLIMIT_AS)
if most == resource.RLIM_INFINITY:
    resource.setrlimit(resource.RLIMIT_AS, (2**33, most))
print(openslide.OpenSlide.detect_format(sys.argv[1]), flush=True)
slide = openslide.OpenSlide(sys.argv[1])
for level in range(slide.level_count):
    slide.read_region((0, 0), level, (1, 1))
"""
PROBE_S = 120.0  # that it may take, on a slow disk
MAX_SIDE = 4096  # pixels read at once; memory of a box is a multiple of its pixels
WHITE = (255, 255, 255)


def instead_of(error: StorageError, location: str) -> OpenSlideImage:
    """Open a file that nothing else reads, or raise the error that says so, with what else could be done.

    That is tried for files that are named as its kinds. Of any other TIFF it would read the first page, which need
    not be the image.
    """
    if is_remote(location) or not location.lower().endswith(OPENSLIDE_SUFFIXES) or not os.path.isfile(location):
        raise error
    try:
        import openslide  # noqa: F401
    except ImportError:
        raise type(error)(f"{error}; or, {INSTALL}") from error
    if location.lower().endswith(DICOM_SUFFIX):
        _check_series(os.path.dirname(location) or ".")
    if _probe(location, os.stat(location).st_mtime_ns) in ("None", "generic-tiff"):
        raise error
    return OpenSlideImage(location)


@lru_cache(maxsize=1024)
def _probe(location: str, _changed_ns: int) -> str:
    """Have a process of its own open a file with OpenSlide: its kind there, or "" where that process did not survive.

    One that ends by an error has survived.
    """
    try:
        done = subprocess.run(  # noqa: S603  the file's path is an argument of ours
            [sys.executable, "-I", "-c", PROBE, location],
            capture_output=True,
            check=False,
            timeout=PROBE_S,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode >= 0 else ""


def _check_series(folder: str) -> None:
    """Name a file of a series that is no DICOM: OpenSlide passes over it, and the slide would lack a level."""
    for path in series_files(folder):
        with open(path, "rb") as file:
            if file.read(132)[128:] != b"DICM":
                raise CorruptImageError(
                    f"{path}: is no DICOM file, and its series would lack what it held; copy or download it again, "
                    "or take it out of the folder"
                )


class OpenSlideImage(Image):
    """A slide that OpenSlide reads, as (3, H, W) of uint8; thread safe; see ``Image``.

    Attributes
    ----------
    sizes_yx : height and width of each level of the file, finest first
    identity : OpenSlide's hash of the slide, or None where it has none

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError
    """

    def __init__(self, path: str | os.PathLike[str], *, limits: Limits = LIMITS) -> None:
        super().__init__(os.fspath(path), limits)
        if not os.path.exists(self.location):
            raise MissingImageError(f"{self.location}: does not exist; check the path")
        if not _probe(self.location, os.stat(self.location).st_mtime_ns):
            raise self._corrupt("a process that opens it with OpenSlide does not survive that")
        self._lock = threading.Lock()
        self._slide: openslide.OpenSlide | None = None
        properties = self._ask(lambda slide: dict(slide.properties))
        dimensions = self._ask(lambda slide: slide.level_dimensions)
        self._scales = self._ask(lambda slide: slide.level_downsamples)
        self.sizes_yx = [(height, width) for width, height in dimensions]
        self.shape, self.dtype, self.channels = (3, *self.sizes_yx[0]), np.dtype(np.uint8), ("R", "G", "B")
        if max(self.sizes_yx[0]) > limits.side:
            raise self._unsupported(f"claims {self.sizes_yx[0]} pixels, more than any scanner makes")
        self.segment_yx = (MAX_SIDE, MAX_SIDE)
        pixel = [properties.get(f"openslide.mpp-{axis}") for axis in "yx"]
        power = float(properties.get("openslide.objective-power") or 0)
        self.mpp_yx = (float(pixel[0]), float(pixel[1])) if pixel[0] and pixel[1] else of_magnification(power)
        colour = properties.get("openslide.background-color", "")
        self._background = tuple(bytes.fromhex(colour)) if len(colour) == 6 else WHITE
        found = properties.get("openslide.quickhash-1")
        described = repr((found, self.sizes_yx, self._background)).encode()
        self.identity = hashlib.sha256(described).hexdigest() if found else None

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """(3, h, w) of a box of the finest level; see `read_level`."""
        self._check_box(y, x, h, w)
        return self.read_level(0, y, x, h, w)

    def read_level(self, level: int, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Decode one box of a level, inside it.

        Returns
        -------
        (3, h, w) uint8

        Raises
        ------
        CorruptImageError
            OpenSlide cannot decode it.
        """
        out = np.empty((3, h, w), np.uint8)
        for top in range(y, y + h, MAX_SIDE):
            for left in range(x, x + w, MAX_SIDE):
                height, width = min(MAX_SIDE, y + h - top), min(MAX_SIDE, x + w - left)
                out[:, top - y : top - y + height, left - x : left - x + width] = self._region(
                    level, top, left, height, width
                )
        return out

    def _region(self, level: int, y: int, x: int, h: int, w: int) -> NDArray[np.uint8]:
        corner = (round(x * self._scales[level]), round(y * self._scales[level]))
        pixels = np.asarray(self._ask(lambda slide: slide.read_region(corner, level, (w, h)), f" at level {level}"))
        colours, alpha = pixels[..., :3].transpose(2, 0, 1), pixels[..., 3]
        if alpha.min() == 255:
            return colours
        share = alpha.astype(np.uint16)
        behind = np.array(self._background, np.uint16)[:, None, None]
        mixed: NDArray[np.uint8] = ((colours * share + behind * (255 - share) + 127) // 255).astype(np.uint8)
        return mixed

    def _ask(self, question: Callable[[openslide.OpenSlide], Any], where: str = "") -> Any:
        """Ask OpenSlide; after an error its handle is of no use any more, and the next question gets another."""
        import openslide

        try:
            with self._lock:
                slide = self._slide = self._slide or openslide.OpenSlide(self.location)
            return question(slide)
        except Exception as error:
            with self._lock:
                self._slide = None
            raise self._corrupt(f"OpenSlide cannot read it{where} ({error})") from error

    def close(self) -> None:
        """Let go of the file, once no thread reads it."""
        self._slide = None
