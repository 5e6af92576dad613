"""Every kind of input that is read: the same pixels as the reference decoder, from a path or a URL."""

import io
import itertools
import os
import pickle
import re
import struct
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from storage import (
    ConvertOptions,
    CorruptImageError,
    MissingImageError,
    RasterImage,
    Slide,
    StorageError,
    TiffImage,
    TransferError,
    UnsupportedImageError,
    convert,
    open_image,
)
from storage.images.codestreams import jxl_header
from storage.images.image import ACCEPTED
from storage.limits import Limits
from storage.place.files import BLOCK_BYTES, BlockReader, RandomFile, fingerprint


def whole(image):
    return image.read(0, 0, *image.shape[1:])


def as_chw(pixels, channels):
    return pixels[None] if pixels.ndim == 2 else pixels if pixels.shape[0] == channels else pixels.transpose(2, 0, 1)


def assert_equals_tifffile(path, **options):
    with TiffImage(path, **options) as image:
        expected = as_chw(tifffile.imread(path), image.shape[0])
        np.testing.assert_array_equal(whole(image), expected)
        assert image.dtype == expected.dtype
        h, w = image.shape[1:]
        np.testing.assert_array_equal(
            image.read(h // 3, w // 4, h // 2, w // 2),
            expected[:, h // 3 : h // 3 + h // 2, w // 4 : w // 4 + w // 2],
        )
        return expected


@pytest.fixture
def smooth(rng):
    """(H, W, C) uint8 that lossy codecs keep recognisable."""

    def make(height=100, width=130, channels=3):
        cells = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, channels))
        return np.kron(cells, np.ones((16, 16, 1))).astype(np.uint8)[:height, :width]

    return make


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        (3, {"compression": "jpeg2000", "compressionargs": {"level": 0}}),
        (3, {"compression": "jpeg2000", "compressionargs": {"level": 40}}),
        (3, {"compression": "jpeg2000", "compressionargs": {"codecformat": "jp2"}}),
        (3, {"compression": 33005}),
        (4, {"compression": "jpeg2000", "extrasamples": ["unassalpha"]}),
        (3, {"compression": "webp", "compressionargs": {"lossless": True}}),
        (3, {"compression": "webp", "compressionargs": {"level": 60, "lossless": False}}),
        (4, {"compression": "webp", "extrasamples": ["unassalpha"]}),
        (3, {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}}),
        (3, {"compression": "jpeg", "compressionargs": {"subsampling": "420"}}),
        (3, {"compression": "jpeg", "planarconfig": "separate"}),
        (3, {"compression": "lzma"}),
        (3, {"compression": "jpegxl"}),
        (1, {"compression": "jpegxl", "photometric": "minisblack"}),
        (3, {"compression": "jpegxl", "compressionargs": {"level": 80, "lossless": False}}),
        (4, {"compression": "jpegxl", "extrasamples": ["unassalpha"]}),
        (3, {"compression": "png"}),
        (3, {"compression": "lerc"}),
        (3, {"compression": "lerc", "planarconfig": "separate"}),
        (4, {"photometric": "separated"}),
        (4, {"photometric": "separated", "compression": "zstd", "predictor": True}),
        (4, {"photometric": "separated", "compression": "jpeg"}),
    ],
)
def test_codecs_and_colours_equal_tifffile(tmp_path, smooth, channels, settings):
    pixels = smooth(channels=channels)
    if settings.get("planarconfig") == "separate":
        pixels = pixels.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "x.tif", pixels, **({"photometric": "rgb", "tile": (32, 48)} | settings))
    expected = assert_equals_tifffile(tmp_path / "x.tif")
    assert np.abs(expected.astype(int) - as_chw(pixels, channels)).mean() < 12  # the reference itself is sane


@pytest.mark.parametrize(
    ("dtype", "compression"),
    [
        *itertools.product(
            ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"], [None, "deflate"]
        ),
        ("uint16", "jpegxl"),
        ("uint16", "png"),
        *itertools.product(["int8", "int16", "uint32", "int32"], ["lerc"]),
        ("uint16", "jpeg2000"),
        ("int16", "jpeg2000"),
    ],
)
def test_types_are_kept(tmp_path, rng, dtype, compression):
    info = np.iinfo(dtype) if "int" in dtype else None
    pixels = (
        rng.integers(info.min, info.max, (70, 50), dtype, endpoint=True)
        if info
        else rng.normal(0, 1e9, (70, 50)).astype(dtype)
    )
    if not info:
        pixels[3, 4], pixels[5, 6] = np.nan, -np.inf
    order = "<" if compression not in (None, "deflate") else ">"  # its encoders swap bytes in the stream too
    tifffile.imwrite(tmp_path / "x.tif", pixels, compression=compression, tile=(16, 32), byteorder=order)
    np.testing.assert_array_equal(assert_equals_tifffile(tmp_path / "x.tif")[0], pixels)


def test_white_is_zero_is_not_turned(tmp_path, smooth):
    pixels = smooth(channels=1)[..., 0]
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(assert_equals_tifffile(tmp_path / "x.tif")[0], pixels)


def test_abbreviated_jpeg_streams_with_shared_tables(tmp_path, smooth):
    Image.fromarray(smooth()).save(tmp_path / "x.tif", compression="jpeg", quality=85)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert tif.pages[0].jpegtables
    assert_equals_tifffile(tmp_path / "x.tif")


