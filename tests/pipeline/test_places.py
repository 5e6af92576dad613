"""Scenes on the Earth: a point of known longitude and latitude keeps its place in all that is written of it."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.crs import gdal_crs, metres_per_pixel, to_wgs84
from pipeline.data.manifest import Entry
from pipeline.errors import DataError, UsageError
from pipeline.info import describe
from pipeline.results.drawn import Patch, to_geojson
from pipeline.results.heatmap import heatmaps
from pipeline.results.map_files import MAP, OBJECTS, PIXEL_OBJECTS, geotiff
from pipeline.results.places import has_data, in_wgs84
from storage import ConvertOptions, Slide, convert, write_pyramid
from storage.format.georeference import GeoKeys, Georeference

from ..storage.test_georeference import TRANSFORMS, USER_DEFINED, real
from .test_heatmap import CELL, bright_model, no_picture  # noqa: F401  fixtures

pytest.importorskip("rasterio", reason="rasterio is not installed: pip install '.[geo]'")
pytest.importorskip("pyproj", reason="pyproj is not installed: pip install '.[geo]'")

import pyproj
import rasterio

PLACED = ("omezarr", "geojson", "geotiff")
SPOT = (64, 96)  # row and column of the corner of a bright square of 16 pixels, and cells of the map begin there
SMALL = ConvertOptions(chunk=16, shard=64, min_level_size=8)


@pytest.fixture
def scene(tmp_path):
    """Write a dark GeoTIFF of 150 x 190 pixels with a bright square, by rasterio."""

    def write(transform=TRANSFORMS["north-up"], crs="EPSG:32632", name="scene", nodata=None, gap=0):
        pixels = np.random.default_rng(1).integers(1, 50, (3, 150, 190), dtype=np.uint8)
        pixels[:, SPOT[0] : SPOT[0] + 16, SPOT[1] : SPOT[1] + 16] = 242
        pixels[:, :gap] = 0
        path = tmp_path / f"{name}.tif"
        settings = {"width": 190, "height": 150, "count": 3, "dtype": "uint8", "nodata": nodata}
        place = None if transform is None else rasterio.Affine(*transform)
        with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=place, **settings) as to:
            to.write(pixels)
        return path

    return write


def draw(path, settings, folder, **options):
    [done] = heatmaps([Entry(slide_id="scene", path=str(path))], settings, folder, **options)
    assert not done.error, done.error
    return done


def wgs84(path, row, column):
    """Longitude and latitude of a place in pixels of a GeoTIFF, by rasterio and pyproj alone."""
    with rasterio.open(path) as image:
        x, y = image.transform @ (column, row)
        return pyproj.Transformer.from_crs(image.crs.to_wkt(), 4326, always_xy=True).transform(x, y)


def from_wgs84(path, longitude, latitude):
    """Row and column in a GeoTIFF of a longitude and latitude."""
    with rasterio.open(path) as image:
        x, y = pyproj.Transformer.from_crs(4326, image.crs.to_wkt(), always_xy=True).transform(longitude, latitude)
        column, row = ~image.transform @ (x, y)
    return row, column


def in_pyramid(path, folder):
    convert(path, folder / "scene.ome.zarr", options=SMALL)
    return folder / "scene.ome.zarr"


@pytest.mark.usefixtures("no_picture")
class TestWholeWay:
    @pytest.mark.parametrize("kind", TRANSFORMS)
    @pytest.mark.parametrize("made", ["in place", "pyramid"])
    def test_the_square_is_where_it_was(self, bright_model, scene, tmp_path, kind, made):  # noqa: F811
        path = scene(TRANSFORMS[kind])
        slide = path if made == "in place" else in_pyramid(path, tmp_path)
        done = draw(slide, bright_model[3], tmp_path / "out", formats=PLACED)
        with rasterio.open(done.folder / geotiff("attention")) as found, rasterio.open(path) as expected:
            assert found.crs == expected.crs
            assert (found.count, found.dtypes, found.descriptions) == (
                1,
                ("float32",),
                ("attention of scene, times uniform",),
            )
            assert np.isnan(found.nodata)
            assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            corner = ~expected.transform @ (found.transform @ (0, 0))
            assert corner == pytest.approx((0, 0), abs=1e-6)
            cell = ~expected.transform @ (found.transform @ (SPOT[1] / CELL, SPOT[0] / CELL))
            assert cell == pytest.approx((SPOT[1], SPOT[0]), abs=1e-6)
            heat = found.read(1)
        with Slide(done.folder / MAP) as heat_slide:
            np.testing.assert_array_equal(heat_slide.read(0, (0, 0, *heat.shape))[0], heat)
            placed = heat_slide.georeference.place([(SPOT[1] / CELL, SPOT[0] / CELL)])[0]
            with rasterio.open(path) as expected:
                assert tuple(placed) == pytest.approx(expected.transform @ (SPOT[1], SPOT[0]), abs=1e-6)
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        assert abs(row * CELL - SPOT[0]) <= 2 * CELL
        assert abs(column * CELL - SPOT[1]) <= 2 * CELL

    @pytest.mark.parametrize("kind", TRANSFORMS)
    def test_patches_in_wgs84_are_those_in_pixels(self, bright_model, scene, tmp_path, kind):  # noqa: F811
        path = scene(TRANSFORMS[kind])
        done = draw(path, bright_model[3], tmp_path / "out")
        assert not done.remark
        assert not (done.folder / geotiff("attention")).exists()
        placed, pixels = (json.loads((done.folder / name).read_text()) for name in (OBJECTS, PIXEL_OBJECTS))
        assert placed.keys() == {"type", "features"}  # RFC 7946 has no member crs
        for one, other in zip(placed["features"], pixels["features"], strict=True):
            assert one["properties"] == other["properties"]
            [ring], [square] = one["geometry"]["coordinates"], other["geometry"]["coordinates"]
            assert ring[0] == ring[-1]
            area = sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))
            assert area > 0  # counterclockwise
            back = sorted(tuple(round(v) for v in from_wgs84(path, *point)[::-1]) for point in ring[:4])
            assert back == sorted(tuple(round(v) for v in point) for point in square[:4])
            for point in ring:
                row, column = from_wgs84(path, *point)
                assert min(np.hypot(row - y, column - x) for x, y in square) < 1e-3

    @pytest.mark.parametrize("made", ["in place", "pyramid"])
    def test_a_real_point(self, bright_model, tmp_path, made):  # noqa: F811
        """A pixel of RGB.byte.tif (Bahamas and Florida's coast), whose place GDAL tells."""
        path = real("RGB.byte.tif")
        slide = path if made == "in place" else in_pyramid(path, tmp_path)
        longitude, latitude = wgs84(path, 400.5, 300.5)
        with Slide(slide) as opened:
            assert opened.georeference.crs == 32618
            assert to_wgs84(opened.georeference, [(300.5, 400.5)], "")[0] == pytest.approx((longitude, latitude))
            assert metres_per_pixel(opened.georeference, "") == pytest.approx((300.04, 300.04), abs=0.01)
            assert opened.mpp is None
        done = draw(slide, bright_model[3], tmp_path / "out", formats=PLACED)
        row, column = from_wgs84(done.folder / geotiff("attention"), longitude, latitude)
        assert (row * CELL, column * CELL) == pytest.approx((400.5, 300.5), abs=0.01)
        placed, pixels = (json.loads((done.folder / name).read_text()) for name in (OBJECTS, PIXEL_OBJECTS))
        row, column = from_wgs84(path, *placed["features"][0]["geometry"]["coordinates"][0][0])
        corners = pixels["features"][0]["geometry"]["coordinates"][0]
        assert min(np.hypot(row - y, column - x) for x, y in corners) < 0.5
        with rasterio.open(done.folder / geotiff("attention")) as found:
            heat = found.read(1)
            assert np.isnan(heat).mean() == pytest.approx(0.3, abs=0.1)  # the scene has as much without data

    def test_a_crs_of_no_authority(self, bright_model, scene, tmp_path):  # noqa: F811
        path = scene(crs=USER_DEFINED)
        done = draw(in_pyramid(path, tmp_path), bright_model[3], tmp_path / "out", formats=PLACED)
        with rasterio.open(done.folder / geotiff("attention")) as found, rasterio.open(path) as expected:
            assert found.crs == expected.crs
        ring = json.loads((done.folder / OBJECTS).read_text())["features"][0]["geometry"]["coordinates"][0]
        corners = json.loads((done.folder / PIXEL_OBJECTS).read_text())["features"][0]["geometry"]["coordinates"][0]
        row, column = from_wgs84(path, *ring[0])
        assert min(np.hypot(row - y, column - x) for x, y in corners) < 1e-3

    def test_drawn_again_nothing_is_left_of_before(self, bright_model, scene, tmp_path, monkeypatch):  # noqa: F811
        path = scene()
        done = draw(path, bright_model[3], tmp_path / "out", formats=PLACED)
        monkeypatch.setitem(sys.modules, "pyproj", None)
        draw(path, bright_model[3], tmp_path / "out")
        assert {PIXEL_OBJECTS, geotiff("attention")}.isdisjoint(path.name for path in done.folder.iterdir())
        assert (done.folder / OBJECTS).exists()

    def test_a_place_without_a_crs(self, bright_model, scene, tmp_path):  # noqa: F811
        done = draw(scene(crs=None), bright_model[3], tmp_path / "out", formats=PLACED)
        with rasterio.open(done.folder / geotiff("attention")) as found:
            assert found.crs is None
            assert tuple(found.transform)[:6] == (80, 0, 500000, 0, -80, 5000000)
        assert not (done.folder / PIXEL_OBJECTS).exists()

    def test_what_has_no_place_is_named(self, bright_model, tmp_path, scene):  # noqa: F811
        write_pyramid(tmp_path / "slide.ome.zarr", np.ones((3, 70, 140), np.uint8))
        entries = [
            Entry(slide_id="slide", path=str(tmp_path / "slide.ome.zarr")),
            Entry(slide_id="x", path=str(scene())),
        ]
        slide, other = heatmaps(entries, bright_model[3], tmp_path / "out", formats=PLACED)
        assert "slide.ome.zarr: has no georeference, which --format geotiff needs" in slide.error
        assert not other.error
        assert not slide.folder.exists()


@pytest.mark.usefixtures("no_picture")
class TestWithoutTheExtra:
    def test_pixels_and_a_remark(self, bright_model, scene, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setitem(sys.modules, "pyproj", None)
        done = draw(scene(), bright_model[3], tmp_path / "out")
        assert "patches.geojson is in pixels: " in done.remark
        assert "pip install 'nested-ats[geo]'" in done.remark
        assert {PIXEL_OBJECTS, geotiff("attention")}.isdisjoint(path.name for path in done.folder.iterdir())
        assert (done.folder / OBJECTS).exists()
        ring = json.loads((done.folder / OBJECTS).read_text())["features"][0]["geometry"]["coordinates"][0]
        assert {max(ring)[0] - min(ring)[0]} == {25}

    def test_geotiff_names_the_extra(self, bright_model, scene, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setitem(sys.modules, "rasterio", None)
        with pytest.raises(UsageError, match=r"--format geotiff needs rasterio, .* 'nested-ats\[geo\]'"):
            heatmaps(
                [Entry(slide_id="x", path=str(scene()))],
                bright_model[3],
                tmp_path / "out",
                formats=PLACED,
            )
        assert not (tmp_path / "out").exists()


def test_the_command_says_a_remark_once(finished, scene, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.results.heatmap.draw_picture", lambda *_, **__: b"")
    places = [str(scene(name=name)) for name in ("one", "two")]
    monkeypatch.setitem(sys.modules, "pyproj", None)
    result = CliRunner().invoke(app, ["heatmap", str(finished), *places, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert result.stderr.count("note: patches.geojson is in pixels") == 1


class TestWgs84:
    def patches(self, transform, crs, tmp_path):
        place = Georeference(transform, crs)
        write_pyramid(tmp_path / "p.zarr", np.zeros((1, 30, 40), np.uint8), georeference=place, overwrite=True)
        with Slide(tmp_path / "p.zarr") as slide:
            return in_wgs84(to_geojson([Patch(0, 0, 10, 0.5, 0.1, 1)]), slide)["features"][0]["geometry"]

    def test_a_patch_over_the_antimeridian_is_cut(self, tmp_path):
        geometry = self.patches((0.1, 0, 179.6, 0, -0.1, -10), 4326, tmp_path)
        assert geometry["type"] == "MultiPolygon"
        west, east = (np.array(part[0]) for part in geometry["coordinates"])
        assert (west.min(0), west.max(0)) == (pytest.approx([179.6, -11]), pytest.approx([180, -10]))
        assert (east.min(0), east.max(0)) == (pytest.approx([-180, -11]), pytest.approx([-179.4, -10]))
        for ring in (west, east):
            assert (ring[0] == ring[-1]).all()
            assert sum(ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]) > 0

    @pytest.mark.parametrize("left", [179.0, -180.0])
    def test_one_that_ends_there_is_whole(self, tmp_path, left):
        geometry = self.patches((0.1, 0, left, 0, -0.1, -10), 4326, tmp_path)
        assert geometry["type"] == "Polygon"
        assert np.ptp(np.array(geometry["coordinates"][0])[:, 0]) == pytest.approx(1)

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            (Georeference(TRANSFORMS["north-up"], 1024), "x.tif: EPSG:1024 is not known; give the scene its own"),
            (Georeference(TRANSFORMS["north-up"], None), "x.tif: a scene without a coordinate reference system"),
            (
                Georeference(TRANSFORMS["north-up"], GeoKeys((1, 1, 0, 1, 3072, 0, 1, 32767))),
                "x.tif: its CRS is of no place on the Earth",
            ),
            (Georeference((1e7, 0, 1e9, 0, -1e7, 1e9), 32632), "x.tif: parts of it lie outside"),
        ],
    )
    def test_a_crs_without_a_known_authority_is_named(self, place, message):
        with pytest.raises(DataError, match=message):
            to_wgs84(place, [(0, 0), (1, 1)], "x.tif")

    def test_gdal_names_it_too(self):
        for crs in (1024, None):
            with pytest.raises(DataError, match="x.tif: .*give the scene its own: gdal_edit"):
                gdal_crs(Georeference(TRANSFORMS["north-up"], crs), "x.tif")

    def test_metres(self):
        transform = (3.0, 0, 0, 0, -4.0, 0)
        assert metres_per_pixel(Georeference(transform, 32632), "") == (4, 3)
        assert metres_per_pixel(Georeference(transform, 4326), "") is None
        assert metres_per_pixel(Georeference(transform, None), "") is None
        feet = metres_per_pixel(Georeference(transform, 2263), "")  # New York, in US feet
        assert feet == pytest.approx((4 * 1200 / 3937, 3 * 1200 / 3937))


@pytest.mark.parametrize("pitch", [1, 2, 3.5, 8, 10.7, 64])
def test_cells_with_data_are_those_with_a_pixel_of_data(tmp_path, scene, pitch):
    path = scene(nodata=0, gap=37)
    shape = tuple(int(np.ceil(side / pitch)) for side in (150, 190))
    with Slide(in_pyramid(path, tmp_path)) as slide:
        found = has_data(slide, shape, pitch)
        number = max(i for i, level in enumerate(slide.levels) if i == 0 or level.downsample <= pitch)
        step = slide.levels[number].downsample
        first = 37 // step * step  # the first row of pixels, of the level that is read, with data
        rows = np.arange(shape[0])
        np.testing.assert_array_equal(found, np.repeat((rows + 1)[:, None] * pitch > first, shape[1], 1))
    with Slide(scene(name="full")) as slide:
        assert has_data(slide, shape, pitch).all()


class TestInfo:
    def test_tells_the_place(self, scene):
        path = scene((10, 0, 5e5, 0, -12, 5e6))
        about = describe(str(path))
        assert about["georeference"] == {
            "crs": "EPSG:32632",
            "transform": [10, 0, 5e5, 0, -12, 5e6],
            "metres_per_pixel": [12, 10],
        }
        assert about["mpp"] is None
        result = CliRunner().invoke(app, ["info", str(path)])
        assert "3 channels of uint8, EPSG:32632, 12 x 10 metres per pixel" in result.stdout

    @pytest.mark.parametrize("crs", ["EPSG:4326", USER_DEFINED, None])
    def test_of_any_crs(self, scene, crs):
        result = CliRunner().invoke(app, ["info", str(scene((0.1, 0, 11, 0, -0.1, 47), crs))])
        expected = {"EPSG:4326": "EPSG:4326", None: "no CRS"}.get(
            crs, "a CRS of the file's own, 0.1 metres per pixel"
        )
        assert result.stdout.splitlines()[0].endswith(f"3 channels of uint8, {expected}")

    def test_without_the_extra(self, scene, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyproj", None)
        assert describe(str(scene()))["georeference"].keys() == {"crs", "transform"}
