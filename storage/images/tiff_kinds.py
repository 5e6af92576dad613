"""Decide in what type TIFF pixels are held, or why they are refused and what helps.

What a pyramid cannot hold as it is goes into the next type that holds every value exactly. Nothing is rescaled but
the one bit of black and white, which becomes 0 and 255 as every viewer shows it. Each command that a refusal advises
was tried: ``test_advice`` runs those of Python, and those of other programs where they are installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from storage.format.own_array import DTYPES
from storage.images.orientation import UPRIGHT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tifffile
    from numpy.typing import NDArray


def _command(expression: str, settings: str) -> str:
    options = f"{settings}, tile=(256, 256), compression='zlib'"
    return f"python -c \"import tifffile as t; t.imwrite('OUT.tif', {expression}, bigtiff=True, {options})\""


COMPRESSIONS = {
    1: "none",
    2: "CCITT",
    3: "CCITT",
    4: "CCITT",
    5: "LZW",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    33004: "JPEG 2000",
    33005: "JPEG 2000",  # Aperio's own number, for RGB
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    34933: "PNG",
    50000: "zstd",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
# Only tifffile and few others read the first of these compressions, and only libtiff the second.
REWRITTEN_BY_TIFFFILE = {34892: "JPEG of DNG", 34934: "JPEG XR"}
REWRITTEN_BY_LIBTIFF = {6: "JPEG of an old style", 32809: "ThunderScan", 32909: "PixarLog", 34661: "JBIG"}
HELD_AS = {"bool": "uint8", "float16": "float32"}
PREDICTORS = (1, 2, 3)
PALETTE, MASK, YCBCR, CIELAB = 3, 4, 6, 8
PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", PALETTE: "palette", 5: "CMYK", YCBCR: "YCbCr"}
OUT = "'OUT.tif[tile,bigtiff,compression=deflate]'"
GDAL = "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER"
REWRITE = "rewrite it as a tiled TIFF: vips tiffsave IN OUT.tif --tile --bigtiff --compression deflate"
REWRITE_SLIDE = f"rewrite it as a tiled TIFF (with a libvips that has OpenSlide): vips extract_band IN {OUT} 0 --n 3"
DIFFERENT_PLANES = "planes that are stored in different ways; store them alike: " + _command(
    "[page.asarray() for page in t.TiffFile('IN.tif').pages]", "photometric='minisblack', planarconfig='separate'"
)
REWRITE_RAW = "make an RGB image of it with the camera's own or another raw developer"
AGAIN = "copy or download it again"
OTHER_COLOURS = {
    9: "ICCLab colours; store it as RGB with the program that wrote it",
    10: "ITULab colours; store it as RGB with the program that wrote it",
    32803: f"unprocessed pixels of a camera (a colour filter array); {REWRITE_RAW}",
    32844: f"brightness as logarithms (LogL); store it as RGB: vips colourspace IN.tif {OUT} srgb",
    32845: f"colours as logarithms (LogLuv); store it as RGB: vips colourspace IN.tif {OUT} srgb",
    34892: f"unprocessed pixels of a camera (linear raw); {REWRITE_RAW}",
}


def by_tifffile(key: tifffile.TiffPage, expression: str = "t.imread('IN.tif')") -> str:
    """Give the command that rewrites an image in this Python, where tifffile and all its codecs are."""
    colours = "rgb" if key.photometric == 2 else "minisblack"
    planes = "separate" if key.planarconfig == 2 else "contig"
    layout = f", planarconfig='{planes}'" if key.samplesperpixel > 1 else ""
    return _command(expression, f"photometric='{colours}'{layout}")


def held_as(key: tifffile.TiffPage) -> np.dtype[Any]:
    """Return the type of the pixels in memory and in a pyramid, in native byte order."""
    if key.photometric == PALETTE:
        return palette(key).dtype
    return np.dtype(HELD_AS.get(str(key.dtype), key.dtype)).newbyteorder("=")


def orientation_of(key: tifffile.TiffPage) -> int:
    """How the image is stored turned or mirrored, upright by default; see ``storage.images.orientation``."""
    orientation = key.tags.valueof(274, UPRIGHT)
    return orientation if orientation in range(1, 9) else UPRIGHT


def bits_of(key: tifffile.TiffPage) -> int | None:
    """Bits of a sample, where it has fewer than the type in which it is held; one bit is held as 0 and 255."""
    fewer = key.photometric != PALETTE and key.bitspersample > 1 and key.bitspersample < 8 * held_as(key).itemsize
    return key.bitspersample if fewer and held_as(key).kind == "u" else None


def palette(key: tifffile.TiffPage) -> NDArray[Any]:
    """Return the colours of a palette.

    A TIFF has 16 bits for each colour (section 5 of TIFF 6.0), of which most writers fill 8: the high byte, both
    bytes alike, or against the specification the low byte. These become 8 bits here; others keep all 16.

    Returns
    -------
    (N, 3) uint8 or uint16
    """
    colours = np.asarray(key.colormap, np.uint16).reshape(3, -1).T
    high = colours >> 8
    if colours.max(initial=0) < 256:
        return colours.astype(np.uint8)
    return high.astype(np.uint8) if any((colours == high * n).all() for n in (256, 257)) else colours


def why_refused(key: tifffile.TiffPage, samples: int) -> str:
    """Tell why a page is refused, and what helps; the answer is empty for a page that is read.

    Parameters
    ----------
    key
        The page, or the first of planes that are stored alike.
    samples
        The number of channels of the image, as they are stored.
    """
    bits, kind = key.bitspersample, "" if key.dtype is None else key.dtype.kind
    packed = key.dtype is not None and bits != key.dtype.itemsize * 8
    refusals = [
        (
            key.dtype is None or isinstance(bits, tuple),
            "samples of different sizes or of no known format; store all its channels in one type",
        ),
        (packed and kind == "i", f"signed numbers of {bits} bits; store them in 16 bits"),
        (packed and kind == "f", f"floating-point numbers of {bits} bits; store them in 32: {by_tifffile(key)}"),
        (kind == "c", "complex numbers; keep their magnitudes: " + by_tifffile(key, "abs(t.imread('IN.tif'))")),
        (not packed and HELD_AS.get(str(key.dtype), str(key.dtype)) not in DTYPES, _too_wide(key)),
        (key.compression not in COMPRESSIONS, _compression(key)),
        (key.photometric not in PHOTOMETRICS and not (key.photometric == MASK and key.is_mask), _colours(key)),
        (
            key.photometric == YCBCR and key.compression != 7,
            f"YCbCr colours that are not stored as JPEG; turn them to RGB: {GDAL} -b 1 -b 2 -b 3 IN.tif OUT.tif",
        ),
        (key.photometric == PALETTE and (samples != 1 or kind not in "bu"), "a palette for more than one channel"),
        (key.photometric == PALETTE and _palette_is_short(key), f"a palette that lacks colours; {AGAIN}"),
        (key.imagedepth != 1 or key.tiledepth != 1, "a volume, not an image; keep one plane of it"),
        (key.predictor not in PREDICTORS, f"predictor {int(key.predictor)}, not one of 1, 2 and 3; {AGAIN}"),
        (
            key.compression == 34887 and key.tags.valueof(50674, (4, 0))[1] != 0,
            f"compressed as LERC and again by another codec, which is not read; rewrite it: {by_tifffile(key)}",
        ),
    ]
    return next((reason for refused, reason in refusals if refused), "")


def _too_wide(key: tifffile.TiffPage) -> str:
    rounded = by_tifffile(key, "t.imread('IN.tif').astype('float64')")
    return f"numbers of type {key.dtype}, which no type of a pyramid holds; if they may be rounded: {rounded}"


def _compression(key: tifffile.TiffPage) -> str:
    number = int(key.compression)
    if number == 33003:
        return f"Aperio's YCbCr JPEG 2000 (33003), which would stay YCbCr; {REWRITE_SLIDE}"
    if number in (34676, 34677):
        return f"colours or brightness as logarithms; store it as RGB: vips colourspace IN.tif {OUT} srgb"
    if number in REWRITTEN_BY_TIFFFILE:
        return f"compressed as {REWRITTEN_BY_TIFFFILE[number]}, which is not read; rewrite it: {by_tifffile(key)}"
    if number in REWRITTEN_BY_LIBTIFF:
        return f"compressed as {REWRITTEN_BY_LIBTIFF[number]}, which is not read; {REWRITE}"
    kinds = ", ".join(sorted(set(COMPRESSIONS.values())))
    return f"compression {number} is not read, only {kinds}; rewrite it with one of these by a program that knows it"


def _colours(key: tifffile.TiffPage) -> str:
    number = int(key.photometric)
    if number == CIELAB:
        way = f"vips colourspace IN.tif {OUT} srgb"
        if (
            key.dtype is not None and key.dtype.kind != "f"
        ):  # where libvips takes them for other numbers than they are
            way = "convert IN.tif -colorspace sRGB -depth 8 -compress zip OUT.tif (of ImageMagick)"
        return f"CIELab colours; store it as RGB: {way}"
    if number in OTHER_COLOURS:
        return OTHER_COLOURS[number]
    return f"its values are no colours (photometric interpretation {number}); store it as grey: {by_tifffile(key)}"


def choose_page(pages: int) -> str:
    """Tell how a pyramid of one of several pages is made."""
    one = f"or have nested-ats make a pyramid of one of its pages by --page 0 to --page {pages - 1}, or of each by"
    return f"{one} --page slides, or name it in the manifest's column page"


def _palette_is_short(key: tifffile.TiffPage) -> bool:
    return key.colormap is None or np.size(key.colormap) != 3 << key.bitspersample


def why_a_stack(axes: str, sizes: Sequence[int], pages: int) -> str:
    """Tell that an image has more axes than one of channels, and how one image of it, or all as channels, is kept.

    Parameters
    ----------
    axes, sizes
        The axes and sizes of the image, as tifffile names them, without those of length 1.
    pages
        How many pages of the file it takes.
    """
    names = {"Z": "in depth", "T": "in time", "C": "channels", "S": "colours", "X": "columns", "Y": "rows"}
    many = {axis: size for axis, size in zip(axes, sizes, strict=True) if axis not in "YX"}
    kept = next((axis for axis in "SC" if axis in many), "")
    what = " x ".join(f"{size} {names.get(axis, 'pages')}" for axis, size in many.items())
    index = ", ".join(":" if axis in "YX" + kept else "0" for axis in axes)
    index = index[: index.rindex("0") + 1]
    last = axes.endswith("S")
    layout = "photometric='rgb'" if last else "photometric='minisblack'"
    layout += f", planarconfig='{'contig' if last else 'separate'}'" if kept else ""
    first = _command(f"t.imread('IN.tif')[{index}]", layout)
    text = f"a stack of {what}, not one image; keep the first: {first}"
    if index == "0" and not kept:
        text += " or, if they are channels of one image, the same without [0] and with planarconfig='separate'"
    return f"{text}; {choose_page(pages)}" if pages > 1 else text