def test_jpeg_tables_that_are_missing_are_named(tmp_path, smooth):
    path = tmp_path / "x.tif"
    Image.fromarray(smooth()).save(path, compression="jpeg", quality=85)
    with tifffile.TiffFile(path) as tif:
        tag, order = tif.pages[0].tags["JPEGTables"], tif.byteorder
    with path.open("r+b") as file:
        file.seek(tag.offset)
        file.write(struct.pack(f"{order}H", tag.code + 1))  # a tag that nobody knows
    with TiffImage(path) as image, pytest.raises(CorruptImageError, match="nor the file has the tables"):
        whole(image)


@pytest.mark.parametrize(
    ("channels", "settings", "names"),
    [
        (3, {"photometric": "rgb"}, ("R", "G", "B")),
        (4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, ("R", "G", "B", "A")),
        (4, {"photometric": "separated"}, ("C", "M", "Y", "K")),
        (1, {"photometric": "minisblack"}, ("0",)),
        (3, {"photometric": "minisblack", "planarconfig": "contig"}, ("0", "1", "2")),
    ],
)
def test_channels_are_named_where_their_colours_are_known(tmp_path, smooth, channels, settings, names):
    tifffile.imwrite(tmp_path / "x.tif", smooth(channels=channels), **settings)
    with TiffImage(tmp_path / "x.tif") as image:
        assert image.channels == names


def test_sixty_four_channels_of_an_ome_tiff(tmp_path, textured):
    pixels = textured((64, 40, 50), "uint16")
    names = [f"marker {i}" for i in range(64)]
    metadata = {"axes": "CYX", "Channel": {"Name": names}}
    tifffile.imwrite(tmp_path / "x.ome.tif", pixels, tile=(16, 16), photometric="minisblack", metadata=metadata)
    np.testing.assert_array_equal(assert_equals_tifffile(tmp_path / "x.ome.tif"), pixels)
    with TiffImage(tmp_path / "x.ome.tif") as image:
        assert image.channels == tuple(names)


def test_images_are_pickled_by_their_place(tiff, tmp_path, smooth):
    path, _ = tiff(80, 90)
    Image.fromarray(smooth()).save(tmp_path / "x.png")
    for place in (path, tmp_path / "x.png"):
        with open_image(place) as image:
            data = pickle.dumps(image)
            assert len(data) < 1000
            with pickle.loads(data) as again:
                np.testing.assert_array_equal(whole(again), whole(image))


# Held in another type, exactly


@pytest.mark.parametrize(
    ("stored", "held"),
    [("int8", "int8"), ("float16", "float32"), ("int32", "int32"), ("uint32", "uint32")],
)
@pytest.mark.parametrize("settings", [{}, {"tile": (16, 32), "compression": "deflate"}])
def test_types_go_into_the_next_that_holds_them(tmp_path, rng, stored, held, settings):
    values = np.finfo(stored) if stored[0] == "f" else np.iinfo(stored)
    pixels = rng.normal(0, 99, (70, 50)).astype(stored)
    pixels[0, :2] = values.min, values.max
    tifffile.imwrite(tmp_path / "x.tif", pixels, **settings)
    with TiffImage(tmp_path / "x.tif") as image:
        assert image.dtype == held
        np.testing.assert_array_equal(whole(image)[0], pixels)
        np.testing.assert_array_equal(image.read(20, 30, 17, 19)[0], pixels[20:37, 30:49])


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 9, 10, 12, 15, 17, 24])
@pytest.mark.parametrize("channels", [1, 3])
def test_packed_bits_are_kept_as_they_are(tmp_path, rng, bits, channels):
    pixels = rng.integers(0, 2**bits, (40, 37, channels)).astype(f"uint{next(n for n in (8, 16, 32) if n >= bits)}")
    pixels = pixels[..., 0] if channels == 1 else pixels
    colours = "minisblack" if channels == 1 else "rgb"
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric=colours, bitspersample=bits, rowsperstrip=16)
    with TiffImage(tmp_path / "x.tif") as image:
        np.testing.assert_array_equal(whole(image), as_chw(pixels, channels))
        assert image.dtype == ("uint8" if bits < 8 else "uint16" if bits < 16 else "uint32")
        assert image.bits == bits
        np.testing.assert_array_equal(image.read(13, 5, 20, 30), as_chw(pixels, channels)[:, 13:33, 5:35])


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", [None, "packbits", "lzw", "tiff_ccitt", "group3", "group4"])
def test_one_bit_becomes_0_and_255(tmp_path, smooth, photometric, compression):
    pixels = smooth(channels=1)[..., 0] > 120
    if compression in (None, "packbits", "lzw"):
        tifffile.imwrite(tmp_path / "x.tif", pixels, photometric=photometric, compression=compression)
    else:  # Pillow has libtiff, and calls white zero
        Image.fromarray(pixels).save(tmp_path / "x.tif", compression=compression)
    with TiffImage(tmp_path / "x.tif") as image:
        assert (image.dtype, image.channels) == ("uint8", ("0",))
        np.testing.assert_array_equal(whole(image)[0], tifffile.imread(tmp_path / "x.tif") * np.uint8(255))
        np.testing.assert_array_equal(np.unique(whole(image)), [0, 255])


