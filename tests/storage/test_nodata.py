"""Pixels that hold no data: kept as they are, named, and never averaged with others, converted or in place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile

from storage import ConversionError, ConvertOptions, CorruptImageError, Slide, convert, open_image, validate
from storage.format.nodata import fitting, from_json, to_json
from storage.format.ome_zarr import seal
from storage.images.halving import downsample

from .test_foreign import write_foreign

SMALL = ConvertOptions(chunk=16, shard=32, min_level_size=8)
NODATA = {"uint8": 0, "uint16": 65535, "int16": -32768, "float32": -3.4028234663852886e38, "float64": np.nan}


def scene(dtype, nodata, shape=(2, 75, 102), seed=0):
    """(C, H, W) pixels with a border and single gaps that hold no data, in each channel others."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 250, shape).astype(dtype)
    pixels[rng.random(shape) < 0.2] = nodata
    pixels[:, :40, :33] = nodata
    pixels[0, 60:, 50:] = nodata
    return pixels


def write(path, pixels, nodata, **settings):
    """A planar TIFF with GDAL's tag."""
    tags = [(42113, "s", 0, str(nodata), True)]
    settings = {"photometric": "minisblack", "tile": (16, 16)} | settings
    if len(pixels) > 1:
        settings["planarconfig"] = "separate"
    tifffile.imwrite(path, pixels, extratags=tags, **settings)
    return path


