"""What heatmaps say beside where the model looked: contributions, percentiles, tissue, whole maps and formats.

`bright_model` attends to brightness, so the cells of a bright square, and they alone, must be hot in every file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from scipy.stats import rankdata
from typer.testing import CliRunner

from nested_ats import load_model, save_model
from pipeline.cli.app import app
from pipeline.errors import UsageError
from pipeline.results.classifier import Classifier
from pipeline.results.heatmap import heatmaps
from pipeline.results.look import ATTENTION, CONTRIBUTION, LOOK
from pipeline.results.map_files import FORMATS, MAP, OBJECTS, PICTURE, REGIONS, geotiff, pyramid, read_formats
from storage import Slide

from .test_heatmap import CELL, bright_model, no_picture, spotted  # noqa: F401  fixtures

SPOT, SIDE = (48, 96), 32  # a square of whole cells, and of the model's coarse cells


@pytest.fixture
def drawn(bright_model, spotted, tmp_path):  # noqa: F811
    def make(settings=None, entry=None, **options):
        entry = entry or spotted((3, 160, 208), SPOT, side=SIDE, overwrite=True)
        [done] = heatmaps([entry], settings or bright_model[3], tmp_path / "out", **options)
        assert not done.error, done.error
        return done.folder

    return make


def levels_of(folder, name):
    """Values of every level of a map, and the edges of its rows and columns in level-0 pixels, by its metadata."""
    group = zarr.open_group(folder / pyramid(name), mode="r")
    found = []
    for dataset in group.attrs["ome"]["multiscales"][0]["datasets"]:
        steps = {each["type"]: each[each["type"]] for each in dataset["coordinateTransformations"]}
        values = group[dataset["path"]][0]
        sides = zip((1, 2), values.shape, strict=True)
        edges = [
            (steps["translation"][a] + (np.arange(n + 1) - 0.5) * steps["scale"][a]) / 0.5 + 0.5 for a, n in sides
        ]
        found.append((values, edges, steps["scale"][1] / 0.5))
    return found


@pytest.mark.usefixtures("no_picture")
class TestWhole:
    def test_a_square_lies_where_it_is_at_every_level(self, drawn):
        """Its edges, where values are half of their peak, are the square's to within one pixel of the level."""
        folder = drawn(dense=True)
        levels = levels_of(folder, "attention")
        assert len(levels) >= 2
        for values, edges, pixel in levels:
            hot = values > np.nanmax(values) / 2
            for axis, corner in enumerate(SPOT):
                there = np.flatnonzero(hot.any(1 - axis))
                assert abs(edges[axis][there[0]] - corner) <= pixel
                assert abs(edges[axis][there[-1] + 1] - (corner + SIDE)) <= pixel
        values, edges, _ = levels[0]
        rows, columns = (slice(corner // CELL, (corner + SIDE) // CELL) for corner in SPOT)
        assert (values[rows, columns] > 1).all()
        assert np.count_nonzero(values > 1) == (SIDE // CELL) ** 2
        # The pictures of the report's page are the map, cell by cell.
        picture = np.asarray(Image.open(folder / ATTENTION))
        assert picture.shape[:2] == values.shape
        assert np.array_equal(picture[..., 3] > 0, values > 1)

    def test_all_patches_add_up_to_the_score_of_the_model_that_draws_nothing(self, drawn, bright_model):  # noqa: F811
        folder = drawn(dense=True)
        look = json.loads((folder / LOOK).read_text())
        contribution = levels_of(folder, "contribution")[0][0]
        assert contribution.sum() + look["score"]["offset"] == pytest.approx(look["score"]["dense"], abs=1e-5)
        assert look["strongest"] == pytest.approx(np.abs(contribution).max())
        everything = json.loads((drawn(replace(bright_model[3], samples=(900, 900), draws=1)) / LOOK).read_text())
        assert everything["score"]["value"] == pytest.approx(look["score"]["dense"], abs=1e-4)
        assert everything["score"]["dense"] is None
        assert not (folder / CONTRIBUTION).exists()  # of the maps that were replaced
        assert not (folder / pyramid("contribution")).exists()

    def test_progress_is_told_within_a_slide(self, drawn, capsys, monkeypatch):
        monkeypatch.setattr("pipeline.progress._LINE_SECONDS", 0.0)
        monkeypatch.setattr("nested_ats.models.nested._OPEN_REGIONS", 1)
        drawn(dense=True)
        shares = [int(line.split()[1][:-1]) for line in capsys.readouterr().err.splitlines()]
        assert len(shares) > 3
        assert shares == sorted(shares)

    def test_large_maps_have_larger_cells(self, drawn, monkeypatch):
        monkeypatch.setattr("pipeline.results.explain._MOST_CELLS", 200)
        values, _, pixel = levels_of(drawn(dense=True), "attention")[0]
        assert values.size <= 200
        assert pixel == 2 * CELL
        assert values.mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.usefixtures("no_picture")
class TestContribution:
    def test_patches_say_what_they_add_and_it_adds_up_to_the_answer(self, drawn, bright_model, spotted):  # noqa: F811
        entry = spotted((3, 160, 208), SPOT, side=SIDE)
        folder = drawn(entry=entry)
        look = json.loads((folder / LOOK).read_text())
        classifier = Classifier(bright_model[3])
        with classifier.opened(entry) as image:
            prediction = classifier.estimate(entry, image)
        odds = prediction.answers[0, 1] / prediction.answers[0, 0]
        sign = 1 if look["answer"] == "box" else -1
        assert look["score"]["value"] == pytest.approx(sign * float(odds.log()), abs=1e-5)
        assert look["score"]["name"] == ("logit of box against bar" if sign == 1 else "logit of bar against box")
        added = [patch["contribution"] for patch in look["patches"]]
        assert look["score"]["offset"] + sum(added) == pytest.approx(look["score"]["value"], abs=1e-6)
        features = json.loads((folder / OBJECTS).read_text())["features"]
        assert [each["properties"]["measurements"]["contribution"] for each in features] == added
        regions = json.loads((folder / REGIONS).read_text())["features"]
        assert all("contribution" not in each["properties"]["measurements"] for each in regions)

    def test_an_answer_can_be_named(self, drawn):
        scores = [json.loads((drawn(answer=name) / LOOK).read_text())["score"]["value"] for name in ("bar", "box")]
        assert scores[0] == pytest.approx(-scores[1])
        with pytest.raises(UsageError, match="the model answers bar, box; name one of them"):
            drawn(answer="circle")


@pytest.mark.usefixtures("no_picture")
class TestTissue:
    @pytest.fixture
    def masked(self, bright_model, spotted, tmp_path):  # noqa: F811
        """A model that draws in the mask of the manifest, and a slide whose right half is in none."""
        model, classes = load_model(Path(bright_model[3].model))
        chosen = replace(model.config, prior="column", min_tissue=0.2)
        again = type(model)(chosen, in_channels=3, classes=2)
        again.load_state_dict(model.state_dict())
        save_model(tmp_path / "masked", again, classes=classes)
        entry = spotted((3, 160, 208), SPOT, side=SIDE)
        ring = [[0, 0], [104, 0], [104, 160], [0, 160], [0, 0]]
        outline = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
        (tmp_path / "mask.geojson").write_text(json.dumps(outline))
        settings = replace(bright_model[3], model=str(tmp_path / "masked"))
        return settings, replace(entry, mask=str(tmp_path / "mask.geojson"))

    @pytest.mark.parametrize("dense", [False, True])
    def test_off_it_maps_are_empty_and_pictures_transparent(self, drawn, masked, dense):
        folder = drawn(*masked, dense=dense)
        for name in ("attention", "percentile", "contribution")[: 2 + dense]:
            values = levels_of(folder, name)[0][0]
            assert np.isfinite(values[:, :12]).all()
            assert np.isnan(values[:, 14:]).all()
        values = levels_of(folder, "attention")[0][0]
        assert np.nanmean(values) == pytest.approx(1, rel=1e-5)  # times the uniform attention on tissue
        for name in (ATTENTION, CONTRIBUTION)[: 1 + dense]:
            picture = np.asarray(Image.open(folder / name))
            assert not picture[np.isnan(values), 3].any()
            assert picture[..., 3].any()

    def test_the_outline_is_that_of_the_mask(self, drawn, masked):
        [ring] = json.loads((drawn(*masked) / LOOK).read_text())["tissue"]
        x, y = np.reshape(ring, (-1, 2)).T
        assert (x.min(), y.min(), y.max()) == pytest.approx((0, 0, 160), abs=1)
        assert x.max() == pytest.approx(104, abs=1)

    def test_a_model_without_a_prior_has_no_outline(self, drawn):
        assert json.loads((drawn() / LOOK).read_text())["tissue"] == []


@pytest.mark.usefixtures("no_picture")
class TestFormats:
    def test_percentiles_rank_what_is_there(self, drawn):
        folder = drawn()
        attention, percentile = (levels_of(folder, name)[0][0] for name in ("attention", "percentile"))
        expected = rankdata(attention, "average") / attention.size * 100
        # Attention is float32 in the file, and ranked before.
        assert np.corrcoef(percentile.ravel(), expected.ravel())[0, 1] > 0.999
        assert 0 < percentile.min() < percentile.max() <= 100
        with Slide(folder / pyramid("percentile")) as slide:
            assert slide.channels == ("attention of slide, percentile",)

    @pytest.mark.parametrize("chosen", ["png", "geojson", "omezarr", "png,geojson,omezarr"])
    def test_only_what_is_asked_for_is_there(self, drawn, chosen):
        drawn(dense=True)
        folder = drawn(formats=read_formats(chosen))
        files = {"png": {PICTURE}, "geojson": {OBJECTS, REGIONS}, "omezarr": {MAP, pyramid("percentile")}}
        wanted = set().union(*(files[name] for name in chosen.split(",")))
        everything = {*set().union(*files.values()), pyramid("contribution"), geotiff("attention")}
        assert {path.name for path in folder.iterdir()} & everything == wanted
        assert (folder / LOOK).exists()  # the report has its page in any case

    def test_another_format(self):
        assert read_formats("png, geotiff") == ("png", "geotiff")
        with pytest.raises(UsageError, match=f"no format 'svg'; choose among {','.join(FORMATS)}"):
            read_formats("png,svg")

    def test_by_the_command(self, finished, pyramids, tmp_path):
        out = tmp_path / "maps"
        command = ["heatmap", str(finished), str(pyramids), "--split", "test", "--limit", "1", "--out", str(out)]
        result = CliRunner().invoke(app, [*command, "--format", "omezarr", "--dense", "--answer", "box"])
        assert result.exit_code == 0, result.output
        [folder] = out.iterdir()
        assert str(folder) in result.output
        assert (folder / pyramid("contribution")).exists()
        assert json.loads((folder / LOOK).read_text())["score"]["name"] == "logit of box against bar"
        refused = CliRunner().invoke(app, [*command, "--format", "gif"])
        assert refused.exit_code != 0
        assert torch.is_grad_enabled()
