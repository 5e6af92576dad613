"""Level 0 against tifffile, coarser levels against a numpy oracle, over layouts of TIFF."""

import itertools
import json
import math

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import ConversionError, ConvertOptions, Slide, UnsupportedImageError, convert, write_pyramid, write_tiff

SMALL = ConvertOptions(chunk=16, shard=64, min_level_size=8)
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def whole(slide, level=0):
    return slide.read(level, (0, 0, *slide.levels[level].shape_yx))


def as_chw(pixels, axes):
    if axes == "YX":
        return pixels[None]
    return pixels.transpose(2, 0, 1) if axes == "YXS" else pixels


@st.composite
def tiffs(draw):
    """Shape, dtype and tifffile settings of a TIFF."""
    height, width = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    axes = draw(st.sampled_from(["YX", "YXS", "SYX", "CYX"]))
    channels = 1 if axes == "YX" else draw(st.integers(3, 4)) if axes != "CYX" else draw(st.integers(2, 5))
    dtype = draw(st.sampled_from(["uint8", "uint16", "float32"]))
    compressions = [None, "deflate", "lzw", "zstd", "packbits"]
    compressions += ["jpeg"] if dtype == "uint8" else []
    compressions += ["webp"] if dtype == "uint8" and axes == "YXS" else []
    compressions += ["jpeg2000"] if dtype != "float32" else []
    compression = draw(st.sampled_from(compressions))
    options = {"compression": compression, "bigtiff": draw(st.booleans()), "byteorder": draw(st.sampled_from("<>"))}
    if compression == "jpeg2000":
        options["byteorder"] = "<"  # tifffile's encoder swaps the bytes of the stream too
    if draw(st.booleans()):
        options["tile"] = (16 * draw(st.integers(1, 6)), 16 * draw(st.integers(1, 6)))
    elif compression == "jpeg":
        options["rowsperstrip"] = 8 * draw(st.integers(1, 8))
    else:
        options["rowsperstrip"] = draw(st.integers(1, 100))
    if compression in ("deflate", "lzw", "zstd") and draw(st.booleans()):
        options["predictor"] = True
    if axes in ("YXS", "SYX"):
        options["photometric"] = "rgb"
        options["planarconfig"] = "contig" if axes == "YXS" else "separate"
        options["extrasamples"] = ["unspecified"] if channels == 4 else None  # of alpha: test_masks
    else:
        options["photometric"] = "minisblack"
    if axes == "CYX":
        options |= {"ome": True, "metadata": {"axes": "CYX"}}
    return (channels, height, width), dtype, axes, options


@RELAXED
@given(tiffs())
def test_every_level_equals_its_oracle(tmp_path_factory, textured, halve, case):
    shape, dtype, axes, options = case
    folder = tmp_path_factory.mktemp("case")
    pixels = textured(shape, dtype)
    stored = pixels[0] if axes == "YX" else pixels.transpose(1, 2, 0) if axes == "YXS" else pixels
    path = folder / ("image.ome.tif" if axes == "CYX" else "image.tif")
    tifffile.imwrite(path, stored, **options)
    expected = as_chw(tifffile.imread(path).reshape(stored.shape), axes)
    if options["compression"] != "jpeg":
        assert np.array_equal(expected, pixels)
    report = convert(path, folder / "p.zarr", options=SMALL, workers=2)
    assert report.shape == shape
    with Slide(folder / "p.zarr") as slide:
        assert slide.dtype == dtype
        for level in range(len(slide.levels)):
            actual = whole(slide, level)
            if dtype == "float32" and level:
                np.testing.assert_allclose(actual, expected, rtol=1e-5)
                expected = actual
            else:
                np.testing.assert_array_equal(actual, expected)
            expected = halve(expected)
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (130, 1), (2, 2), (65, 129)])
def test_level_shapes_halve_upwards_until_small(tmp_path, textured, shape):
    write_pyramid(tmp_path / "p.zarr", textured((1, *shape)), options=SMALL)
    with Slide(tmp_path / "p.zarr") as slide:
        shapes = [level.shape_yx for level in slide.levels]
    assert shapes[0] == shape
    assert len(shapes) >= 2
    for finer, coarser in itertools.pairwise(shapes):
        assert coarser == (math.ceil(finer[0] / 2), math.ceil(finer[1] / 2))
    assert max(shapes[-1]) <= 8
    assert len(shapes) == 2 or max(shapes[-2]) > 8


