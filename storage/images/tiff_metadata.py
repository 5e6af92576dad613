"""Read what a TIFF says about its pixels: their physical size and the names of its channels."""

from __future__ import annotations

import math
import re
from math import prod
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from storage.errors import UnsupportedImageError
from storage.format.nodata import fitting
from storage.images.tiff_kinds import AGAIN, PALETTE

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import tifffile

    from storage.limits import Limits

# Resolution tags often hold a screen's or printer's dots per inch; a microscope's are not above this.
MAX_PLAUSIBLE_MPP = 10.0
GDAL_NODATA, GDAL_METADATA = 42113, 42112
MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3}
IMAGEJ_UNITS = MICROMETRES | {"\\u00B5m": 1.0, "micron": 1.0, "microns": 1.0, "inch": 25400.0}


def check_claims(tif: tifffile.TiffFile, name: str, limits: Limits) -> None:
    """Refuse XML that makes tifffile list more planes than a file can have, before it does.

    Raises
    ------
    UnsupportedImageError
    """
    claims: list[float] = [0]
    for element in _xml(tif.pages.first.description).iter() if tif.is_ome or tif.is_scn else []:
        get = element.attrib.get
        claims += [_number(get(key, "")) for key in ("PlaneCount", "NumPlanes", "sizeZ")]
        claims.append(prod(_number(get(f"Size{axis}", "1")) for axis in get("DimensionOrder", "")[2:]))
        claims.append((_number(get("c", "")) + 1) * (_number(get("z", "")) + 1))
        if "Start" in element.attrib:  # this is a modulo annotation
            step = _number(get("Step", "1")) or 1.0
            claims.append((_number(get("End", "")) - _number(get("Start", ""))) / step)
    if max(claims) > 4 * limits.ifds:  # samples stored together count as planes too
        raise UnsupportedImageError(f"{name}: its metadata claims {max(claims):.0f} planes; {AGAIN}")


def mpp_yx(tif: tifffile.TiffFile, key: tifffile.TiffPage) -> tuple[float, float] | None:
    """Find micrometres per pixel (y, x) in the SVS description, OME-XML, or plausible resolution tags.

    For an SVS that tells its magnification alone, they are 10 over it.
    """
    if tif.is_svs:
        if found := re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", key.description):
            return _plausible(*[_number(found[1])] * 2)
        found = re.search(r"\bAppMag\s*=\s*([0-9.]+)", key.description)
        return of_magnification(_number(found[1])) if found else None
    if tif.is_ome:
        pixels = _ome_pixels(tif)
        return _plausible(_ome_size(pixels, "Y"), _ome_size(pixels, "X"))
    unit = {2: 25400.0, 3: 10000.0}.get(int(key.resolutionunit))
    if tif.is_imagej:
        unit = IMAGEJ_UNITS.get(str((tif.imagej_metadata or {}).get("unit")), unit)
    x, y = key.resolution
    if unit is None or x <= 0 or y <= 0 or max(unit / y, unit / x) > MAX_PLAUSIBLE_MPP:
        return None
    return _plausible(unit / y, unit / x)


def nodata_of(key: tifffile.TiffPage, dtype: np.dtype[Any]) -> float | None:
    """Read the value of pixels without data from GDAL's tag, as pixels of a type have it; None where there is none.

    That of a palette is the number of a colour, which other numbers may have too, and is not kept.
    """
    if key.photometric == PALETTE or key.dtype is None:
        return None
    value = fitting(str(key.tags.valueof(GDAL_NODATA, "")).strip("\0 ").replace(",", "."), key.dtype)
    if value is not None and key.dtype.kind == "b":
        value *= 255  # as the bits are held
    return None if value is None else fitting(value, dtype)


def alpha_of(key: tifffile.TiffPage) -> int | None:
    """Tell which sample of a pixel is opacity, associated or not (ExtraSamples 1 and 2); None where none is."""
    extra = key.extrasamples
    found = next((number for number, kind in enumerate(extra) if kind in (1, 2)), None)
    return None if found is None else int(key.samplesperpixel) - len(extra) + found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def of_magnification(power: float) -> tuple[float, float] | None:
    """Micrometres per pixel (y, x) of an objective: 0.25 at 40."""
    return _plausible(10 / power, 10 / power) if power > 0 else None


def _plausible(y: float, x: float) -> tuple[float, float] | None:
    return (y, x) if 0 < y < math.inf and 0 < x < math.inf else None


def _xml(text: str | None) -> ET.Element:
    """Parse a description; what is not XML becomes an empty element."""
    try:
        return ET.fromstring(text or "")  # noqa: S314  tifffile parses the same text
    except ET.ParseError:
        return ET.Element("none")


def _band_names(key: tifffile.TiffPage) -> list[str]:
    """Descriptions of bands that GDAL has stored, in order; none where they are not numbered from 0 on."""
    items = _xml(str(key.tags.valueof(GDAL_METADATA, "")).strip("\0 ")).iter("Item")
    found = {item.get("sample", ""): item.text or "" for item in items if item.get("role") == "description"}
    names = [found.get(str(i), "").strip() for i in range(len(found))]
    return names if all(names) else []


def _ome_pixels(tif: tifffile.TiffFile) -> ET.Element:
    """Return the first Pixels element of the OME-XML; an empty one where there is none."""
    found = (element for element in _xml(tif.ome_metadata).iter() if element.tag.endswith("Pixels"))
    return next(found, ET.Element("Pixels"))


def _ome_size(pixels: ET.Element, axis: str) -> float:
    """Read the physical size of a pixel along an axis in micrometres; it is 0 where it is not in a metric unit."""
    unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
    return _number(pixels.get(f"PhysicalSize{axis}", "")) * MICROMETRES.get(unit, 0.0)


def channel_names(tif: tifffile.TiffFile, key: tifffile.TiffPage, channels: int) -> tuple[str, ...]:
    """Name the channels: by the file's own names, else by letters where the colours are known, else by numbers.

    The file's own names are those of OME-XML, or GDAL's descriptions of bands.
    """
    elements = [element for element in _ome_pixels(tif) if element.tag.endswith("Channel")] if tif.is_ome else []
    names = [name for element in elements if (name := element.get("Name"))]
    names = names or _band_names(key)
    if len(names) == channels:
        return tuple(names)
    known = {2: "RGB", 3: "RGB", 5: "CMYK", 6: "RGB"}.get(int(key.photometric), "")  # YCbCr and palettes become RGB
    if len(known) + 1 == channels and key.extrasamples and key.extrasamples[0] in (1, 2):
        known += "A"
    return tuple(known) if len(known) == channels else tuple(str(i) for i in range(channels))