@pytest.mark.parametrize("fill", [257, 256, 1])
@pytest.mark.parametrize("bits", [8, 4, 1])
def test_palettes_become_the_colours_that_they_stand_for(tmp_path, rng, bits, fill):
    colours = rng.integers(0, 256, (3, 2**bits), np.uint16)
    pixels = rng.integers(0, 2**bits, (60, 50)).astype(bool if bits == 1 else np.uint8)
    if bits == 8:
        options = {"photometric": "palette", "colormap": colours * fill, "tile": (16, 16), "compression": "lzw"}
        tifffile.imwrite(tmp_path / "x.tif", pixels, **options)
    else:  # tifffile writes none of these, so grey gets a palette
        options = {"extratags": [(65000, "H", colours.size, (colours * fill).ravel().tolist(), True)]}
        tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", bitspersample=bits, **options)
        data = (tmp_path / "x.tif").read_bytes()
        data = data.replace(struct.pack("<HHI", 65000, 3, colours.size), struct.pack("<HHI", 320, 3, colours.size))
        data = data.replace(struct.pack("<HHIH", 262, 3, 1, 1), struct.pack("<HHIH", 262, 3, 1, 3))
        (tmp_path / "x.tif").write_bytes(data)
    with TiffImage(tmp_path / "x.tif") as image:
        assert (image.shape, image.dtype, image.channels) == ((3, 60, 50), "uint8", ("R", "G", "B"))
        np.testing.assert_array_equal(whole(image), colours[:, pixels.astype(int)])
        np.testing.assert_array_equal(image.read(10, 20, 30, 25), colours[:, pixels[10:40, 20:45].astype(int)])
    if bits == 8 and fill != 1:
        shown = np.asarray(Image.open(tmp_path / "x.tif").convert("RGB"))
        np.testing.assert_array_equal(shown.transpose(2, 0, 1), colours[:, pixels])


def test_a_palette_of_16_bits_keeps_them(tmp_path, rng):
    colours = rng.integers(0, 2**16, (3, 256), np.uint16)
    pixels = rng.integers(0, 256, (30, 20), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="palette", colormap=colours)
    with TiffImage(tmp_path / "x.tif") as image:
        assert image.dtype == "uint16"
        np.testing.assert_array_equal(whole(image), colours[:, pixels])


def test_a_reduced_copy_that_comes_first_is_passed_over(tmp_path, smooth):
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        writer.write(smooth(25, 32), photometric="rgb", subfiletype=1, metadata=None)
        writer.write(smooth(), photometric="rgb", metadata=None)
    with TiffImage(tmp_path / "x.tif") as image:
        np.testing.assert_array_equal(whole(image), as_chw(tifffile.imread(tmp_path / "x.tif", key=1), 3))


# Refused, with the way out


def test_a_palette_that_lacks_colours_is_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "x.tif", np.zeros((9, 9), np.uint8), photometric="palette", colormap=np.zeros((3, 256), np.uint16)
    )
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        tif.pages[0].tags[320].overwrite([0] * 30)
    with pytest.raises(UnsupportedImageError, match="a palette that lacks colours"):
        TiffImage(tmp_path / "x.tif")


def make_upright(pixels, orientation):
    """As the table of tag 274 has it."""
    turned = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    turned |= {6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)}
    return turned[orientation]


@pytest.mark.parametrize("orientation", range(9))
def test_turned_images_are_made_upright(tmp_path, orientation):
    pixels = np.arange(600, dtype=np.uint16).reshape(20, 30)
    tifffile.imwrite(tmp_path / "x.tif", pixels, extratags=[(274, "H", 1, orientation, True)])
    if orientation < 2:  # 0 has no meaning
        assert_equals_tifffile(tmp_path / "x.tif")
        return
    expected = make_upright(pixels, orientation)
    with TiffImage(tmp_path / "x.tif") as image, Slide(tmp_path / "x.tif") as slide:
        assert image.shape == (1, *expected.shape)
        np.testing.assert_array_equal(whole(image)[0], expected)
        np.testing.assert_array_equal(slide.read(0, (0, 0, *expected.shape))[0], expected)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    "settings",
    [{"rowsperstrip": 16}, {"tile": (32, 48), "compression": "deflate"}, {"rowsperstrip": 7, "compression": "lzw"}],
)
def test_turned_images_in_place_and_converted(tmp_path, smooth, orientation, settings):
    """Boxes and coarser levels lie where they do in the upright image; pixels that are not square turn too."""
    pixels = smooth()
    pixels[:40, :50] //= 2
    tags = [(274, "H", 1, orientation, True)]
    options = {"photometric": "rgb", "resolution": (20000, 10000), "resolutionunit": 3} | settings
    tifffile.imwrite(tmp_path / "x.tif", pixels, extratags=tags, **options)
    upright = make_upright(pixels, orientation).transpose(2, 0, 1)
    convert(tmp_path / "x.tif", tmp_path / "p.zarr", options=ConvertOptions(chunk=16, shard=32))
    with Slide(tmp_path / "x.tif") as there, Slide(tmp_path / "p.zarr") as pyramid:
        assert there.levels[0].scale_yx == pyramid.levels[0].scale_yx
        assert there.levels[0].scale_yx == ((1.0, 0.5) if orientation < 5 else (0.5, 1.0))
        for slide in (there, pyramid):
            boxes = [(10, 20, 40, 30), (60, 50, 40, 30)]
            for box, found in zip(boxes, slide.read_many(0, boxes), strict=True):
                y, x, h, w = box
                np.testing.assert_array_equal(found, upright[:, y : y + h, x : x + w])
        np.testing.assert_array_equal(*(slide.read(1, (0, 0, 50, 50)) for slide in (there, pyramid)))


def test_turned_strips_that_every_column_crosses_are_refused_where_they_are_large(tmp_path, smooth):
    tags = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "x.tif", smooth(), photometric="rgb", compression="lzw", extratags=tags)
    with pytest.raises(UnsupportedImageError, match="vips autorot"):
        TiffImage(tmp_path / "x.tif", limits=Limits(raster_bytes=1000))


def test_a_lerc_with_a_mask_is_refused(tmp_path):
    """Its decoder would make zeros of the pixels that are masked."""
    pixels = np.ones((16, 16), np.float32)
    blob = imagecodecs.lerc_encode(pixels, masks=np.eye(16, dtype=bool))
    tifffile.imwrite(
        tmp_path / "x.tif", iter([blob]), shape=(16, 16), dtype="float32", tile=(16, 16), compression="lerc"
    )
    with TiffImage(tmp_path / "x.tif") as image, pytest.raises(CorruptImageError, match="a LERC with a mask"):
        whole(image)


