"""Heatmaps lie where the slide is: map, polygons and picture against independent readers.

The model is made to attend to brightness, and the slides are dark with one bright square, so where the attention
must be is known.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
import zarr

from nested_ats import NestedATS, save_model
from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.errors import UsageError
from pipeline.results.classifier import Classifier
from pipeline.results.drawn import Patch, drawn_regions, to_geojson
from pipeline.results.heatmap import heatmaps
from pipeline.results.look import ATTENTION, LOOK, THUMBNAIL
from pipeline.results.map_files import MAP, OBJECTS, PICTURE, REGIONS, pyramid
from pipeline.results.overlay import draw_picture
from pipeline.results.settings import Settings
from pipeline.results.slide_page import read_look
from storage import ConvertOptions, Slide, write_pyramid

CELL = 8  # level-0 pixels of a cell of the finest attention: downsample 2 times stride 4


@pytest.fixture(scope="session")
def bright_model(config, tmp_path_factory):
    """Make a model of so many channels that attends to brightness; patches of an odd size, to see the rounding."""

    def make(channels):
        folder = tmp_path_factory.mktemp("bright")
        chosen = parse_config({**plain(config), "model": {**plain(config)["model"], "patch_size": 25}}, "").model
        torch.manual_seed(0)
        model = NestedATS(chosen, in_channels=channels, classes=2)
        with torch.no_grad():
            for network in model.attention:
                first, *_, last = [layer for layer in network.layers if isinstance(layer, torch.nn.Conv2d)]
                for parameter in network.parameters():
                    parameter.zero_()
                first.weight[0, :, 1, 1] = 4 / channels
                last.weight[0, 0] = 1
        save_model(folder, model, classes=["bar", "box"])
        return Settings(model=str(folder), device="cpu", draws=2, samples=(), background=0.0, seed=0)

    return {channels: make(channels) for channels in (1, 2, 3)}


@pytest.fixture
def spotted(tmp_path):
    """Write a dark slide with a bright square and return its entry."""

    def write(shape, spot_yx, *, side=16, dtype="uint8", mpp=0.5, name="slide", **settings):
        largest = 1.0 if dtype == "float32" else np.iinfo(dtype).max
        pixels = np.random.default_rng(1).uniform(0, 0.2, shape)
        pixels[:, spot_yx[0] : spot_yx[0] + side, spot_yx[1] : spot_yx[1] + side] = 0.95
        path = tmp_path / "slides" / f"{name}.ome.zarr"
        write_pyramid(path, (pixels * largest).astype(dtype), mpp=mpp, **settings)
        return Entry(slide_id=name, path=str(path))

    return write


def draw(entry, settings, folder):
    [done] = heatmaps([entry], settings, folder)
    assert not done.error, done.error
    return done


def map_in_level_0(folder):
    """The map's values and the level-0 box (y0, y1, x0, x1) of each pixel's row and column, from its metadata alone.

    OME-Zarr gives the centre of the first pixel; the slide's level 0 has its own first centre at 0.
    """
    group = zarr.open_group(folder / MAP, mode="r")
    multiscale = group.attrs["ome"]["multiscales"][0]
    scale, translation = (
        next(t[kind] for t in multiscale["datasets"][0]["coordinateTransformations"] if t["type"] == kind)
        for kind in ("scale", "translation")
    )
    values = group["0"][0]
    edges = [
        translation[axis] + (np.arange(values.shape[axis - 1] + 1) - 0.5) * scale[axis] for axis in (1, 2)
    ]  # in the unit
    return values, edges, multiscale["axes"][1].get("unit")


def centre_of_mass(values, edges):
    y, x = ((e[:-1] + e[1:]) / 2 for e in edges)
    return (values.sum(1) @ y) / values.sum(), (values.sum(0) @ x) / values.sum()


@pytest.fixture
def no_picture(monkeypatch):
    """Pictures take most of the time, and their own tests."""
    monkeypatch.setattr("pipeline.results.heatmap.draw_picture", lambda *_, **__: b"")


SPOTS = [(8, 16), (104, 16), (8, 144), (104, 144), (60, 77)]


@pytest.mark.usefixtures("no_picture")
class TestMap:
    @pytest.mark.parametrize("spot", SPOTS)
    @pytest.mark.parametrize("mpp", [0.25, None])
    def test_lies_over_the_slide(self, bright_model, spotted, tmp_path, spot, mpp):
        entry = spotted((3, 131, 173), spot, mpp=mpp)
        done = draw(entry, bright_model[3], tmp_path / "out")
        values, edges, unit = map_in_level_0(done.folder)
        pixel = mpp or 1.0
        assert unit == ("micrometer" if mpp else None)
        for axis, size in enumerate((131, 173)):
            assert edges[axis][0] == pytest.approx(-0.5 * pixel)  # the outer edge of level 0's first pixel
            assert np.diff(edges[axis]) == pytest.approx(CELL * pixel)
            assert edges[axis][-1] >= (size - 0.5) * pixel > edges[axis][-2]
        hot = np.argwhere(values > 1)
        assert len(hot) > 0
        for i, j in hot:
            for edge, k, corner in ((edges[0], i, spot[0]), (edges[1], j, spot[1])):
                assert edge[k + 1] / pixel > corner - 2 * CELL
                assert edge[k] / pixel < corner + 16 + 2 * CELL
        middle = [(corner + 7.5) * pixel for corner in spot]
        assert centre_of_mass(values, edges) == pytest.approx(middle, abs=CELL * pixel)

    def test_is_a_mean_of_one(self, bright_model, spotted, tmp_path):
        for i, shape in enumerate([(3, 128, 160), (3, 131, 173)]):
            done = draw(spotted(shape, (60, 77), name=str(i)), bright_model[3], tmp_path / "out")
            values, *_ = map_in_level_0(done.folder)
            assert values.dtype == np.float32
            assert values.shape == tuple(-(-side // CELL) for side in shape[1:])
            assert values.min() >= 0
            assert values.mean() == pytest.approx(1, rel=1e-5)
            assert done.peak == pytest.approx(values.max())

    def test_opens_as_a_slide_with_its_own_scale(self, bright_model, spotted, tmp_path):
        entry = spotted((3, 131, 173), (60, 77), mpp=0.5)
        done = draw(entry, bright_model[3], tmp_path / "out")
        with Slide(done.folder / MAP) as heat, Slide(entry.path) as slide:
            assert heat.mpp == CELL * slide.mpp
            assert len(heat.levels) >= 2
            assert entry.slide_id in heat.name

    def test_again_it_is_replaced(self, bright_model, spotted, tmp_path):
        entry = spotted((3, 131, 173), (8, 16))
        first = draw(entry, bright_model[3], tmp_path / "out")
        before = map_in_level_0(first.folder)[0]
        again = draw(entry, bright_model[3], tmp_path / "out")
        assert np.array_equal(map_in_level_0(again.folder)[0], before)
        moved = spotted((3, 131, 173), (104, 144), name="moved")
        draw(Entry(slide_id="slide", path=moved.path), bright_model[3], tmp_path / "out")
        assert not np.array_equal(map_in_level_0(again.folder)[0], before)
        patches = {f"patch-{number}.jpg" for number in range(min(len(read_look(again.folder)["patches"]), 12))}
        looks = {LOOK, THUMBNAIL, ATTENTION, *patches}
        assert {p.name for p in again.folder.iterdir()} == {
            MAP,
            pyramid("percentile"),
            PICTURE,
            OBJECTS,
            REGIONS,
        } | looks


@pytest.mark.usefixtures("no_picture")
class TestObjects:
    def test_polygons_are_the_boxes_that_the_encoder_read(self, bright_model, spotted, tmp_path, monkeypatch):
        read, boxes = SlideImage.read, []

        def spy(self, level, wanted):
            if level == 0:
                boxes.extend(tuple(box) for box in wanted.tolist())
            return read(self, level, wanted)

        monkeypatch.setattr(SlideImage, "read", spy)
        done = draw(spotted((3, 131, 173), (60, 77)), bright_model[3], tmp_path / "out")
        collection = json.loads((done.folder / OBJECTS).read_text())
        found = set()
        for feature in collection["features"]:
            [ring] = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1]
            assert len(ring) == 5
            xs, ys = zip(*ring, strict=True)
            assert {(x, y) for x, y in ring} == {(x, y) for x in (min(xs), max(xs)) for y in (min(ys), max(ys))}
            found.add((min(ys), min(xs), max(ys) - min(ys), max(xs) - min(xs)))
        assert found <= set(boxes)
        assert {box[2:] for box in found} == {(25, 25)}
        assert len(collection["features"]) == len(set(boxes)) <= 6  # two draws of three patches
        assert len(boxes) == 6 + len(set(boxes))  # each once more, for what it adds to the answer
        heaviest = collection["features"][0]["geometry"]["coordinates"][0]
        x, y = np.mean(heaviest[:4], axis=0)
        assert abs(x - 85) <= 16  # the square's centre: x is first, y second
        assert abs(y - 68) <= 16

    def test_is_what_qupath_reads(self, bright_model, spotted, tmp_path):
        done = draw(spotted((3, 131, 173), (60, 77)), bright_model[3], tmp_path / "out")
        collection = json.loads((done.folder / OBJECTS).read_text(), parse_constant=pytest.fail)
        assert collection["type"] == "FeatureCollection"
        weights = []
        for feature in collection["features"]:
            assert feature["type"] == "Feature"
            assert feature["geometry"]["type"] == "Polygon"
            about = feature["properties"]
            assert about["objectType"] in ("annotation", "detection")
            assert all(0 <= channel <= 255 for channel in about["classification"]["color"])
            assert about["classification"]["name"]
            assert all(isinstance(value, int | float) for value in about["measurements"].values())
            weights.append(about["measurements"]["weight"])
        assert weights == sorted(weights, reverse=True)
        assert sum(weights) == pytest.approx(1, abs=1e-5)  # shares of the slide's feature, each place once

    def test_regions_are_those_that_patches_were_drawn_from(self, bright_model, spotted, tmp_path):
        done = draw(spotted((3, 131, 173), (60, 77)), bright_model[3], tmp_path / "out")
        corners = {
            name: np.array(
                [
                    each["geometry"]["coordinates"][0]
                    for each in json.loads((done.folder / name).read_text())["features"]
                ]
            )
            for name in (OBJECTS, REGIONS)
        }
        low, high = corners[REGIONS].min(1), corners[REGIONS].max(1)
        assert 1 <= len(low) <= 2 * 3  # draws times samples of the first level
        assert np.all(high - low == 16 * 2)  # the size of a region at its downsample
        middles = corners[OBJECTS][:, :4].mean(1)
        inside = (low[None] <= middles[:, None] + 1) & (middles[:, None] - 1 <= high[None])
        assert inside.all(-1).any(-1).all()

    def test_a_model_of_one_level_opens_no_regions(self, config):
        values = plain(config)
        one = parse_config(
            {**values, "model": {**values["model"], "levels": values["model"]["levels"][:1]}}, ""
        ).model
        assert drawn_regions(None, one) == []

    def test_rings_turn_as_the_standard_says(self):
        """RFC 7946: an outer ring is counterclockwise (here with y down, so the shoelace sum is positive)."""
        [feature] = to_geojson([Patch(10, 20, 5, 0.5, 0.1, 0)])["features"]
        ring = feature["geometry"]["coordinates"][0]
        assert ring[0] == [20, 10]
        assert sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring)) > 0

    def test_same_patches_as_the_prediction(self, bright_model, spotted, tmp_path):
        entry = spotted((3, 131, 173), (60, 77))
        done = draw(entry, bright_model[3], tmp_path / "out")
        row = Classifier(bright_model[3])(entry)
        assert done.prediction == row["prediction"]


class TestPicture:
    @pytest.mark.parametrize(
        ("channels", "dtype"), [(1, "uint8"), (2, "uint8"), (3, "uint8"), (1, "uint16"), (3, "float32")]
    )
    def test_decodes_and_is_not_blank(self, bright_model, spotted, tmp_path, channels, dtype):
        entry = spotted((channels, 131, 173), (60, 77), dtype=dtype)
        done = draw(entry, bright_model[channels], tmp_path / "out")
        picture = matplotlib.image.imread(done.folder / PICTURE)
        assert min(picture.shape[:2]) > 300
        assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 100

    @pytest.mark.parametrize("shape", [(3, 5, 3), (3, 3, 3), (3, 33, 400), (3, 400, 33), (3, 8, 2000)])
    def test_odd_shapes(self, bright_model, spotted, tmp_path, shape):
        entry = spotted(shape, (0, 0), side=2, options=ConvertOptions(min_level_size=1), mpp=0.1)
        done = draw(entry, bright_model[3], tmp_path / "out")
        assert matplotlib.image.imread(done.folder / PICTURE).std() > 0

    @pytest.mark.parametrize("slide_id", ["a$b$c", "$\\frac$", "日本", "a_{b}^c", "<b>&amp;", "../up", "x" * 300])
    def test_awkward_ids(self, bright_model, spotted, tmp_path, slide_id):
        path = spotted((3, 70, 140), (20, 20)).path
        done = draw(Entry(slide_id=slide_id, path=path), bright_model[3], tmp_path / "out")
        assert done.folder.parent == tmp_path / "out"
        assert (done.folder / PICTURE).exists()

    def test_attention_and_slide_share_their_corners(self, spotted, monkeypatch):
        """A thumbnail from a coarser level, whose sides are rounded up, is not squeezed into the slide's."""
        from matplotlib.axes import Axes

        entry = spotted((3, 131, 173), (60, 77))
        extents = []
        original = Axes.imshow

        def spy(self, image, **settings):
            extents.append((np.shape(image)[:2], settings.get("extent")))
            return original(self, image, **settings)

        monkeypatch.setattr(Axes, "imshow", spy)
        monkeypatch.setattr("pipeline.results.overlay._PICTURE_PIXELS", 50)
        with Slide(entry.path) as slide:
            png = draw_picture(slide, np.ones((17, 22), np.float32), CELL, [], "title")
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert extents == [((33, 44), (0, 44 * 4, 33 * 4, 0)), ((17, 22), (0, 22 * CELL, 17 * CELL, 0))]

    @pytest.mark.parametrize(("dtype", "value"), [("uint8", 255), ("uint16", 1.0)])  # all but uint8 are stretched
    def test_off_the_slide_the_strip_shows_what_the_model_saw(self, spotted, monkeypatch, dtype, value):
        from matplotlib.axes import Axes

        shown = []
        monkeypatch.setattr(Axes, "imshow", lambda self, image, **_: shown.append(np.asarray(image)))
        monkeypatch.setattr("matplotlib.figure.FigureBase.colorbar", lambda *_, **__: None)
        with Slide(spotted((3, 131, 173), (60, 77), dtype=dtype).path) as slide:
            image = SlideImage(slide, background=1.0)
            patches = [Patch(-20, 0, 40, 0.5, 0.1, 1)]
            draw_picture(slide, np.ones((17, 22), np.float32), CELL, patches, "title", fill=image.fill)
        strip = shown[-1]
        assert (strip[:20] == value).all()
        assert strip[20:].mean() < value / 2

    def test_the_model_s_background_is_that_of_the_picture(self, bright_model, spotted, tmp_path, monkeypatch):
        fills = []
        monkeypatch.setattr(
            "pipeline.results.heatmap.draw_picture", lambda *_, fill, **_options: fills.append(fill) or b""
        )
        settings = replace(bright_model[3], background=1.0)
        draw(spotted((3, 131, 173), (60, 77)), settings, tmp_path / "out")
        assert fills == [255]

    def test_large_patches_are_read_from_a_coarse_level(self, spotted, monkeypatch):
        entry = spotted((3, 3000, 600), (60, 77))
        with Slide(entry.path) as slide:
            patches = [Patch(-100, 0, 2048, 0.5, 0.1, 0)]
            before = slide.statistics
            draw_picture(slide, np.ones((10, 10), np.float32), 300, patches, "title")
            assert (slide.statistics - before).chunks_decoded < 60  # of 130 at level 0
            picture = draw_picture(slide, np.ones((10, 10), np.float32), 300, [], "title")
        assert matplotlib.image.imread(io.BytesIO(picture)).std() > 0