def test_values_are_rounded_half_up_and_never_rescaled(tmp_path):
    pixels = np.array([[[0, 1, 255], [1, 0, 255], [65535, 65535, 3]]], np.uint16)
    write_pyramid(tmp_path / "p.zarr", pixels, options=SMALL)
    with Slide(tmp_path / "p.zarr") as slide:
        assert slide.read(1, (0, 0, 2, 2)).tolist() == [[[1, 255], [65535, 3]]]


def test_nan_stays_nan_and_is_not_averaged(tmp_path):
    pixels = np.ones((1, 40, 40), np.float32)
    pixels[0, 5, 7], pixels[0, 8:10, 2:4] = np.nan, np.nan
    write_pyramid(tmp_path / "p.zarr", pixels, options=SMALL)
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(whole(slide), pixels)
        assert np.argwhere(np.isnan(whole(slide, 1)[0])).tolist() == [[4, 1]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_extreme_numbers_are_averaged_without_a_warning(tmp_path, dtype):
    """Warnings are errors here."""
    pixels = np.zeros((40, 40), dtype)
    largest = np.finfo(dtype).max
    pixels[0, :2], pixels[0, 2:4], pixels[0, 4:6] = (np.inf, -np.inf), (largest, largest), (np.nan, 1)
    pixels[1, 2:4] = largest
    tifffile.imwrite(tmp_path / "x.tif", pixels)
    convert(tmp_path / "x.tif", tmp_path / "p.zarr", options=SMALL)
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(whole(slide)[0], pixels)
        third = slide.dtype.type(1 / 3)
        np.testing.assert_array_equal(whole(slide, 1)[0, 0, :4], [np.nan, np.float64(largest), third, 0])


def test_svs_baseline(tmp_path, svs):
    report = convert(svs, tmp_path / "p.zarr")
    expected = tifffile.imread(svs, series=0).transpose(2, 0, 1)
    assert report.mpp == pytest.approx(0.499)
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(whole(slide), expected)
        assert slide.mpp == pytest.approx(0.499)
        assert slide.channels == ("R", "G", "B")


def test_of_a_pyramidal_ome_tiff_the_finest_level_is_read(tmp_path, textured):
    pixels = textured((3, 200, 160)).transpose(1, 2, 0)
    with tifffile.TiffWriter(tmp_path / "image.ome.tif") as writer:
        options = {"tile": (32, 32), "photometric": "rgb", "compression": "deflate"}
        sizes = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 500, "PhysicalSizeYUnit": "nm"}
        writer.write(pixels, subifds=1, metadata=sizes, **options)
        writer.write(pixels[::2, ::2], subfiletype=1, **options)
    convert(tmp_path / "image.ome.tif", tmp_path / "p.zarr", options=SMALL)
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(whole(slide), pixels.transpose(2, 0, 1))
        assert slide.mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "mpp"),
    [
        ({"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}, 0.25),
        ({"resolution": (25400, 25400), "resolutionunit": "INCH"}, 1.0),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (40000, 40000), "resolutionunit": "NONE"}, None),
        ({}, None),
    ],
)
def test_pixel_size_from_resolution_tags_where_plausible(tiff, tmp_path, settings, mpp):
    path, _ = tiff(40, 40, **settings)
    assert convert(path, tmp_path / "p.zarr", options=SMALL).mpp == pytest.approx(mpp)
    with Slide(tmp_path / "p.zarr") as slide:
        assert slide.mpp == pytest.approx(mpp)


def test_given_pixel_size_overrules_the_file(tiff, tmp_path):
    path, _ = tiff(40, 40, resolution=(40000, 40000), resolutionunit="CENTIMETER")
    options = ConvertOptions(chunk=16, shard=64, mpp=0.5)
    assert convert(path, tmp_path / "p.zarr", options=options).mpp == 0.5


def test_long_strips_are_decoded_once_per_band(tmp_path, textured, monkeypatch):
    from storage.images.tiff import TiffImage

    pixels = textured((3, 256, 300))
    tifffile.imwrite(
        tmp_path / "s.tif", pixels.transpose(1, 2, 0), rowsperstrip=16, compression="zstd", photometric="rgb"
    )
    decoded = []
    original = TiffImage._segment
    monkeypatch.setattr(
        TiffImage, "_segment", lambda self, plane, i, *box: decoded.append(i) or original(self, plane, i, *box)
    )
    convert(tmp_path / "s.tif", tmp_path / "p.zarr", options=SMALL, workers=2)
    assert sorted(decoded) == list(range(16))
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(whole(slide), pixels)