@pytest.mark.parametrize("container", [False, True])
def test_the_header_of_a_jpeg_xl_tells_its_size(rng, container):
    for height, width in [(64, 64), (256, 8), (100, 130), (1, 1), (3000, 2), (120, 100), (90, 160), (20000, 5)]:
        pixels = np.zeros((height, width), np.uint8)
        data = imagecodecs.jpegxl_encode(pixels, usecontainer=container)
        header = jxl_header(data)
        assert (header.height, header.width) == (height, width)
    with pytest.raises(ValueError, match="no JPEG XL"):
        jxl_header(data[5:])


def test_ycbcr_jpeg2000_of_aperio_is_refused(tmp_path, smooth):
    tifffile.imwrite(tmp_path / "x.svs", smooth(), photometric="rgb", compression=33003, tile=(32, 32))
    with pytest.raises(UnsupportedImageError, match="33003.*vips extract_band"):
        TiffImage(tmp_path / "x.svs")


@pytest.mark.parametrize(("overlap", "refused"), [("0", False), ("-12", True), ("7", True)])
def test_bif_with_overlapping_tiles_is_refused(tmp_path, smooth, overlap, refused):
    xmp = f'<iScan/><EncodeInfo><TileJointInfo OverlapX="{overlap}" OverlapY="0"/></EncodeInfo>'.encode()
    tifffile.imwrite(
        tmp_path / "x.bif",
        smooth(),
        photometric="rgb",
        tile=(32, 32),
        description="level=0 mag=40 quality=90",
        software="ScanOutputManager 1.0",
        metadata=None,
        extratags=[(700, "B", len(xmp), xmp, True)],
    )
    if not refused:
        assert_equals_tifffile(tmp_path / "x.bif")
        return
    with pytest.raises(UnsupportedImageError, match="overlap"):
        TiffImage(tmp_path / "x.bif")


@pytest.mark.parametrize("beyond_4_gb", [False, True])
def test_an_ndpi_without_an_image_is_refused(tmp_path, beyond_4_gb):
    """Beyond 4 GB its first directory's offset has eight bytes, which as a TIFF's would point anywhere."""
    start = 2**32 + 4096 if beyond_4_gb else 4096
    with open(tmp_path / "x.ndpi", "wb") as file:
        file.write(b"II*\0" + struct.pack("<Q", start))
        file.seek(start)
        file.write(
            struct.pack("<H", 2)
            + struct.pack("<HHII", 256, 4, 1, 64)
            + struct.pack("<HHII", 65420, 4, 1, 1)
            + bytes(8)
        )
    with pytest.raises(StorageError, match=r"x\.ndpi: (its headers|not an image)"):
        TiffImage(tmp_path / "x.ndpi")


def test_ome_tiff_over_several_files_is_refused(tmp_path, textured):
    """tifffile would open the other file; its offsets mean nothing in this one."""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, textured((2, 40, 40)), photometric="minisblack", metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "b.ome.tif", textured((1, 40, 40)), photometric="minisblack")
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags[270]
        place, length = tag.valueoffset, tag.count
        xml = tif.pages[0].description
    data = bytearray(path.read_bytes())
    changed = re.sub(
        r"<TiffData[^>]*/>",
        '<TiffData IFD="0" FirstC="0" PlaneCount="1"/>'
        '<TiffData IFD="0" FirstC="1" PlaneCount="1"><UUID FileName="b.ome.tif">urn:uuid:1</UUID></TiffData>',
        xml,
        count=1,
    ).encode()
    data[place : place + length] = bytes(length)
    entry = data.index(struct.pack("<HHII", 270, 2, length, place))
    data[entry : entry + 12] = struct.pack("<HHII", 270, 2, len(changed) + 1, len(data))
    path.write_bytes(bytes(data) + changed + b"\0")
    with pytest.raises(UnsupportedImageError, match="other files"):
        TiffImage(path)


@pytest.mark.parametrize(
    "other", [{"compression": "lzw"}, {"compression": "deflate", "predictor": True}, {"tile": (32, 32)}]
)
def test_planes_stored_in_different_ways_are_refused(tmp_path, textured, other):
    """tifffile decodes all planes as the first one is stored, and would take LZW's bytes for pixels."""
    planes = textured((2, 64, 64))
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData IFD="0" FirstC="0"/><TiffData IFD="1" FirstC="1"/></Pixels></Image></OME>'
    )
    for name, second in [("alike", {}), ("unlike", other)]:
        with tifffile.TiffWriter(tmp_path / f"{name}.ome.tif") as writer:
            writer.write(planes[0], tile=(16, 16), description=xml, metadata=None)
            writer.write(planes[1], **{"tile": (16, 16)} | second, metadata=None)
    with TiffImage(tmp_path / "alike.ome.tif") as image:
        np.testing.assert_array_equal(image.read(0, 0, 64, 64), planes)
    with pytest.raises(StorageError, match="planes that are stored in different ways"):
        TiffImage(tmp_path / "unlike.ome.tif")


@pytest.mark.parametrize(
    ("unit", "mpp"),
    [("um", 0.25), ("micron", 0.25), ("\\u00B5m", 0.25), ("nm", 0.00025), ("pixel", None), ("m", None)],
)
def test_physical_size_of_an_imagej_tiff(tmp_path, textured, unit, mpp):
    metadata = {"axes": "CYX", "unit": unit}
    tifffile.imwrite(tmp_path / "x.tif", textured((2, 40, 50)), imagej=True, metadata=metadata, resolution=(4, 4))
    with TiffImage(tmp_path / "x.tif") as image:
        assert image.shape == (2, 40, 50)
        assert image.mpp_yx == (None if mpp is None else (pytest.approx(mpp), pytest.approx(mpp)))


