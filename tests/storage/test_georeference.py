"""Where scenes lie on the Earth: as rasterio reads their GeoTIFFs, in place and in the pyramids made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from storage import ConversionError, ConvertOptions, CorruptImageError, Slide, convert, open_image, write_pyramid
from storage.format.georeference import GeoKeys, Georeference, from_json, to_json
from storage.format.ome_zarr import seal
from storage.images.geotiff import crs_file

SMALL = ConvertOptions(chunk=16, shard=32, min_level_size=8)
NORTH_UP = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
TRANSFORMS = {
    "north-up": NORTH_UP,
    "south-up": (10.0, 0.0, 500000.0, 0.0, 10.0, 5000000.0),
    "mirrored": (-10.0, 0.0, 500000.0, 0.0, -12.0, 5000000.0),
    "rotated": (8.0, 6.0, 500000.0, 6.0, -8.0, 5000000.0),
    "sheared": (8.0, 1.5, 500000.0, -0.5, -8.0, 5000000.0),
}
USER_DEFINED = "+proj=laea +lat_0=47.25 +lon_0=11.5 +x_0=1000 +y_0=2000 +ellps=GRS80 +units=m +no_defs"


@pytest.fixture(scope="module")
def rasterio():
    return pytest.importorskip("rasterio", reason="rasterio is not installed: pip install '.[geo]'")


@pytest.fixture
def scene(rasterio, tmp_path):
    """Write a GeoTIFF with rasterio."""
    from affine import Affine

    def write(transform=NORTH_UP, crs="EPSG:32632", name="scene.tif", **settings):
        path, tags = tmp_path / name, settings.pop("tags", {})
        size = {"width": 70, "height": 50, "count": 1, "dtype": "uint8"}
        with rasterio.open(
            path, "w", driver="GTiff", crs=crs, transform=Affine(*transform), **size, **settings
        ) as to:
            to.write(np.arange(3500, dtype=np.uint8).reshape(1, 50, 70))
            to.update_tags(**tags)
        return path

    return write


def real(name):
    folder = os.environ.get("NESTED_ATS_DATA")
    path = Path(folder or "", "wsi-flavours", name)
    if not folder or not path.is_file():
        pytest.skip(f"NESTED_ATS_DATA does not hold wsi-flavours/{name}")
    return path


def tagged(path, tags, **settings):
    """A TIFF with such georeference tags, by tifffile."""
    extra = [(tag, "H" if tag == 34735 else "d", len(value), value, True) for tag, value in tags.items()]
    tifffile.imwrite(path, np.zeros((50, 70), np.uint8), photometric="minisblack", extratags=extra, **settings)
    return path


class TestAsRasterioReadsIt:
    @pytest.mark.parametrize("kind", TRANSFORMS)
    @pytest.mark.parametrize("registration", ["Area", "Point"])
    def test_in_place_and_in_the_pyramid(self, rasterio, scene, tmp_path, kind, registration):
        path = scene(TRANSFORMS[kind], tags={"AREA_OR_POINT": registration})
        convert(path, tmp_path / "p.zarr", options=SMALL)
        with rasterio.open(path) as expected, Slide(path) as there, Slide(tmp_path / "p.zarr") as pyramid:
            for slide in (there, pyramid):
                assert slide.georeference.transform == pytest.approx(tuple(expected.transform)[:6], abs=1e-6)
                assert (slide.georeference.crs, slide.mpp) == (32632, None)
                x, y = slide.georeference.place([(30.5, 20.5)])[0]
                assert (x, y) == pytest.approx(expected.xy(20, 30), abs=1e-6)

    @pytest.mark.parametrize("name", ["RGB.byte.tif", "cog.tif"])
    def test_real_scenes(self, rasterio, tmp_path, name):
        path = real(name)
        convert(path, tmp_path / "p.zarr")
        with rasterio.open(path) as expected, Slide(path) as there, Slide(tmp_path / "p.zarr") as pyramid:
            assert there.georeference == pyramid.georeference
            assert there.georeference.crs == expected.crs.to_epsg()
            assert there.georeference.transform == pytest.approx(tuple(expected.transform)[:6], rel=1e-12)

    @pytest.mark.parametrize("crs", [None, "EPSG:4326", "EPSG:3857"])
    def test_crs_of_each_kind(self, scene, crs):
        transform = (0.01, 0.0, 11.0, 0.0, -0.01, 47.0)
        with open_image(scene(transform, crs)) as image:
            assert image.georeference.crs == (crs and int(crs[5:]))
            assert image.georeference.transform == pytest.approx(transform)

    def test_crs_of_no_authority_keeps_its_keys(self, rasterio, scene, tmp_path):
        path = scene(crs=USER_DEFINED)
        convert(path, tmp_path / "p.zarr", options=SMALL)
        with Slide(path) as there, Slide(tmp_path / "p.zarr") as pyramid:
            assert there.georeference == pyramid.georeference
            keys = pyramid.georeference.crs
        assert isinstance(keys, GeoKeys)
        with rasterio.open(path) as expected, rasterio.MemoryFile(crs_file(keys)) as file, file.open() as found:
            assert found.crs == expected.crs
            assert found.crs.to_epsg() is None

    def test_no_place_no_georeference(self, scene, tmp_path):
        tifffile.imwrite(tmp_path / "plain.tif", np.zeros((50, 70), np.uint8))
        for path in (tmp_path / "plain.tif", write_png(tmp_path / "plain.png")):
            with Slide(path) as slide:
                assert slide.georeference is None


def write_png(path):
    import matplotlib.image

    matplotlib.image.imsave(path, np.zeros((20, 30)))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_it_with_the_pixels(tmp_path, orientation):
    """What is stored at column 12 and row 7 stays where it is."""
    tags = {33550: (10.0, 10.0, 0.0), 33922: (0.0, 0.0, 0.0, 500.0, 900.0, 0.0)}
    pixels = np.zeros((50, 70), np.uint8)
    pixels[7, 12] = 255
    extra = [(tag, "d", len(value), value, True) for tag, value in tags.items()] + [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", extratags=extra)
    with Slide(tmp_path / "x.tif") as slide:
        [[row, column]] = np.argwhere(slide.read(0, (0, 0, *slide.shape_yx))[0])
        assert tuple(slide.georeference.place([(column + 0.5, row + 0.5)])[0]) == (625, 825)


PLACED = {33550: (10.0, 10.0, 0.0), 33922: (0.0, 0.0, 0.0, 500.0, 900.0, 0.0)}


@pytest.mark.parametrize(
    "tags",
    [
        {33550: (10.0, 10.0, 0.0)},
        {33922: (0.0, 0.0, 0.0, 500.0, 900.0, 0.0) * 3},  # ground control points
        PLACED | {33550: (0.0, 10.0, 0.0)},
        PLACED | {33550: (np.nan, 10.0, 0.0)},
        PLACED | {33550: (1e300, 10.0, 0.0)},
        PLACED | {33922: (0.0, 0.0, 0.0, np.inf, 900.0, 0.0)},
        {34264: (1.0, 2.0, 0.0, 0.0, 2.0, 4.0, *[0.0] * 10)},  # flat
        {34264: (1.0, 2.0)},
        {33550: (10.0,), 33922: (0.0,)},
    ],
)
def test_tags_that_place_nothing_are_none(tmp_path, tags):
    with open_image(tagged(tmp_path / "x.tif", tags)) as image:
        assert image.georeference is None


@pytest.mark.parametrize(
    "directory",
    [(1, 1, 0, 1), (1, 1, 0, 9, 1024, 0, 1, 1), (7,), (1, 1, 0, 1, 1024, 0, 1, 1), (1, 1, 0, 1, 3072, 9, 9, 9)],
)
def test_keys_without_sense_are_no_crs(tmp_path, directory):
    with open_image(tagged(tmp_path / "x.tif", PLACED | {34735: directory})) as image:
        assert image.georeference == Georeference((10.0, 0.0, 500.0, 0.0, -10.0, 900.0), None)


@pytest.mark.parametrize("number", [0.5, 1e300, np.nan, 32632.0])
def test_keys_that_are_no_integers_are_no_crs(tmp_path, number):
    directory = (1.0, 1.0, 0.0, 1000.0, *[3072.0, 0.0, 1.0, number] * 1000)
    tags = [(tag, "d", len(value), value, True) for tag, value in {**PLACED, 34735: directory}.items()]
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((50, 70), np.uint8), photometric="minisblack", extratags=tags)
    with open_image(tmp_path / "x.tif") as image:
        assert image.georeference.crs is None


@pytest.mark.parametrize("text", [b"a\xff\xfe|", "Österreich|".encode(), b"|" * 70000])
def test_texts_of_keys(tmp_path, text):
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1026, 34737, min(len(text), 65535), 0, 3072, 0, 1, 32767)
    tags = [(tag, "d", len(value), value, True) for tag, value in PLACED.items()]
    tags += [(34735, "H", len(keys), keys, True), (34737, "s", 0, text, True)]
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((50, 70), np.uint8), photometric="minisblack", extratags=tags)
    with open_image(tmp_path / "x.tif") as image:
        crs = image.georeference.crs
        assert (crs is None) == (len(text) > 65536)
        assert crs is None or crs_file(crs)
        assert from_json(json.loads(json.dumps(to_json(image.georeference)))) == image.georeference


class TestPyramid:
    def test_attributes_by_the_conventions_of_geozarr(self, tmp_path):
        keys = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32632)
        convert(tagged(tmp_path / "x.tif", PLACED | {34735: keys}), tmp_path / "p.zarr", options=SMALL)
        group = zarr.open_group(tmp_path / "p.zarr", mode="r")
        nodes = [(1, group), *((2**i, group[str(i)]) for i in range(3))]
        for scale, node in nodes:
            attributes = dict(node.attrs)
            assert attributes["proj:code"] == "EPSG:32632"
            assert attributes["spatial:dimensions"] == ["y", "x"]
            assert attributes["spatial:transform"] == [10 * scale, 0, 500, 0, -10 * scale, 900]
            assert attributes["spatial:shape"] == [-(-50 // scale), -(-70 // scale)]
            assert {each["name"] for each in attributes["zarr_conventions"]} == {"proj:", "spatial"}
        alone = json.loads((tmp_path / "p.zarr/1/zarr.json").read_bytes())["attributes"]
        assert alone == dict(group["1"].attrs)

    def test_without_a_place_nothing_is_added(self, tmp_path):
        write_pyramid(tmp_path / "p.zarr", np.zeros((1, 30, 40), np.uint8))
        root = json.loads((tmp_path / "p.zarr/zarr.json").read_bytes())
        assert set(root["attributes"]) == {"ome", "nested_ats"}
        assert "georeference" not in root["attributes"]["nested_ats"]
        with Slide(tmp_path / "p.zarr") as slide:
            assert slide.georeference is None

    def test_of_an_array(self, tmp_path):
        place = Georeference(TRANSFORMS["rotated"], 32632)
        write_pyramid(tmp_path / "p.zarr", np.zeros((1, 30, 40), np.uint8), georeference=place)
        with Slide(tmp_path / "p.zarr") as slide:
            assert slide.georeference == place

    def test_one_of_before_opens_and_is_made_again_if_asked(self, tmp_path):
        path = tagged(tmp_path / "x.tif", PLACED)
        convert(path, tmp_path / "p.zarr", options=SMALL)
        root = json.loads((tmp_path / "p.zarr/zarr.json").read_bytes())
        own = root["attributes"]["nested_ats"]
        assert own.pop("georeference") == own["provenance"].pop("georeference")
        seal(root)
        (tmp_path / "p.zarr/zarr.json").write_text(json.dumps(root))
        with Slide(tmp_path / "p.zarr") as slide:
            assert slide.georeference is None
        with pytest.raises(ConversionError, match="its georeference differs"):
            convert(path, tmp_path / "p.zarr", options=SMALL)
        convert(path, tmp_path / "p.zarr", options=SMALL, overwrite=True)
        assert convert(path, tmp_path / "p.zarr", options=SMALL).up_to_date

    @pytest.mark.parametrize(
        "lie",
        [
            1,
            {},
            {"transform": [1, 0, 0, 0, 1]},
            {"transform": [1, 0, 0, 1, 0, 0]},
            {"transform": [1e19, 0, 0, 0, 1, 0]},
            {"transform": [1, 0, 0, 0, 1, 0], "epsg": "EPSG:4326"},
            {"transform": [1, 0, 0, 0, 1, 0], "epsg": 32767},
            {"transform": [1, 0, 0, 0, 1, 0], "geokeys": 3},
            {"transform": [1, 0, 0, 0, 1, 0], "geokeys": {"directory": [1] * 5000, "doubles": [], "text": ""}},
            {"transform": [1, 0, 0, 0, 1, 0], "geokeys": {"directory": [-1], "doubles": [], "text": ""}},
            {"transform": [1, 0, 0, 0, 1, 0], "geokeys": {"directory": [1], "doubles": ["x"], "text": ""}},
        ],
    )
    def test_a_damaged_one_is_damage(self, tmp_path, lie):
        write_pyramid(tmp_path / "p.zarr", np.zeros((1, 30, 40), np.uint8))
        root = json.loads((tmp_path / "p.zarr/zarr.json").read_bytes())
        root["attributes"]["nested_ats"]["georeference"] = lie
        seal(root)
        (tmp_path / "p.zarr/zarr.json").write_text(json.dumps(root))
        with pytest.raises(CorruptImageError, match="damaged metadata"):
            Slide(tmp_path / "p.zarr")


@pytest.mark.parametrize("crs", [None, 4326, GeoKeys((1, 1, 0, 0), (1.5,), "of ours|")])
def test_it_survives_json(crs):
    place = Georeference(TRANSFORMS["sheared"], crs)
    assert from_json(json.loads(json.dumps(to_json(place)))) == place
    assert from_json(None) is None


def test_scaled_keeps_the_corner():
    place = Georeference(TRANSFORMS["sheared"], None)
    np.testing.assert_allclose(place.scaled(4).place([(3, 2)]), place.place([(12, 8)]))
