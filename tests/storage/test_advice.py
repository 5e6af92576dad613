"""The advice of each refusal is followed, and the resulting image is read with the right pixels.

Commands of Python are run here; those of other programs where they are installed.
"""

import gc
import re
import shlex
import shutil
import struct
import subprocess

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from storage import RasterImage, TiffImage, UnsupportedImageError, open_image
from storage.limits import Limits

COMMAND = re.compile(r"python -c \"[^\"]*\"|(?:vips|gdal_translate|convert) [^;]*?(?= \(of|$)")


def whole(image):
    return image.read(0, 0, *image.shape[1:])


def picture(height=70, width=90, channels=3):
    """(H, W, C) uint8 that colour conversions round but do not clip."""
    rng = np.random.default_rng(0)
    cells = np.kron(rng.integers(60, 190, (height // 10 + 1, width // 10 + 1, channels)), np.ones((10, 10, 1)))
    return cells[:height, :width].astype(np.uint8)


RGB = picture()
GREY = picture(channels=1)[..., 0]


def refusal(path, opener=open_image):
    with pytest.raises(UnsupportedImageError) as caught:
        opener(path).close()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert not re.search(r"axes|dtype|Error|<|>|libdeflate|tifffile\.", message)
    return message


def follow(command, path, folder):
    """Run a command on a file and return what it makes, or skip the test where there is no such program."""
    out = folder / ("OUT.png" if "OUT.png" in command else "OUT.tif")
    command = re.sub(r"\bIN(\.\w+)?\b", str(path), command)
    command = re.sub(r"\bOUT(\.\w+)", str(out), command)
    if command.startswith("python"):
        exec(shlex.split(command)[2], {})
        return out
    program = command.split()[0]
    if program == "convert":
        version = subprocess.run(["convert", "-version"], capture_output=True, check=False).stdout
        if b"ImageMagick" not in version:
            pytest.skip("no ImageMagick here")
    elif shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    subprocess.run(command, shell=True, check=True, capture_output=True)
    return out


def assert_way_out(path, folder, expected, *, tolerance=0.0, opener=open_image, edit=lambda command: command):
    """The advised command makes an image with the (C, H, W) pixels expected, on average."""
    message = refusal(path, opener)
    [command] = COMMAND.findall(message)
    with open_image(follow(edit(command), path, folder)) as image:
        pixels = whole(image)
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(float) - expected.astype(float)).mean() <= tolerance


def write(path, pixels, **settings):
    tifffile.imwrite(path, pixels, **({"metadata": None} | settings))
    return path


@pytest.mark.parametrize("dtype", ["int64", "uint64", "complex64", "complex128"])
@pytest.mark.parametrize("settings", [{"photometric": "minisblack"}, {"photometric": "rgb"}])
def test_types(tmp_path, dtype, settings):
    pixels = RGB if settings["photometric"] == "rgb" else GREY
    path = write(tmp_path / "x.tif", pixels.astype(dtype), **settings)
    assert_way_out(path, tmp_path, pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("compression", ["jpegxr"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_compressions(tmp_path, compression, planar):
    pixels = RGB if planar == "contig" else np.ascontiguousarray(RGB.transpose(2, 0, 1))
    options = {"photometric": "rgb", "planarconfig": planar, "tile": (32, 32), "compression": compression}
    path = write(tmp_path / "x.tif", pixels, **options)
    assert_way_out(path, tmp_path, tifffile.imread(path) if planar == "separate" else RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("photometric", ["mask", "depth_map", "semantic_mask"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_values_that_are_no_colours(tmp_path, photometric, channels):
    pixels = picture(channels=channels)
    stored = pixels[..., 0] if channels == 1 else pixels
    planar = None if channels == 1 else "contig"
    path = write(tmp_path / "x.tif", stored, photometric=photometric, planarconfig=planar)
    assert_way_out(path, tmp_path, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("shape", "settings", "kept"),
    [
        ((5, 70, 90), {"photometric": "minisblack"}, (0,)),
        ((4, 70, 90, 3), {"photometric": "rgb"}, (0,)),
        ((5, 70, 90), {"ome": True, "photometric": "minisblack", "metadata": {"axes": "TYX"}}, (0,)),
        ((3, 5, 70, 90), {"ome": True, "photometric": "minisblack", "metadata": {"axes": "ZCYX"}}, (0,)),
        ((5, 3, 70, 90), {"ome": True, "photometric": "minisblack", "metadata": {"axes": "CZYX"}}, (slice(None), 0)),
        ((2, 3, 4, 70, 90), {"imagej": True, "metadata": {"axes": "TZCYX"}}, (0, 0)),
        ((16, 64, 64), {"photometric": "minisblack", "volumetric": True, "tile": (16, 16, 16)}, (0,)),
    ],
)
def test_stacks(tmp_path, shape, settings, kept):
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    path = write(tmp_path / "x.tif", pixels, **settings)
    expected = pixels[kept]
    expected = expected[None] if expected.ndim == 2 else expected
    assert_way_out(path, tmp_path, expected.transpose(2, 0, 1) if shape[-1] == 3 else expected)


def test_pages_that_are_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 70, 90), np.uint8)
    path = write(tmp_path / "x.tif", pixels, photometric="minisblack")
    assert "channels of one image, the same without [0] and with planarconfig='separate'" in refusal(path)
    assert_way_out(
        path,
        tmp_path,
        pixels,
        edit=lambda command: command.replace("[0]", "").replace(", tile=", ", planarconfig='separate', tile="),
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file left open to its end
@pytest.mark.parametrize("other", [{"compression": "lzw"}, {"tile": (32, 32)}])
def test_planes_stored_in_different_ways(tmp_path, textured, other):
    planes = textured((2, 64, 64))
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData IFD="0" FirstC="0"/><TiffData IFD="1" FirstC="1"/></Pixels></Image></OME>'
    )
    with tifffile.TiffWriter(tmp_path / "x.ome.tif") as writer:
        writer.write(planes[0], tile=(16, 16), description=xml, metadata=None)
        writer.write(planes[1], **{"tile": (16, 16)} | other, metadata=None)
    assert_way_out(tmp_path / "x.ome.tif", tmp_path, planes)
    gc.collect()


@pytest.mark.parametrize(("photometric", "mode"), [("cielab", "LAB"), ("ycbcr", "YCbCr")])
@pytest.mark.parametrize("settings", [{}, {"tile": (32, 32), "compression": "deflate"}, {"planarconfig": "separate"}])
def test_other_colours(tmp_path, photometric, mode, settings):
    pixels = np.asarray(Image.fromarray(RGB).convert(mode))
    if "planarconfig" in settings:
        if mode == "YCbCr":
            pytest.skip("GDAL does not read planes of YCbCr either")
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if mode == "YCbCr":
        settings = {"subsampling": (1, 1)} | settings
    path = write(tmp_path / "x.tif", pixels, photometric=photometric, **settings)
    assert_way_out(path, tmp_path, RGB.transpose(2, 0, 1), tolerance=8.0)


def test_many_channels(tmp_path):
    pixels = picture(channels=1025)
    path = write(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig")
    assert_way_out(path, tmp_path, pixels[..., :3].transpose(2, 0, 1))


def test_large_segments_and_rasters(tmp_path):
    path = write(tmp_path / "x.tif", RGB, photometric="rgb", compression="deflate")
    few = Limits(segment_bytes=10_000, raster_bytes=10_000)
    assert_way_out(path, tmp_path, RGB.transpose(2, 0, 1), opener=lambda path: TiffImage(path, limits=few))
    Image.fromarray(RGB).save(tmp_path / "x.png")
    opener = lambda path: RasterImage(path, limits=few)  # noqa: E731
    assert_way_out(tmp_path / "x.png", tmp_path, RGB.transpose(2, 0, 1), opener=opener)


def test_bmp(tmp_path):
    """Of 16 bits, five for each colour."""
    values = np.random.default_rng(0).integers(0, 2**15, (8, 6), np.uint16)
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54 + values.nbytes, 0, 54, 40, 6, 8, 1, 16, 0, 0, 0, 0, 0, 0)
    (tmp_path / "x.bmp").write_bytes(head + values.tobytes())
    shifts = np.array([10, 5, 0], np.uint16)
    expected = (values[::-1, :, None] >> shifts & 31).astype(float) * 255 / 31
    assert_way_out(tmp_path / "x.bmp", tmp_path, expected.transpose(2, 0, 1), tolerance=4.0)


def test_jpegs(tmp_path):
    (tmp_path / "l.jpg").write_bytes(imagecodecs.ljpeg_encode(GREY))
    assert_way_out(tmp_path / "l.jpg", tmp_path, GREY[None])


def test_cmyk_jpegs(tmp_path):
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert_way_out(tmp_path / "c.jpg", tmp_path, RGB.transpose(2, 0, 1), tolerance=60.0)  # without a profile