def test_wide_images_have_smaller_shards_rather_than_more_memory(tmp_path, textured):
    write_pyramid(tmp_path / "p.zarr", textured((20, 40, 40), "float32"))
    with Slide(tmp_path / "p.zarr") as slide:
        level = slide.levels[0]
        assert 20 * 4 * level.shard**2 <= 64 * 2**20
        assert level.shard % level.chunk == 0


def test_map_lies_over_its_slide(tmp_path):
    values = np.linspace(-1, 3, 12, dtype=np.float32).reshape(1, 3, 4)
    write_pyramid(tmp_path / "m.zarr", values, mpp=0.5, downsample=8, name="attention")
    ome = json.loads((tmp_path / "m.zarr/zarr.json").read_text())["attributes"]["ome"]
    first = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert first[0]["scale"] == [1.0, 4.0, 4.0]
    assert first[1]["translation"] == [0.0, 0.5 * 3.5, 0.5 * 3.5]
    assert ome["omero"]["channels"][0]["window"]["end"] == 3.0
    with Slide(tmp_path / "m.zarr") as slide:
        assert slide.name == "attention"
        assert slide.levels[0].translation_yx == (1.75, 1.75)
        np.testing.assert_array_equal(whole(slide), values)


def test_progress_counts_every_byte_once(tiff, tmp_path):
    path, _ = tiff(200, 140)
    seen = []
    report = convert(path, tmp_path / "p.zarr", options=SMALL, workers=2, progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.raw_bytes, report.raw_bytes)
    assert len(seen) == 1 + report.shards
    assert seen[0] == (0, report.raw_bytes)


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "zstd", "jpeg"])
@pytest.mark.parametrize("shape", [(100, 130, 3), (100, 130)])
def test_write_tiff_writes_what_tifffile_reads(tmp_path, rng, shape, compression):
    smooth = np.kron(rng.integers(0, 255, (8, 9)), np.ones((16, 16)))[:100, :130].astype(np.uint8)
    pixels = np.stack([smooth] * 3, -1) if len(shape) == 3 else smooth
    tiles = (pixels[y : y + 32, x : x + 32] for y in range(0, 100, 32) for x in range(0, 130, 32))
    write_tiff(tmp_path / "t.tif", tiles, shape=shape, dtype="uint8", tile=32, compression=compression, mpp=0.25)
    actual = tifffile.imread(tmp_path / "t.tif")
    assert actual.shape == shape
    assert np.abs(actual.astype(int) - pixels).max() <= (40 if compression == "jpeg" else 0)
    assert convert(tmp_path / "t.tif", tmp_path / "p.zarr").mpp == pytest.approx(0.25)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_write_tiff_leaves_nothing_when_its_tiles_fail(tmp_path):
    def tiles():
        yield np.zeros((32, 32), np.uint8)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_tiff(tmp_path / "t.tif", tiles(), shape=(64, 64), dtype="uint8", tile=32)
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked():
    for wrong in (
        {"codec": "gzip"},
        {"chunk": 100},
        {"shard": 64},
        {"mpp": -1.0},
        {"min_level_size": 0},
        {"chunk": 1001, "shard": 2002},
    ):
        with pytest.raises(ValueError, match="must"):
            ConvertOptions(**wrong)


@pytest.mark.parametrize("dtype", [">u2", ">i2", ">f4", "<f8"])
def test_arrays_of_any_byte_order_are_kept(tmp_path, dtype):
    pixels = np.arange(-8, 8).reshape(1, 4, 4).astype(dtype)
    write_pyramid(tmp_path / "p.zarr", pixels, options=SMALL)
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(whole(slide), pixels)


def test_layouts_that_readers_refuse_are_not_written(tmp_path, textured):
    with pytest.raises(ConversionError, match="choose another chunk"):
        write_pyramid(tmp_path / "p.zarr", textured((3, 9, 9)), options=ConvertOptions(chunk=16384, shard=16384))
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_other_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint64"):
        write_pyramid(tmp_path / "p.zarr", np.zeros((1, 4, 4), np.uint64))
    with pytest.raises(ValueError, match="expected"):
        write_pyramid(tmp_path / "p.zarr", np.zeros((4, 4), np.uint8))


def test_stacks_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "z.tif", np.zeros((5, 40, 40), np.uint8), photometric="minisblack")
    with pytest.raises(UnsupportedImageError, match=r"z\.tif: a stack of 5 pages, not one image; keep the first"):
        convert(tmp_path / "z.tif", tmp_path / "p.zarr")
