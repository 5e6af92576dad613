"""Make OME-Zarr 0.5 pyramids of images, and read random boxes from them, locally or by URL; see README.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.conversion.converter import ConvertReport, convert, write_pyramid
    from storage.conversion.existing import made_from
    from storage.conversion.labels import write_label
    from storage.conversion.plan import ConvertOptions
    from storage.errors import (
        ConversionError,
        CorruptImageError,
        MissingImageError,
        NotAPyramidError,
        StorageError,
        TransferError,
        UnsupportedImageError,
    )
    from storage.format.georeference import Georeference
    from storage.format.levels import Level
    from storage.images.opening import open_image
    from storage.images.raster import RasterImage
    from storage.images.tiff import TiffImage
    from storage.images.tiff_write import write_tiff
    from storage.place.stores import list_below
    from storage.read.cache import ChunkCache
    from storage.read.labels import read_label
    from storage.read.slide import Slide
    from storage.read.source import ReadStatistics
    from storage.threads import processors
    from storage.validation.problems import Problem
    from storage.validation.validator import validate

__all__ = [
    "ChunkCache",
    "ConversionError",
    "ConvertOptions",
    "ConvertReport",
    "CorruptImageError",
    "Georeference",
    "Level",
    "MissingImageError",
    "NotAPyramidError",
    "Problem",
    "RasterImage",
    "ReadStatistics",
    "Slide",
    "StorageError",
    "TiffImage",
    "TransferError",
    "UnsupportedImageError",
    "convert",
    "list_below",
    "made_from",
    "open_image",
    "processors",
    "read_label",
    "validate",
    "write_label",
    "write_pyramid",
    "write_tiff",
]

# Names are fetched from their modules at first use (PEP 562): a plain import costs nothing.
_MODULES = {
    "read.cache": ("ChunkCache",),
    "conversion.converter": ("ConvertReport", "convert", "write_pyramid"),
    "conversion.existing": ("made_from",),
    "conversion.labels": ("write_label",),
    "conversion.plan": ("ConvertOptions",),
    "format.georeference": ("Georeference",),
    "format.levels": ("Level",),
    "read.labels": ("read_label",),
    "read.slide": ("Slide",),
    "read.source": ("ReadStatistics",),
    "place.stores": ("list_below",),
    "threads": ("processors",),
    "images.opening": ("open_image",),
    "images.raster": ("RasterImage",),
    "images.tiff": ("TiffImage",),
    "images.tiff_write": ("write_tiff",),
    "validation.problems": ("Problem",),
    "validation.validator": ("validate",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
}
_HOMES = {name: f"storage.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
