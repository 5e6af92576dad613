"""Band files of several resolutions are one image: on one grid, by their transforms, in place and converted."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from storage import ConvertOptions, Slide, UnsupportedImageError, convert, made_from, open_image, validate
from storage.place.location import files_of, scene_name, short_names, split_page

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed: pip install '.[geo]'")

SMALL = ConvertOptions(chunk=16, shard=32, min_level_size=8)
WEST, NORTH = 399960, 5800020  # of a tile of Sentinel-2
SIDE = 240  # pixels of 10 m


def write(path, pixels, metres, *, west=WEST, north=NORTH, crs="EPSG:32633", turn=0.0, **settings):
    """One band, with overviews by GDAL's average where `overviews` are given."""
    overviews = settings.pop("overviews", ())
    settings = {"nodata": 0, "tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"} | settings
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    count, height, width = pixels.shape
    shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype, "driver": "GTiff"}
    place = rasterio.Affine(metres, turn, west, turn, -metres, north)
    with rasterio.open(path, "w", crs=crs, transform=place, **shape, **settings) as file:
        file.write(pixels)
    if overviews:
        with rasterio.open(path, "r+") as file:
            file.build_overviews(overviews, rasterio.enums.Resampling.average)
    return str(path)


def band(metres, seed):
    side = SIDE * 10 // metres
    pixels = np.random.default_rng(seed).integers(1, 10_000, (side, side), dtype=np.uint16)
    pixels[: side // 4, : side // 4] = 0  # no data
    return pixels


@pytest.fixture
def sentinel(tmp_path):
    """Write bands of 10, 20 and 60 m, as they are named in a product: paths and pixels."""
    bands = {"B04": 10, "B8A": 20, "B01": 60}
    pixels = {name: band(metres, metres) for name, metres in bands.items()}
    paths = [
        write(tmp_path / f"T33UUU_20200101T101031_{name}_{metres}m.tif", pixels[name], metres, overviews=[2, 4])
        for name, metres in bands.items()
    ]
    return paths, pixels


def whole(slide, level=0):
    return slide.read(level, (0, 0, *slide.levels[level].shape_yx))


def test_bands_lie_on_the_finest_grid(sentinel):
    paths, pixels = sentinel
    with Slide(";".join(paths)) as slide:
        assert slide.name == "T33UUU_20200101T101031"
        assert (slide.channels, slide.shape_yx, slide.nodata) == (("B04", "B8A", "B01"), (SIDE, SIDE), 0)
        expected = [
            np.kron(pixels[name], np.ones((n, n), np.uint16)) for name, n in (("B04", 1), ("B8A", 2), ("B01", 6))
        ]
        np.testing.assert_array_equal(whole(slide), expected)
        with rasterio.open(paths[0]) as finest:
            assert slide.georeference.transform == tuple(finest.transform)[:6]
        boxes = [(-7, 13, 40, 50), (100, 111, 40, 50), (220, 230, 40, 50), (300, 0, 40, 50)]
        padded = np.pad(np.stack(expected), [(0, 0), (60, 120), (60, 120)], constant_values=9)
        for box, found in zip(boxes, slide.read_many(0, boxes, fill=9), strict=True):
            y, x, h, w = np.add(box, (60, 60, 0, 0))
            np.testing.assert_array_equal(found, padded[:, y : y + h, x : x + w])


def test_in_place_is_what_a_conversion_makes(sentinel, tmp_path):
    paths, _ = sentinel
    place = ";".join(paths)
    report = convert(place, tmp_path / "p.zarr", options=SMALL)
    assert report.shape == (3, SIDE, SIDE)
    assert convert(place, tmp_path / "p.zarr", options=SMALL).up_to_date
    assert made_from(tmp_path / "p.zarr", place)
    assert not made_from(tmp_path / "p.zarr", ";".join(paths[::-1]))
    assert validate(tmp_path / "p.zarr", source=place) == []
    with Slide(place) as there, Slide(tmp_path / "p.zarr") as pyramid, pickle.loads(pickle.dumps(there)) as again:
        assert pyramid.channels == there.channels
        assert pyramid.georeference == there.georeference
        assert again.identity == there.identity
        for level in range(3):
            np.testing.assert_array_equal(whole(there, level), whole(pyramid, level))


def test_levels_are_read_where_every_band_has_them(sentinel):
    """Of a band of 60 m there are pixels for a level of 20 m, and none for one of 40 m."""
    paths, _ = sentinel
    with Slide(";".join(paths)) as slide:
        assert [level.made_of for level in slide.levels] == [None, None, 2]
    with Slide(";".join(paths[:2])) as slide:
        before = slide.statistics
        slide.read(2, (0, 0, 60, 60))
        read = slide.statistics - before
        assert read.bytes_read < 30_000  # of levels of 40 m: 60 x 60 and 60 x 60 pixels of two bytes


def test_the_order_of_files_is_that_of_channels(sentinel):
    paths, pixels = sentinel
    with Slide(";".join(paths[::-1])) as slide:
        assert slide.channels == ("B01", "B8A", "B04")
        np.testing.assert_array_equal(whole(slide)[2], pixels["B04"])


def test_a_panchromatic_band_may_begin_half_a_pixel_before(tmp_path):
    """As Landsat's: the pixel in which a centre lies is taken."""
    coarse = np.arange(1, 101, dtype=np.uint16).reshape(10, 10)
    fine = np.arange(1, 442, dtype=np.uint16).reshape(21, 21)
    paths = [
        write(tmp_path / "x_B4.tif", coarse, 30, west=WEST + 7.5, north=NORTH - 7.5),
        write(tmp_path / "x_B8.tif", fine, 15),
    ]
    with Slide(";".join(paths)) as slide:
        rows = [min(max(int((15 * (i + 0.5) - 7.5) // 30), 0), 9) for i in range(21)]
        np.testing.assert_array_equal(whole(slide), [coarse[np.ix_(rows, rows)], fine])


def test_a_south_up_band_is_turned_over(tmp_path):
    pixels = band(10, 1)
    paths = [write(tmp_path / "a_B1.tif", pixels, 10), str(tmp_path / "a_B2.tif")]
    place = rasterio.Affine(10, 0, WEST, 0, 10, NORTH - SIDE * 10)
    shape = {"count": 1, "height": SIDE, "width": SIDE, "dtype": "uint16", "nodata": 0}
    with rasterio.open(paths[1], "w", driver="GTiff", crs="EPSG:32633", transform=place, **shape) as file:
        file.write(pixels[None, ::-1])
    with Slide(";".join(paths)) as slide:
        np.testing.assert_array_equal(whole(slide), [pixels, pixels])


def test_what_one_file_hides_is_hidden(tmp_path):
    hidden = np.full((SIDE, SIDE), 255, np.uint8)
    hidden[:30] = 0
    paths = [write(tmp_path / f"a_{name}.tif", band(10, 1), 10, nodata=None) for name in ("B1", "B2")]
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"), rasterio.open(paths[1], "r+") as file:
        file.write_mask(hidden)
    with Slide(";".join(paths)) as slide:
        assert (slide.channels, slide.alpha) == (("B1", "B2", "mask"), 2)
        np.testing.assert_array_equal(slide.valid(0, [(0, 0, SIDE, SIDE)])[0], hidden > 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"crs": "EPSG:32632"},
            r"b_B2.tif: is in EPSG:32632, and another .*a_B1.tif, in EPSG:32633; warp it: gdalwarp",
        ),
        ({"west": WEST + 45}, r"b_B2.tif: covers another area than .*a_B1.tif, by up to 2.2 of its pixels; cut them"),
        ({"turn": 1.0}, r"b_B2.tif: lies turned against .*a_B1.tif"),
        ({"nodata": 7}, r"b_B2.tif: has nodata 7.0, and .*a_B1.tif, 0.0; make them alike"),
        ({"crs": None}, r"b_B2.tif: is in no CRS, and"),
    ],
)
def test_what_does_not_lie_on_the_others_is_refused(tmp_path, change, match):
    paths = [write(tmp_path / "a_B1.tif", band(10, 1), 10), write(tmp_path / "b_B2.tif", band(20, 1), 20, **change)]
    for look in (Slide, open_image):
        with pytest.raises(UnsupportedImageError, match=match):
            look(";".join(paths))


def test_other_types_and_files_without_a_place_are_refused(tmp_path):
    import tifffile

    first = write(tmp_path / "a_B1.tif", band(10, 1), 10)
    other = write(tmp_path / "a_SCL.tif", band(20, 1).astype(np.uint8), 20)
    with pytest.raises(
        UnsupportedImageError, match="a_SCL.tif: has numbers of type uint8, and .* uint16; make them alike"
    ):
        Slide(f"{first};{other}")
    tifffile.imwrite(tmp_path / "plain.tif", band(10, 1))
    with pytest.raises(UnsupportedImageError, match="plain.tif: has no place on the Earth, by which it could lie on"):
        Slide(f"{first};{tmp_path / 'plain.tif'}")


def test_names_are_those_of_the_files_or_of_what_tells_them_apart(tmp_path):
    product = [f"https://x.org/T32TQM_20200101_{band}.tif" for band in ("B04_10m", "B05_20m", "B01_60m")]
    assert short_names(product) == ["B04", "B05", "B01"]
    assert scene_name(product) == "T32TQM_20200101"
    assert short_names(["a/B04_10m.tif", "a/B04_20m.tif"]) == ["10m", "20m"]
    assert (short_names(["s/red.tif", "s/nir.tif"]), scene_name(["s/red.tif", "s/nir.tif"])) == (["red", "nir"], "s")
    assert short_names(["a/x.tif", "b/x.tif"]) == ["0", "1"]
    pair = np.stack([band(10, 1), band(10, 2)])
    paths = [write(tmp_path / "s_swir.tif", band(20, 1), 20), write(tmp_path / "s_vis.tif", pair, 10)]
    with Slide(";".join(paths)) as slide:
        assert slide.channels == ("swir", "vis_0", "vis_1")
    for path, names in zip(paths, (("SWIR",), ("red", "green")), strict=True):
        with rasterio.open(path, "r+") as file:
            file.descriptions = names
    with Slide(";".join(paths)) as slide:
        assert slide.channels == ("SWIR", "red", "green")


def test_a_file_that_is_really_named_so_is_one_file(tmp_path):
    odd = tmp_path / "a;b.tif"
    assert files_of(str(odd)) == [f"{tmp_path}/a", "b.tif"]
    write(odd, band(10, 1), 10)
    assert files_of(odd) == [str(odd)]
    with Slide(odd) as slide:
        assert len(slide.channels) == 1
    paged = tmp_path / "c.tif#page=1"
    assert split_page(paged) == (str(tmp_path / "c.tif"), 1)
    write(paged, band(10, 1), 10)
    assert split_page(paged) == (str(paged), None)
    assert split_page("x.tif#page=two") == ("x.tif#page=two", None)