@pytest.mark.usefixtures("no_picture")
class TestFailures:
    def test_one_bad_slide_and_the_others_go_on(self, bright_model, spotted, tmp_path):
        good = spotted((3, 70, 140), (20, 20), name="good")
        grey = spotted((1, 70, 140), (20, 20), name="grey")
        gone = Entry(slide_id="gone", path=str(tmp_path / "gone.ome.zarr"))
        done = heatmaps([gone, grey, good], bright_model[3], tmp_path / "out")
        assert [one.slide_id for one in done] == ["gone", "grey", "good"]
        assert "gone.ome.zarr" in done[0].error
        assert "1 channels where the model has 3" in done[1].error
        assert not done[2].error
        assert (done[2].folder / PICTURE).exists()

    def test_pixels_that_are_no_numbers(self, bright_model, tmp_path):
        pixels = np.full((3, 70, 140), np.inf, np.float32)
        write_pyramid(tmp_path / "x.ome.zarr", pixels)
        [done] = heatmaps([Entry(slide_id="x", path=str(tmp_path / "x.ome.zarr"))], bright_model[3], tmp_path / "o")
        assert "x.ome.zarr: what the model computes is not finite" in done.error

    def test_a_place_that_cannot_be_written(self, bright_model, spotted, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UsageError, match="choose another --out"):
            heatmaps([spotted((3, 70, 140), (20, 20))], bright_model[3], tmp_path / "file")
