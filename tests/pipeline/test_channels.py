"""Channels by name or number: read from files, kept in pyramids, and seen by the model in the order asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.data.selection import select
from pipeline.data.slides import SlideImage
from pipeline.errors import DataError, UsageError
from pipeline.results.heatmap import heatmaps
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.stats import measure
from pipeline.training.train import train
from storage import Slide, convert, write_pyramid

BANDS = ("B02", "B03", "B04", "B08")


def write_scene(path, pixels, names, how="gdal"):
    options = {"photometric": "minisblack", "planarconfig": "separate", "metadata": None}
    if how == "gdal":
        items = "".join(
            f'<Item name="DESCRIPTION" sample="{i}" role="description">{n}</Item>' for i, n in enumerate(names)
        )
        others = '<Item name="X">1</Item><Item name="SCALE" sample="0" role="scale">2</Item>'
        text = f"<GDALMetadata>\n{others}{items}</GDALMetadata>"
        options["extratags"] = [(42112, "s", 0, text, True)]
    else:
        options = {
            "ome": True,
            "metadata": {"axes": "CYX", "Channel": {"Name": list(names)}},
            "photometric": "minisblack",
        }
    tifffile.imwrite(path, pixels, **options)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 255, (4, 60, 70), np.uint8)


@pytest.mark.parametrize("how", ["gdal", "ome"])
def test_names_come_from_the_file_and_stay(tmp_path, pixels, how):
    path = tmp_path / ("x.ome.tif" if how == "ome" else "x.tif")
    write_scene(path, pixels, BANDS, how)
    convert(path, tmp_path / "p.zarr")
    for place in (path, tmp_path / "p.zarr"):
        with Slide(place) as slide:
            assert slide.channels == BANDS


@pytest.mark.parametrize("names", [(), ("a", "b"), ("a", "", "c", "d")])
def test_names_that_are_not_those_of_all_bands_are_not_taken(tmp_path, pixels, names):
    write_scene(tmp_path / "x.tif", pixels, names)
    with Slide(tmp_path / "x.tif") as slide:
        assert slide.channels == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [(["B04", "B03", "B02"], [2, 1, 0]), ([3, "B02"], [3, 0]), ([1], [1]), (None, [0, 1, 2, 3])],
)
def test_the_image_has_what_is_asked_for(tmp_path, pixels, wanted, numbers):
    write_scene(tmp_path / "x.tif", pixels, BANDS)
    with Slide(tmp_path / "x.tif") as slide:
        image = SlideImage(slide, channels=wanted)
        assert image.numbers == numbers
        found = image.read(0, torch.tensor([[10, 20, 30, 40]]))[0].numpy()
        np.testing.assert_array_equal(found, pixels[numbers, 10:40, 20:60])
        assert (image.identity == SlideImage(slide).identity) == (wanted is None)
        with pytest.raises(DataError, match=r"x\.tif: no channel 'B11', only B02, B03, B04, B08; leave it out"):
            SlideImage(slide, channels=["B02", "B11"])
        with pytest.raises(DataError, match="no channel 4,"):
            SlideImage(slide, channels=[4])


@pytest.mark.parametrize(
    ("value", "reason"),
    [([], "at least one"), (0, "channels"), ([-1], "channels"), ([[1]], "channels"), ("B04", "channels")],
)
def test_a_configuration_names_some(config, value, reason):
    with pytest.raises(UsageError, match=reason):
        parse_config({**plain(config), "data": {"channels": value}}, "c.yaml")


def test_train_predict_and_heatmap_see_them(config, pyramids, tmp_path):
    """Colours in another order, with a fourth channel between, are the same slides to the model."""
    entries = []
    for number, entry in enumerate(read_manifest(pyramids)):
        with Slide(entry.path) as slide:
            red, green, blue = slide.read(0, (0, 0, *slide.shape_yx))
        noise = np.random.default_rng(number).integers(0, 255, red.shape, np.uint8)
        place = str(tmp_path / f"{number}.ome.zarr")
        write_pyramid(place, np.stack([noise, blue, red, green]), channels=("x", "blue", "red", "green"))
        entries.append(replace(entry, path=place))
    write_pyramid(tmp_path / "odd.ome.zarr", np.zeros((3, 120, 150), np.uint8), channels=("red", "green", "nir"))
    odd = replace(entries[0], slide_id="odd", path=str(tmp_path / "odd.ome.zarr"))
    values = plain(config)
    values["train"] |= {"epochs": 1}
    named = parse_config({**values, "data": {**values["data"], "channels": ["red", "green", "blue"]}}, "")
    chosen = select([*entries, odd], named, fail_fast=False)
    assert chosen.channels == 3
    assert [(f.slide_id, "no channel 'blue', only red, green, nir" in f.error) for f in chosen.failures] == [
        ("odd", True)
    ]
    rows = []
    for where, cohort, settings in (
        ("named", entries, named),
        ("plain", read_manifest(pyramids), parse_config(values, "")),
    ):
        train(cohort, settings, tmp_path / where, device="cpu")
        rows.append(predict(cohort[:2], tmp_path / where, tmp_path / f"{where} out"))
    for one, other in zip(*rows, strict=True):
        assert one["prob_bar"] == pytest.approx(other["prob_bar"], abs=1e-6)
    asked = prediction_settings(tmp_path / "named")
    assert asked.channels == ("red", "green", "blue")
    assert "channels" not in prediction_settings(tmp_path / "plain").plain
    [done] = heatmaps(entries[:1], asked, tmp_path / "maps")
    assert done.error == ""
    stats = measure(entries, channels=["green", 1])
    assert [channel.name for channel in stats.channels] == ["green", "blue"]
