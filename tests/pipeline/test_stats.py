"""Statistics of the training slides: those of numpy over the same pixels, without what holds no data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import yaml
from typer.testing import CliRunner

import pipeline.stats as module
from nested_ats import ModelConfig
from pipeline.cli.app import app
from pipeline.config import Config, parse_config, plain
from pipeline.data.manifest import Entry, write_manifest
from pipeline.errors import DataError, UsageError
from pipeline.stats import PERCENTILES, measure
from storage import Slide, write_pyramid


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def slide(tmp_path):
    """Write a slide and return its entry."""

    def make(name, pixels, split="train", nodata=None):
        options = {"photometric": "minisblack", "metadata": None}
        if len(pixels) > 1:
            options["planarconfig"] = "separate"
        if nodata is not None:
            options["extratags"] = [(42113, "s", 0, str(nodata), True)]
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, **options)
        return Entry(slide_id=name, path=str(tmp_path / f"{name}.tif"), label="a", split=split)

    return make


def check(stats, values):
    """Compare with numpy over (N,) values of each channel."""
    for channel, own in zip(stats.channels, values, strict=True):
        assert channel.pixels == own.size
        assert channel.mean == pytest.approx(own.mean())
        assert channel.std == pytest.approx(own.std())
        expected = np.percentile(own, PERCENTILES, method="inverted_cdf")
        np.testing.assert_allclose(list(channel.percentiles.values()), expected)


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535), ("int16", 32767)])
def test_they_are_those_of_all_valid_pixels(slide, rng, dtype, largest):
    low = -3000 if dtype == "int16" else 1
    images = [rng.integers(low, min(largest, 4000), (2, 40 + 10 * i, 50)).astype(dtype) for i in range(3)]
    images[1] = images[1] // 2
    nodata = np.iinfo(dtype).min
    for image in images:
        image[0, :9] = image[1, 5:7] = nodata
    entries = [slide(f"s{i}", image, nodata=nodata) for i, image in enumerate(images)]
    entries.append(slide("held out", images[0] * 0 + 9, "test"))
    stats = measure(entries)
    pooled = [np.concatenate([image[c][image[c] != nodata] for image in images]) / largest for c in range(2)]
    check(stats, pooled)
    assert stats.failures == []
    assert set(stats.downsamples.values()) == {1}


def test_floats_and_nan(slide, rng):
    pixels = rng.normal(0.4, 0.1, (1, 50, 60)).astype(np.float32)
    pixels[0, :5] = np.nan
    check(measure([slide("f", pixels)]), [pixels[0, 5:].ravel().astype(float)])


def test_percentiles_of_many_floats_are_of_a_sample(slide, rng):
    pixels = rng.normal(0.4, 0.1, (1, 300, 300)).astype(np.float32)
    [channel] = measure([slide("f", pixels)]).channels
    assert channel.mean == pytest.approx(pixels.mean())
    for p, found in channel.percentiles.items():
        assert found == pytest.approx(np.percentile(pixels, float(p)), abs=0.02)


def test_a_large_slide_is_read_at_a_coarse_level(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(module, "MAX_SAMPLES", 3 * 5000)
    pixels = rng.integers(0, 255, (3, 300, 200), np.uint8)
    write_pyramid(tmp_path / "p.ome.zarr", pixels)
    stats = measure([Entry(slide_id="p", path=str(tmp_path / "p.ome.zarr"))])
    assert stats.downsamples == {"p": 4}
    with Slide(tmp_path / "p.ome.zarr") as slide:
        check(stats, slide.read(2, (0, 0, 75, 50)).reshape(3, -1) / 255)


def test_bad_slides_are_named_and_the_others_count(slide, rng, tmp_path):
    pixels = rng.integers(0, 255, (3, 30, 40), np.uint8)
    good = [slide("a", pixels), slide("b", pixels)]
    infinite = np.full((3, 20, 20), np.inf, np.float32)
    bad = [slide("grey", pixels[:1]), slide("inf", infinite), Entry(slide_id="gone", path="/no.tif", split="train")]
    stats = measure([*bad, *good])
    check(stats, np.concatenate([pixels, pixels], 1).reshape(3, -1) / 255)
    errors = dict(stats.failures)
    assert (
        errors["grey"] == "1 channels, where 2 of 4 slides have 3" or "where 2 of 3 slides have 3" in errors["grey"]
    )
    assert "inf.tif: holds infinite numbers" in errors["inf"]
    assert "does not exist" in errors["gone"]
    with pytest.raises(DataError, match="no slide can be used"):
        measure(bad[1:])
    with pytest.raises(DataError, match="slide gone"):
        measure([*good, bad[2]], fail_fast=True)
    with pytest.raises(UsageError, match="no slide is in split 'val'; splits there are: train"):
        measure(good, split="val")


def test_a_slide_without_data(slide):
    stats = measure([slide("empty", np.zeros((1, 20, 20), np.uint8), nodata=0)])
    assert (stats.channels[0].pixels, stats.channels[0].mean) == (0, 0)


def test_the_command_prints_lines_that_a_configuration_takes(slide, rng, tmp_path):
    pixels = rng.integers(0, 255, (3, 30, 40), np.uint8)
    pixels[2] = 51
    write_manifest(tmp_path / "m.csv", [slide("a", pixels), slide("b", pixels, "test")])
    done = CliRunner().invoke(app, ["stats", str(tmp_path / "m.csv"), "--out", str(tmp_path / "new/stats.json")])
    assert done.exit_code == 0, done.output
    lines = done.stdout[done.stdout.index("model:") :]
    model = plain(Config())["model"] | yaml.safe_load(lines)["model"]
    config = parse_config({"model": model}, "stats").model
    assert isinstance(config, ModelConfig)
    assert config.mean[2] == pytest.approx(0.2)
    assert config.std[2] == 1
    assert "1 slides, read at downsample 1" in done.stdout
    written = json.loads((tmp_path / "new/stats.json").read_text())
    assert written["channels"][0]["mean"] == pytest.approx(pixels[0].mean() / 255)
    assert list(written["channels"][0]["percentiles"]) == ["1", "5", "50", "95", "99"]
    again = CliRunner().invoke(app, ["stats", str(tmp_path / "m.csv"), "--json"])
    assert json.loads(again.stdout) == written


def test_the_command_ends_by_what_failed(slide, rng, tmp_path):
    entries = [slide("a", rng.integers(0, 255, (3, 30, 40), np.uint8)), Entry(slide_id="gone", path="/no.tif")]
    write_manifest(tmp_path / "m.csv", [Entry(slide_id=e.slide_id, path=e.path) for e in entries])
    done = CliRunner().invoke(app, ["stats", str(tmp_path / "m.csv")])
    assert done.exit_code == 3
    assert "the slides have no split: all of them count" in done.output
    assert "1 of 2 failed" in done.output