def test_of_a_leica_scn_the_largest_image_is_read(tmp_path, smooth):
    dimension = '<dimension sizeX="{1}" sizeY="{0}" r="0" ifd="{2}"/>'
    image = "<image name='{3}'><pixels>" + dimension + "</pixels></image>"
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection>'
        + image.format(32, 48, 0, "overview")
        + image.format(100, 130, 1, "main")
        + "</collection></scn>"
    )
    with tifffile.TiffWriter(tmp_path / "x.scn") as writer:
        options = {"photometric": "rgb", "tile": (32, 32), "metadata": None}
        writer.write(smooth(32, 48), description=xml, **options)
        pixels = smooth(100, 130)
        writer.write(pixels, **options)
    with tifffile.TiffFile(tmp_path / "x.scn") as tif:
        assert tif.is_scn
        assert tif.series[0].name == "overview"
    with TiffImage(tmp_path / "x.scn") as image:
        np.testing.assert_array_equal(whole(image), pixels.transpose(2, 0, 1))


def test_what_tifffile_logs_of_a_file_goes_with_its_name_to_our_log(tmp_path, smooth, caplog):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, smooth(), photometric="rgb", extratags=[(42113, "s", 0, "n/a", True)])
    with caplog.at_level("DEBUG"):
        assert_equals_tifffile(path)  # the reference's own lines stay what they are
    ours = [record for record in caplog.records if record.name == "storage.images.tiff"]
    others = [record for record in caplog.records if record.name == "tifffile"]
    assert {record.levelname for record in ours} == {"DEBUG"}
    assert all(str(path) in record.message and "GDAL_NODATA" in record.message for record in ours)
    caplog.clear()
    with TiffImage(path) as image:
        whole(image)
    assert [record for record in caplog.records if record.levelno > 10] == []
    assert len(others) < 2


# Sparse files


def write_sparse(path, smooth, nodata=None):
    tags = [] if nodata is None else [(42113, "s", 0, str(nodata), True)]
    tiles = [tile if i not in (1, 4) else None for i, tile in enumerate(_tiles(smooth(96, 96), 32))]
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=(96, 96, 3),
        dtype="uint8",
        tile=(32, 32),
        photometric="rgb",
        extratags=tags,
        compression="deflate",
    )


def _tiles(pixels, side):
    return [pixels[y : y + side, x : x + side] for y in range(0, 96, side) for x in range(0, 96, side)]


@pytest.mark.parametrize("nodata", [None, 255])
def test_sparse_files_are_read_only_if_asked(tmp_path, smooth, nodata):
    write_sparse(tmp_path / "x.tif", smooth, nodata)
    with pytest.raises(UnsupportedImageError, match="2 of its 9 tiles are not stored.*--allow-sparse"):
        open_image(tmp_path / "x.tif")
    expected = assert_equals_tifffile(tmp_path / "x.tif", allow_sparse=True)
    assert (expected[:, :32, 32:64] == (nodata or 0)).all()
    with open_image(tmp_path / "x.tif", allow_sparse=True) as image, pickle.loads(pickle.dumps(image)) as again:
        np.testing.assert_array_equal(whole(again), expected)


@pytest.mark.parametrize("tag", [324, 325])
@pytest.mark.parametrize("allow_sparse", [False, True])
def test_a_tile_with_only_an_offset_or_only_a_length_is_damage(tmp_path, smooth, tag, allow_sparse):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, smooth(96, 96), tile=(32, 32), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as tif:
        values = list(tif.pages[0].tags[tag].value)
        tif.pages[0].tags[tag].overwrite([0, *values[1:]])
    with pytest.raises(CorruptImageError, match="only|no length|no offset"):
        TiffImage(path, allow_sparse=allow_sparse)


def test_philips_slides_are_told_of_allow_sparse(tmp_path, smooth):
    level = (
        '<DataObject ObjectType="PixelDataRepresentation">'
        '<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute></DataObject>'
    )
    xml = (
        f'<?xml version="1.0" ?><DataObject ObjectType="DPUfsImport"><Attribute>{level * 2}</Attribute></DataObject>'
    )
    tiles = _tiles(smooth(96, 96), 32)
    tiles[3] = None
    with tifffile.TiffWriter(tmp_path / "x.tiff") as writer:
        options = {
            "dtype": "uint8",
            "tile": (32, 32),
            "photometric": "rgb",
            "software": "Philips DP v1.0",
            "metadata": None,
            "compression": "jpeg",
        }
        writer.write(iter(tiles), shape=(96, 96, 3), description=xml, **options)
        writer.write(iter(tiles[:2] * 2), shape=(48, 48, 3), **options)
    with tifffile.TiffFile(tmp_path / "x.tiff") as tif:
        assert tif.is_philips
    with pytest.raises(UnsupportedImageError, match="--allow-sparse"):
        TiffImage(tmp_path / "x.tiff")
    assert_equals_tifffile(tmp_path / "x.tiff", allow_sparse=True)


# Inner streams that lie


def first_tile(path):
    with tifffile.TiffFile(path) as tif:
        return tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]


