"""Masks and alpha channels: kept, read with the pixels, and what they hide is never averaged into coarser levels."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tifffile

from storage import (
    ConversionError,
    ConvertOptions,
    CorruptImageError,
    Slide,
    UnsupportedImageError,
    convert,
    open_image,
    validate,
)
from storage.format.ome_zarr import seal
from storage.images.halving import downsample

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed: pip install '.[geo]'")

SMALL = ConvertOptions(chunk=16, shard=32, min_level_size=8)
SHAPE, EVEN = (150, 203), (152, 204)
GDAL_MASK = {"GDAL_TIFF_INTERNAL_MASK": "YES"}


def shown_area():
    """Where there is data: a block with a hole of a single pixel, and a speck of one pixel outside."""
    shown = np.zeros(SHAPE, np.uint8)
    shown[31:120, 40:160] = 255
    shown[77, 99] = 0
    shown[5, 7] = 255
    return shown


def scene(dtype, bands=3):
    return np.random.default_rng(0).integers(1, 200, (bands, *SHAPE)).astype(dtype)


def write(path, pixels, *, alpha=False, overviews=(), nodata=None, **more):
    """A GeoTIFF by GDAL with its mask, or with an alpha band."""
    settings = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "dtype": pixels.dtype, "tiled": True}
    settings |= {"blockxsize": 64, "blockysize": 64, "compress": "deflate", "nodata": nodata}
    settings |= {"count": len(pixels) + alpha, "crs": "EPSG:32633"} | more
    settings["transform"] = rasterio.Affine(10, 0, 500000, 0, -10, 5000000)
    with rasterio.Env(**GDAL_MASK):
        with rasterio.open(
            path, "w", **settings, **({"alpha": "yes", "photometric": "rgb"} if alpha else {})
        ) as file:
            file.write(pixels, list(range(1, len(pixels) + 1)))
            if alpha:
                file.write(shown_area().astype(pixels.dtype), len(pixels) + 1)
            else:
                file.write_mask(shown_area())
        if overviews:
            with rasterio.open(path, "r+") as file:
                file.build_overviews(overviews, rasterio.enums.Resampling.average)
    return path


def whole(slide, level=0):
    return slide.read(level, (0, 0, *slide.levels[level].shape_yx))


def mean_of_shown(pixels, shown):
    """The oracle, in float64: the mean of what each block of 2 x 2 shows, and 0 where it shows nothing."""
    c, h, w = pixels.shape
    padded = np.full((c, h + h % 2, w + w % 2), np.nan)
    padded[:, :h, :w] = np.where(shown, pixels.astype(np.float64), np.nan)
    blocks = padded.reshape(c, (h + 1) // 2, 2, (w + 1) // 2, 2)
    count = (~np.isnan(blocks)).sum((2, 4))
    mean = np.nansum(blocks, (2, 4)) / np.maximum(count, 1)
    mean = mean if pixels.dtype.kind == "f" else np.floor(mean + 0.5)
    return mean.astype(pixels.dtype), count[0] > 0


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("alpha", [False, True])
def test_what_is_hidden_is_not_averaged_wherever_levels_are_made(tmp_path, dtype, alpha):
    pixels, shown = scene(dtype), shown_area() > 0
    path = write(tmp_path / "x.tif", pixels, alpha=alpha)
    convert(path, tmp_path / "p.zarr", options=SMALL)
    with Slide(path) as there, Slide(tmp_path / "p.zarr") as pyramid:
        for slide in (there, pyramid):
            assert (slide.alpha, slide.data_channels) == (3, [0, 1, 2])
            assert slide.channels[3] == ("A" if alpha else "mask")
            np.testing.assert_array_equal(whole(slide)[:3], pixels)
            np.testing.assert_array_equal(whole(slide)[3] > 0, shown)
        if not alpha:
            assert whole(there)[3].max() == there.largest_value
        expected = pixels
        for level in (1, 2):
            expected, shown = mean_of_shown(expected, shown)
            np.testing.assert_allclose(whole(pyramid, level)[:3], expected, rtol=1e-6)
            np.testing.assert_array_equal(whole(pyramid, level), whole(there, level))
            for slide in (there, pyramid):
                np.testing.assert_array_equal(slide.valid(level, [(0, 0, *shown.shape)])[0], shown)
    assert validate(tmp_path / "p.zarr", source=path) == []


def test_the_levels_of_gdal_are_read_with_their_masks(tmp_path, monkeypatch):
    """They are those that we would make, to the value, where the sides are even."""
    monkeypatch.setattr(f"{__name__}.SHAPE", EVEN)
    path = write(tmp_path / "x.tif", scene("uint8"), overviews=[2, 4])
    import rasterio.shutil

    rasterio.shutil.copy(path, tmp_path / "cog.tif", driver="COG", compress="deflate", blocksize=128)
    plain = write(tmp_path / "plain.tif", scene("uint8"))
    with Slide(plain) as made:
        for place in (path, tmp_path / "cog.tif"):
            with Slide(place) as slide:
                assert [level.made_of for level in slide.levels[:3]] == [None, None, None]
                for level in range(3):
                    np.testing.assert_array_equal(whole(slide, level), whole(made, level))
                box = (-3, 90, 100, 100)
                np.testing.assert_array_equal(pickle.loads(pickle.dumps(slide)).read(1, box), made.read(1, box))


def test_a_level_without_its_mask_is_made_anew(tmp_path):
    """GDAL leaves none out, but files are joined by other programs."""
    pixels, shown = scene("uint8"), shown_area()
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(pixels.transpose(1, 2, 0), photometric="rgb", tile=(64, 64))
        tif.write(shown > 0, subfiletype=4, photometric=4, compression="deflate")
        tif.write(pixels[:, ::2, ::2].transpose(1, 2, 0), photometric="rgb", subfiletype=1)
    with Slide(tmp_path / "x.tif") as slide, Slide(write(tmp_path / "y.tif", pixels)) as other:
        assert slide.levels[1].made_of == 1
        np.testing.assert_array_equal(whole(slide, 1), whole(other, 1))


def test_nodata_and_a_mask_both_count(tmp_path):
    pixels = scene("int16")
    pixels[:, 50:60] = -99
    path = write(tmp_path / "x.tif", pixels, nodata=-99)
    with Slide(path) as slide:
        there = slide.valid(0, [(0, 0, *SHAPE)])[0]
    np.testing.assert_array_equal(there, (shown_area() > 0) & (pixels[0] != -99))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_is_turned_with_its_image(tmp_path, orientation):
    pixels, shown = scene("uint8", 1)[0], shown_area()
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(pixels, extratags=[(274, "H", 1, orientation, True)], tile=(64, 64))
        tif.write(shown > 0, subfiletype=4, photometric=4)
    turned = {3: lambda a: a[::-1, ::-1], 6: lambda a: a[::-1].T}[orientation]
    with open_image(tmp_path / "x.tif") as image:
        found = image.read(0, 0, *image.shape[1:])
    np.testing.assert_array_equal(found, np.stack([turned(pixels), turned(shown)]))


def test_a_grey_image_is_not_confused_with_the_mask_of_its_overview(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SHAPE", EVEN)
    path = write(tmp_path / "x.tif", scene("uint8", 1), overviews=[2])
    with Slide(path) as slide:
        assert slide.channels == ("0", "mask")
        np.testing.assert_array_equal(whole(slide, 1)[0], mean_of_shown(scene("uint8", 1), shown_area() > 0)[0][0])


def test_pages_have_masks_of_their_own(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        for value in (1, 2):
            tif.write(np.full((40, 40), value, np.uint8), metadata=None)
            mask = np.zeros((40, 40), bool)
            mask[value] = True
            tif.write(mask, subfiletype=4, photometric=4, metadata=None)
    for page, value in ((0, 1), (2, 2)):
        with open_image(tmp_path / "x.tif", pages=page) as image:
            pixels, shown = image.read(0, 0, 40, 40)
        assert set(pixels.flat) == {value}
        assert np.flatnonzero(shown.any(1)).tolist() == [value]


def test_a_png_hides_what_is_transparent(tmp_path):
    from PIL import Image

    pixels = np.dstack([scene("uint8").transpose(1, 2, 0), shown_area()])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with Slide(tmp_path / "x.png") as slide:
        assert slide.alpha == 3
        expected, shown = mean_of_shown(scene("uint8"), shown_area() > 0)
        np.testing.assert_array_equal(whole(slide, 1)[:3], expected)
        np.testing.assert_array_equal(slide.valid(1, [(0, 0, *shown.shape)])[0], shown)


def test_samples_that_are_no_opacity_are_bands(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", scene("uint16", 4).transpose(1, 2, 0), photometric="rgb", extrasamples=[0])
    with Slide(tmp_path / "x.tif") as slide:
        assert slide.alpha is None
        assert slide.valid(0, [(0, 0, 5, 5)]) is None


def test_a_mean_of_faint_opacity_is_not_none():
    pixels = np.zeros((2, 2, 2), np.uint8)
    pixels[:, 1, 1] = 9, 1
    assert downsample(pixels, alpha=1)[:, 0, 0].tolist() == [9, 1]


def test_a_mask_of_another_size_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(scene("uint8", 1)[0])
        tif.write(np.ones((40, 50), bool), subfiletype=4, photometric=4)
    with pytest.raises(
        UnsupportedImageError, match=r"x.tif: its mask has 40 x 50 pixels, .* 150 x 203; take .* away"
    ):
        Slide(tmp_path / "x.tif")


def test_a_mask_for_each_band_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(scene("uint8", 1)[0])
        tif.write(np.ones((*SHAPE, 3), np.uint8), subfiletype=1)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as tif:
        tif.pages[1].tags[254].overwrite(4)
    with pytest.raises(UnsupportedImageError, match=r"x.tif: its mask: one for each channel; make one of them"):
        Slide(tmp_path / "x.tif")


def test_a_damaged_mask_is_named(tmp_path):
    path = write(tmp_path / "x.tif", scene("uint8"))
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[1].aspage()
        offset, count = page.dataoffsets[2], page.databytecounts[2]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with Slide(path) as slide, pytest.raises(CorruptImageError, match=r"x.tif: its mask: tile \(\d, \d\) does not"):
        whole(slide)
    with pytest.raises(CorruptImageError, match="its mask"):
        convert(path, tmp_path / "p.zarr", options=SMALL)
    assert not (tmp_path / "p.zarr").exists()


def test_a_pyramid_of_before_is_made_anew_and_a_wrong_number_is_refused(tmp_path):
    path = write(tmp_path / "x.tif", scene("uint8"))
    convert(path, tmp_path / "p.zarr", options=SMALL)
    place = tmp_path / "p.zarr" / "zarr.json"
    root = json.loads(place.read_text())
    own = root["attributes"]["nested_ats"]
    own["alpha"] = 4
    seal(root)
    place.write_text(json.dumps(root))
    with pytest.raises(CorruptImageError, match="alpha is 4, not an integer of 0 to 3"):
        Slide(tmp_path / "p.zarr")
    del own["alpha"], own["provenance"]["alpha"]
    seal(root)
    place.write_text(json.dumps(root))
    with pytest.raises(ConversionError, match="its alpha differs"):
        convert(path, tmp_path / "p.zarr", options=SMALL)