def mean_of_data(pixels, nodata):
    """The oracle, in float64: the mean of what each 2x2 block has."""
    c, h, w = pixels.shape
    padded = np.full((c, h + h % 2, w + w % 2), np.nan)
    padded[:, :h, :w] = np.where(pixels == pixels.dtype.type(nodata), np.nan, pixels.astype(np.float64))
    blocks = padded.reshape(c, (h + 1) // 2, 2, (w + 1) // 2, 2).transpose(0, 1, 3, 2, 4)
    count = (~np.isnan(blocks)).sum((-1, -2))
    mean = np.nansum(blocks, (-1, -2)) / np.maximum(count, 1)
    mean = mean if pixels.dtype.kind == "f" else np.floor(mean + 0.5)
    return np.where(count > 0, mean, nodata).astype(pixels.dtype)


def whole(slide, level=0):
    return slide.read(level, (0, 0, *slide.levels[level].shape_yx))


@pytest.mark.parametrize("dtype", NODATA)
def test_it_is_not_averaged_wherever_levels_are_made(tmp_path, dtype):
    nodata = NODATA[dtype]
    pixels = scene(dtype, nodata)
    path = write(tmp_path / "x.tif", pixels, nodata)
    convert(path, tmp_path / "p.zarr", options=SMALL)
    with Slide(path) as there, Slide(tmp_path / "p.zarr") as pyramid:
        for slide in (there, pyramid):
            np.testing.assert_equal(slide.nodata, np.dtype(dtype).type(nodata))
            np.testing.assert_array_equal(whole(slide), pixels)
        expected = pixels
        for level in (1, 2, 3):
            expected = mean_of_data(expected, nodata)
            np.testing.assert_allclose(whole(pyramid, level), expected, rtol=1e-5)
            if level < len(there.levels):
                np.testing.assert_array_equal(whole(there, level), whole(pyramid, level))
    assert validate(tmp_path / "p.zarr", source=path) == []


def test_a_mean_that_comes_out_as_the_value_is_raised():
    pixels = np.array([[[99, 101], [100, 100]], [[100, 100], [100, 100]], [[3, 100], [4, 100]]], np.uint8)
    assert downsample(pixels, nodata=100)[:, 0, 0].tolist() == [101, 100, 4]
    floats = np.array([[[-1, 1], [-2, 2]]], np.float32)
    assert 0 < downsample(floats, nodata=0)[0, 0, 0] < 1e-30


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_blocks_without_gaps_are_averaged_as_ever(rng, dtype):
    """Wherever a gap lies, the means around it are bit for bit those that there are without one."""
    pixels = (rng.random((2, 301, 203)) * 250 + 1).astype(dtype)
    expected = downsample(pixels)
    np.testing.assert_array_equal(downsample(pixels, nodata=0), expected)
    pixels[1, 10, 11] = 0
    different = downsample(pixels, nodata=0) != expected
    assert np.argwhere(different).tolist() in ([[1, 5, 5]], [])


def test_infinities_of_both_signs_stay_no_number():
    pixels = np.array([[[np.inf, -np.inf], [1, np.nan]]], np.float32)
    assert np.isnan(downsample(pixels)).all()


def test_valid_are_pixels_with_data_in_any_channel(tmp_path):
    pixels = scene("int16", -32768)
    with Slide(write(tmp_path / "x.tif", pixels, -32768)) as slide:
        valid = slide.valid(0, [(-5, -3, 90, 110), (70, 90, 90, 110)])
        expected = np.zeros((2, 90, 110), bool)
        there = (pixels != -32768).any(0)
        expected[0, 5:80, 3:105], expected[1, :5, :12] = there, there[70:, 90:]
        np.testing.assert_array_equal(valid, expected)
        coarse = whole(slide, 1)
        np.testing.assert_array_equal(slide.valid(1, [(0, 0, 38, 51)])[0], (coarse != -32768).any(0))


def test_valid_of_floats_and_of_what_has_no_value(tmp_path):
    pixels = np.ones((20, 30), np.float32)
    pixels[:5] = np.nan
    tifffile.imwrite(tmp_path / "f.tif", pixels)
    tifffile.imwrite(tmp_path / "u.tif", pixels.astype(bool).astype(np.uint8))
    with Slide(tmp_path / "f.tif") as slide:
        assert slide.nodata is None
        np.testing.assert_array_equal(slide.valid(0, [(0, 0, 20, 30)])[0], ~np.isnan(pixels))
    with Slide(tmp_path / "u.tif") as slide:
        assert slide.valid(0, [(0, 0, 20, 30)]) is None


@pytest.mark.parametrize(
    ("text", "dtype", "found"),
    [
        ("0", "uint8", 0),
        ("-9999", "uint8", None),
        ("256", "uint8", None),
        ("0.5", "int16", None),
        ("nan", "uint16", None),
        ("65535,0", "uint16", 65535),
        ("1e999", "float32", np.inf),
        ("1e300", "float32", None),
        ("1e300", "float64", 1e300),
        ("0.1", "float32", float(np.float32(0.1))),
        ("none", "uint8", None),
        ("", "float32", None),
    ],
)
def test_a_value_is_one_that_pixels_can_have(tmp_path, text, dtype, found):
    path = write(tmp_path / "x.tif", np.ones((1, 20, 20), dtype), text)
    with open_image(path) as image:
        assert image.nodata == found


def test_one_bit_and_palettes(tmp_path):
    tags = [(42113, "s", 0, "1", True)]
    tifffile.imwrite(tmp_path / "b.tif", np.eye(20, dtype=bool), extratags=tags)
    colours = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(
        tmp_path / "p.tif", np.eye(20, dtype=np.uint8), photometric="palette", colormap=colours, extratags=tags
    )
    with open_image(tmp_path / "b.tif") as bits, open_image(tmp_path / "p.tif") as palette:
        assert (bits.nodata, palette.nodata) == (255, None)


@pytest.mark.parametrize("value", [-32768.0, 1e300, np.nan, np.inf, -np.inf])
def test_it_survives_json(value):
    text = json.dumps(to_json(value), allow_nan=False)
    np.testing.assert_equal(from_json(json.loads(text), np.dtype("float64")), value)


def test_a_pyramid_of_before_opens_and_is_made_again_if_asked(tmp_path):
    path = write(tmp_path / "x.tif", scene("int16", -32768), -32768)
    convert(path, tmp_path / "p.zarr", options=SMALL)
    root = json.loads((tmp_path / "p.zarr/zarr.json").read_bytes())
    own = root["attributes"]["nested_ats"]
    assert own.pop("nodata") == own["provenance"].pop("nodata") == -32768
    seal(root)
    (tmp_path / "p.zarr/zarr.json").write_text(json.dumps(root))
    with Slide(tmp_path / "p.zarr") as slide:
        assert slide.nodata is None
        assert slide.valid(0, [(0, 0, 9, 9)]) is None
    with pytest.raises(ConversionError, match="its nodata differs"):
        convert(path, tmp_path / "p.zarr", options=SMALL)
    convert(path, tmp_path / "p.zarr", options=SMALL, overwrite=True)
    assert convert(path, tmp_path / "p.zarr", options=SMALL).up_to_date


@pytest.mark.parametrize("lie", [1e9, 0.5, "nothing", [0], True])
def test_a_damaged_value_is_damage(tmp_path, lie):
    convert(write(tmp_path / "x.tif", scene("int16", -32768), -32768), tmp_path / "p.zarr", options=SMALL)
    root = json.loads((tmp_path / "p.zarr/zarr.json").read_bytes())
    root["attributes"]["nested_ats"]["nodata"] = lie
    seal(root)
    (tmp_path / "p.zarr/zarr.json").write_text(json.dumps(root))
    with pytest.raises(CorruptImageError, match="nodata is"):
        Slide(tmp_path / "p.zarr")


def test_other_writers_call_it_fill_value(tmp_path, textured):
    path = Path(write_foreign(tmp_path / "f.zarr", textured((3, 64, 64))))
    with Slide(path) as slide:
        assert slide.nodata is None
    array = json.loads((path / "0/zarr.json").read_bytes())
    for value, found in ((0, 0), ("AAA=", None), (-1, None)):
        array["attributes"] = {"_FillValue": value}
        (path / "0/zarr.json").write_text(json.dumps(array))
        with Slide(path) as slide:
            assert slide.nodata == found


def test_a_fitting_value_is_that_of_the_type():
    assert fitting(None, np.dtype("uint8")) is None
    assert fitting(7, np.dtype("uint8")) == 7


def test_a_real_scene(tmp_path):
    folder = os.environ.get("NESTED_ATS_DATA")
    path = Path(folder or "", "wsi-flavours/RGB.byte.tif")
    if not folder or not path.is_file():
        pytest.skip("NESTED_ATS_DATA does not hold wsi-flavours/RGB.byte.tif")
    convert(path, tmp_path / "p.zarr")
    with Slide(path) as there, Slide(tmp_path / "p.zarr") as pyramid:
        assert there.nodata == pyramid.nodata == 0
        pixels = whole(there)
        for level in range(1, len(there.levels)):
            pixels = mean_of_data(pixels, 0)
            np.testing.assert_array_equal(whole(pyramid, level), pixels)
            np.testing.assert_array_equal(whole(there, level), pixels)
        valid = there.valid(2, [(0, 0, *there.levels[2].shape_yx)])
        assert 0.5 < valid.mean() < 0.8