@pytest.mark.parametrize(
    ("compression", "marker", "after", "lie"),
    [
        ("jpeg", b"\xff\xc0", 5, struct.pack(">HH", 60000, 60000)),
        ("jpeg2000", b"\xff\x51", 6, struct.pack(">II", 60000, 60000)),
        ("jpeg2000", b"\xff\x51", 22, struct.pack(">II", 1, 1)),  # one pixel a tile
        ("jpeg2000", b"\xff\x51", 38, struct.pack(">H", 16384)),
        ("webp", b"VP8L", 9, struct.pack("<I", 0x0FFFFFFF)),
        ("png", b"IHDR", 4, struct.pack(">II", 60000, 60000)),
        ("lerc", b"Lerc2 ", 14, struct.pack("<ii", 60000, 60000)),
        ("jpegxl", b"\xff\x0a", 2, struct.pack("<I", 2 << 1 | (2**18 - 1) << 3)),
    ],
)
def test_a_tile_that_claims_more_than_its_place_is_not_decoded(
    tmp_path, smooth, monkeypatch, compression, marker, after, lie
):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, smooth(192, 192), photometric="rgb", compression=compression, tile=(96, 96))
    start, _ = first_tile(path)
    data = bytearray(path.read_bytes())
    place = data.index(marker, start) + after
    data[place : place + len(lie)] = lie
    path.write_bytes(data)
    with TiffImage(path) as image:
        monkeypatch.setattr(image, "_decode", lambda *_, **__: pytest.fail("it reached the decoder"))
        with pytest.raises(CorruptImageError, match=r"x\.tif: tile \(0, 0\) is damaged"):
            image.read(0, 0, 8, 8)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp", "deflate", "zstd", "lzw"])
def test_a_tile_that_is_cut_short_is_damage(tmp_path, rng, compression):
    """A JPEG decoder fills what is missing with grey, and says nothing."""
    path = tmp_path / "x.tif"
    pixels = rng.integers(0, 255, (192, 192, 3), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, tile=(96, 96))
    with tifffile.TiffFile(path, mode="r+") as tif:
        counts = list(tif.pages[0].tags[325].value)
        tif.pages[0].tags[325].overwrite([counts[0] - 400, *counts[1:]])
    with (
        TiffImage(path) as image,
        pytest.raises(CorruptImageError, match=r"tile \(0, 0\) (does not decode|is damaged)"),
    ):
        image.read(0, 0, 96, 96)


def test_a_tile_of_another_type_is_damage(tmp_path, smooth):
    """A 16 bit stream under an 8 bit header would wrap round when it is copied."""
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, smooth(channels=1)[..., 0].astype(np.uint16) * 200, compression="jpeg2000", tile=(32, 32))
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags[258].overwrite(8)
    with TiffImage(path) as image, pytest.raises(CorruptImageError, match="other pixels than its header says"):
        image.read(0, 0, 8, 8)


# Files that lie elsewhere


def test_a_tiff_is_read_over_http(web, tiff):
    path, pixels = tiff(300, 260, tile=(32, 32))
    with TiffImage(f"{web.url}/{path.name}") as image:
        assert len(web.log) == 1  # one block holds the header
        np.testing.assert_array_equal(whole(image), pixels)
        assert len(web.log) <= 4  # 90 tiles that lie side by side
        np.testing.assert_array_equal(image.read(100, 90, 50, 40), pixels[:, 100:150, 90:130])
        with pickle.loads(pickle.dumps(image)) as again:
            np.testing.assert_array_equal(again.read(9, 8, 7, 6), pixels[:, 9:16, 8:14])


@pytest.mark.parametrize(
    "settings", [{"compression": None}, {"compression": None, "tile": None, "rowsperstrip": 300}]
)
def test_plain_pixels_over_http(web, tiff, settings):
    path, pixels = tiff(300, 260, **settings)
    with TiffImage(f"{web.url}/{path.name}") as image:
        before = len(web.log)
        np.testing.assert_array_equal(image.read(100, 90, 150, 140), pixels[:, 100:250, 90:230])
        np.testing.assert_array_equal(image.read(1, 2, 200, 4), pixels[:, 1:201, 2:6])
        assert len(web.log) - before <= 8


def test_names_with_blanks_and_rasters_over_http(web, tmp_path, smooth):
    Image.fromarray(smooth()).save(tmp_path / "a b.png")
    with open_image(f"{web.url}/a%20b.png") as image:
        np.testing.assert_array_equal(whole(image), smooth_of(tmp_path / "a b.png"))


def smooth_of(path):
    return np.asarray(Image.open(path)).transpose(2, 0, 1)


def test_what_a_server_answers_becomes_errors_of_ours(web, tiff):
    path, pixels = tiff(300, 260)
    url = f"{web.url}/{path.name}"
    with pytest.raises(MissingImageError, match=r"/other\.tif: does not exist"):
        open_image(f"{web.url}/other.tif")
    web.failures[:] = [403] * 50
    with pytest.raises(TransferError, match=r"/image\.tif: the request failed"):
        TiffImage(url)
    web.failures[:] = [503]
    with TiffImage(url) as image:
        web.failures[:] = [503]
        np.testing.assert_array_equal(image.read(0, 0, 70, 70), pixels[:, :70, :70])
        web.failures[:] = [403] * 50
        with pytest.raises(TransferError, match="request failed"):
            image.read(0, 0, 9, 9)
    with pytest.raises(TransferError, match="not a location"):
        open_image("gopher://127.0.0.1/x.tif")


def test_no_failure_to_read_a_header_is_swallowed(tmp_path, textured, monkeypatch):
    """tifffile logs some errors, such as of ImageJ's tags, and goes on with what it can make of the rest."""
    monkeypatch.setattr("storage.place.files.BLOCK_BYTES", 64)
    monkeypatch.setattr("storage.place.files.KEPT_BLOCKS", 2)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, textured((3, 40, 40)), imagej=True, metadata={"axes": "CYX", "Labels": ["a" * 100] * 3})
    healthy = RandomFile.read_at
    calls = []

    def failing(self, offset, length):
        calls.append(offset)
        if len(calls) == fails_at:
            raise TransferError("the wire is cut")
        return healthy(self, offset, length)

    TiffImage(path).close()
    monkeypatch.setattr(RandomFile, "read_at", failing)
    fails_at = 0
    with TiffImage(path):
        needed = len(calls)
    assert needed > 10
    for number in range(1, needed + 1):
        calls.clear()
        fails_at = number
        with pytest.raises(TransferError, match="the wire is cut"):
            TiffImage(path)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(0, 3 * BLOCK_BYTES),
    st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(-(2**16), 2**20), st.integers(-1, 2**20))),
)
def test_a_block_reader_reads_as_a_file_does(tmp_path_factory, size, steps):
    path = tmp_path_factory.getbasetemp() / "blocks.bin"
    path.write_bytes(np.random.default_rng(size).bytes(size))
    file = RandomFile(path)
    with BlockReader(file) as reader, io.BytesIO(path.read_bytes()) as expected:
        for whence, offset, length in steps:
            base = {0: 0, 1: expected.tell(), 2: size}[whence]
            if base + offset < 0:
                with pytest.raises(OSError, match="negative"):
                    reader.seek(offset, whence)
                continue
            assert reader.seek(offset, whence) == expected.seek(offset, whence)
            assert reader.read(length) == expected.read(length)
            assert reader.tell() == expected.tell()
    file.close()


def test_fingerprints_tell_files_apart(web, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(300_000))
    os.utime(path, ns=(0, 10**18))
    local, remote = fingerprint(path), fingerprint(f"{web.url}/x.bin")
    assert set(local) == {"name", "bytes", "mtime_ns", "ends_sha256"}
    assert set(remote) == {"name", "bytes", "last_modified", "ends_sha256"}
    assert local["ends_sha256"] == remote["ends_sha256"]
    assert (local["name"], local["bytes"], local["mtime_ns"]) == ("x.bin", 300_000, 10**18)
    for place in (0, 299_999):
        data = bytearray(300_000)
        data[place] = 1
        path.write_bytes(data)
        os.utime(path, ns=(0, 10**18))
        assert fingerprint(path) != local
        assert fingerprint(f"{web.url}/x.bin") != remote
    os.utime(path, ns=(0, 2 * 10**18))
    assert fingerprint(f"{web.url}/x.bin")["last_modified"] != remote["last_modified"]
    with pytest.raises(MissingImageError):
        fingerprint(tmp_path / "y.bin")


# Plain images


def save(path, image, **settings):
    image.save(path, **settings)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "P4", "P transparent", "I;16", "RGB interlaced"])
def test_png_equals_pillow(tmp_path, smooth, mode):
    colour = Image.fromarray(smooth())
    image = {
        "P": colour.quantize(200),
        "P4": colour.quantize(4),
        "P transparent": colour.quantize(16),
        "I;16": Image.fromarray(smooth(channels=1)[..., 0].astype(np.uint16) * 257 - 3),
    }.get(mode) or colour.convert(mode.split()[0])
    path = save(tmp_path / "x.png", image, **({"transparency": b"\x10\x20"} if "transparent" in mode else {}))
    target = {"P": "RGB", "P4": "RGB", "P transparent": "RGBA", "RGB interlaced": "RGB"}.get(mode)
    expected = np.asarray(Image.open(path).convert(target) if target else Image.open(path))
    with open_image(path) as opened:
        assert isinstance(opened, RasterImage)
        np.testing.assert_array_equal(
            whole(opened), expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
        )
        assert opened.dtype == ("uint16" if mode == "I;16" else "uint8")
        assert len(opened.channels) == opened.shape[0]
        assert opened.mpp_yx is None
        assert opened.direct
        assert opened.segment_yx == opened.shape[1:]
        np.testing.assert_array_equal(opened.read(3, 5, 40, 20), whole(opened)[:, 3:43, 5:25])
        with pytest.raises(ValueError, match="leaves"):
            opened.read(90, 0, 11, 1)
    with pytest.raises(ValueError, match="closed"):
        opened.read(0, 0, 1, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "P4", "1"])
@pytest.mark.parametrize("top_down", [False, True])
def test_bmp_equals_pillow(tmp_path, smooth, mode, top_down):
    image = Image.fromarray(smooth()[:, :99])  # rows are padded to 4 bytes
    image = image.quantize(250 if mode == "P" else 13) if mode[0] == "P" else image.convert(mode)
    path = save(tmp_path / "x.tif", ImageOps.flip(image) if top_down else image, format="BMP")
    if top_down:
        path.write_bytes(put(path.read_bytes(), 22, struct.pack("<i", -image.height)))
    expected = np.atleast_3d(image.convert({"L": "L", "1": "L"}.get(mode, "RGB"))).transpose(2, 0, 1)
    with open_image(path) as opened, Slide(path) as slide:  # named TIFF: the bytes decide
        assert isinstance(opened, RasterImage)
        np.testing.assert_array_equal(whole(opened), expected)
        np.testing.assert_array_equal(slide.read(0, (0, 0, *image.size[::-1])), expected)


def put(data, place, new):
    return data[:place] + new + data[place + len(new) :]


@pytest.mark.parametrize(
    ("mode", "place", "new", "reason"),
    [
        ("RGB", 28, b"\x10", "of 16 bits"),
        ("RGBA", 30, b"\3", "compressed or of a rare depth"),
        ("L", 30, b"\1", "compressed"),
        ("P", 10, struct.pack("<I", 54 + 4 * 9), "does not decode"),  # a palette of nine colours
        ("RGB", 14, b"\x0c", "not an image of a kind"),  # OS/2
        ("RGB", 18, b"\0\0\0\0", "without pixels"),
        ("RGB", 18, struct.pack("<i", -5), "without pixels"),
        ("RGB", 22, b"\0\0\0\0", "without pixels"),
        ("RGB", 18, struct.pack("<ii", 2**31 - 1, -(2**31)), "cut short"),
        ("RGB", 10, b"\xff\xff\xff\xff", "cut short"),
    ],
)
def test_other_bmp_are_refused_before_decoding(tmp_path, smooth, monkeypatch, mode, place, new, reason):
    image = Image.fromarray(smooth())
    path = save(tmp_path / "x.bmp", image.quantize(200) if mode == "P" else image.convert(mode))
    path.write_bytes(put(path.read_bytes(), place, new))
    monkeypatch.setattr(imagecodecs, "bmp_decode", lambda _: pytest.fail("it reached the decoder"))
    with pytest.raises(StorageError, match=rf"x\.bmp: .*{reason}"):
        open_image(path)


def test_a_raster_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"BMI,age\n" * 9)  # as a URL's suffix may promise one
    with pytest.raises(UnsupportedImageError, match=r"x\.png: not a PNG, JPEG or BMP"):
        RasterImage(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_its_decoder(tmp_path, smooth, mode, progressive):
    path = save(tmp_path / "x.png", Image.fromarray(smooth()).convert(mode), format="JPEG", progressive=progressive)
    expected = np.atleast_3d(imagecodecs.jpeg_decode(path.read_bytes())).transpose(2, 0, 1)
    with open_image(path) as image:  # named PNG: the bytes decide
        np.testing.assert_array_equal(whole(image), expected)
    assert np.abs(expected - np.atleast_3d(Image.open(path)).transpose(2, 0, 1).astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_rasters_lie_as_viewers_show_them(tmp_path, rng, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.kron(rng.integers(0, 255, (5, 9)), np.ones((8, 8))).astype(np.uint8)
    path = save(tmp_path / f"x.{kind}", Image.fromarray(pixels), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    with open_image(path) as image:
        assert image.shape == (1, *expected.shape)
        assert np.abs(whole(image)[0].astype(int) - expected).max() <= 1


def test_rasters_that_would_be_guessed_are_refused(tmp_path, smooth):
    colour = Image.fromarray(smooth())
    with pytest.raises(UnsupportedImageError, match="CMYK.*vips colourspace"):
        open_image(save(tmp_path / "x.jpg", colour.convert("CMYK")))
    (tmp_path / "l.jpg").write_bytes(imagecodecs.ljpeg_encode(smooth(channels=1)[..., 0]))
    with pytest.raises(UnsupportedImageError, match="lossless"):
        open_image(tmp_path / "l.jpg")


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width, height, data):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [(40000, 40000, "over 1073741824"), (10000, 10000, "claims 300000000 bytes"), (0, 5, "without pixels")],
)
def test_png_claims_are_checked_before_decoding(tmp_path, monkeypatch, width, height, reason):
    (tmp_path / "x.png").write_bytes(png_claiming(width, height, b"x" * 100))
    monkeypatch.setattr(imagecodecs, "png_decode", lambda _: pytest.fail("it reached the decoder"))
    with pytest.raises(StorageError, match=rf"x\.png: .*{reason}"):
        open_image(tmp_path / "x.png")


def test_large_rasters_are_refused(tmp_path, smooth):
    path = save(tmp_path / "x.jpg", Image.fromarray(smooth()))
    with pytest.raises(UnsupportedImageError, match="over 30000; rewrite it as a tiled TIFF"):
        RasterImage(path, limits=Limits(raster_bytes=30_000))
    with pytest.raises(UnsupportedImageError, match="bytes, (and more than|over) .*rewrite it as a tiled TIFF"):
        RasterImage(path, limits=Limits(raster_bytes=100))
    path = save(tmp_path / "x.bmp", Image.fromarray(smooth()))
    with pytest.raises(UnsupportedImageError, match="bytes, (and more than|over) .*rewrite it as a tiled TIFF"):
        RasterImage(path, limits=Limits(raster_bytes=30_000))


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp"])
def test_rasters_cut_anywhere_are_damage(tmp_path, smooth, kind):
    path = save(tmp_path / f"x.{kind}", Image.fromarray(smooth()))
    data = path.read_bytes()
    for keep in sorted({*range(18, 400, 7), *np.linspace(400, len(data) - 2, 40).astype(int)}):
        path.write_bytes(data[:keep])
        with pytest.raises(CorruptImageError, match=rf"x\.{kind}: "):
            open_image(path)
    path.write_bytes(data + b"what cameras append")
    with open_image(path) as image:
        assert image.shape == (3, 100, 130)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, kind):
    path = {"fifo": tmp_path / "fifo", "device": "/dev/zero", "folder": tmp_path}[kind]
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(UnsupportedImageError, match="not an image file"):
        open_image(path)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"BM", b"BMI,age,weight,sex,", b"hello", b"II\x2a", b"\xff\xd8", b"\x89PNG"]
)
def test_unknown_kinds_are_told_what_is_read(tmp_path, data):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(UnsupportedImageError, match=ACCEPTED[:20].replace("(", r"\(")):
        open_image(tmp_path / "x.jpg")


def test_a_server_that_does_not_answer_ranges_is_named(tiff):
    """``python -m http.server`` is such a server."""
    path, _ = tiff(300, 260)
    handler = partial(SimpleHTTPRequestHandler, directory=path.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TransferError, match="does not answer requests for a part of a file; copy the file"):
            open_image(f"http://127.0.0.1:{server.server_port}/{path.name}")
        server.shutdown()
