"""A mask or an alpha channel is a valid area: the model does not see it, and draws no patch outside of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

from nested_ats import LevelConfig, ModelConfig
from pipeline.config import Config, parse_config, plain
from pipeline.data.manifest import Entry
from pipeline.data.selection import select
from pipeline.data.slides import SlideImage, check_slide, open_image
from pipeline.errors import DataError
from pipeline.stats import measure
from pipeline.view import paint
from storage import Slide, convert

LEVELS = (LevelConfig(downsample=2, stride=4, samples=8, channels=(4,)),)
CONFIG = ModelConfig(levels=LEVELS, patch_size=32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scenes(tmp_path):
    """Write a slide that is bright where it is hidden, in place and as a pyramid."""
    shown = np.zeros((160, 240), np.uint8)
    shown[:100, 60:200] = 255
    pixels = np.where(shown, 50, 255).astype(np.uint8)
    pixels[20:40, 80:90] = 120
    rgba = np.dstack([pixels, pixels, pixels, shown])
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", tile=(64, 64))
    convert(tmp_path / "a.tif", tmp_path / "a.ome.zarr")
    return [Entry(slide_id="a", path=str(tmp_path / name)) for name in ("a.tif", "a.ome.zarr")], shown > 0


def test_hidden_pixels_are_background_and_count_in_no_mean(scenes):
    entries, shown = scenes
    for entry in entries:
        image = open_image(entry, CONFIG, background=0.2)
        assert image.numbers == [0, 1, 2]
        read = image.read(1, torch.tensor([[0, 0, 80, 120]]))[0]
        assert set(read[:, ~shown[::2, ::2]].unique().tolist()) == {image.fill}
        assert read[:, shown[::2, ::2]].max() == 120
        resampled = SlideImage(image.slide, background=0.2, mpp=3.0, own_mpp=1.0)
        assert resampled.read(0, torch.tensor([[0, 0, 54, 80]])).max() == 120


def test_the_valid_area_is_what_is_shown(scenes):
    entries, shown = scenes
    config = replace(CONFIG, prior="valid")
    for entry in entries:
        mask = open_image(entry, config).mask  # of a coarser view: a pixel is valid where any below it is shown
        blocks = shown.reshape(len(mask.pixels), -1, mask.pixels.shape[1], int(mask.pitch_yx[1]))
        np.testing.assert_array_equal(mask.pixels.numpy(), blocks.any((1, 3)))


def test_one_that_is_named_is_a_band(scenes):
    (entry, _), shown = scenes
    image = open_image(entry, CONFIG, channels=["R", "A"])
    assert not image.hides_opacity
    pixels = image.read(0, torch.tensor([[0, 0, 160, 240]]))[0].numpy()
    np.testing.assert_array_equal(pixels[1] > 0, shown)
    assert pixels[0].max() == 255
    assert image.identity != open_image(entry, CONFIG, channels=["R"]).identity


def test_a_training_says_that_it_is_not_seen(scenes, capsys):
    (entry, _), _ = scenes
    entries = [replace(entry, slide_id=name, label=name) for name in "ab"]
    for channels, said in ((None, True), (("R", "G", "B", "A"), False)):
        data = {"test": 0, "channels": channels}
        config = parse_config({"model": plain(Config(model=CONFIG))["model"], "data": data}, "")
        found = select(entries, config, fail_fast=True)
        assert found.channels == (3 if said else 4)
        assert ("if it is a band, name it in data.channels" in capsys.readouterr().err) == said


def test_statistics_are_of_what_is_shown(scenes):
    entries, shown = scenes
    for entry in entries:
        (red, *_) = measure([entry]).channels
        assert red.pixels == shown.sum()
        assert red.percentiles["99"] == pytest.approx(120 / 255)


def test_the_viewer_shows_colours_with_nothing_beside(scenes):
    entries, shown = scenes
    with Slide(entries[0].path) as slide:
        look = paint.default_look(slide, paint.find_ranges(slide))
        picture = paint.painter(slide, look)(slide.read(0, (0, 0, 160, 240)))
    np.testing.assert_array_equal(picture[..., 3] > 0, shown)
    assert picture[shown][:, :3].max() == 120


def test_a_model_of_four_bands_says_what_became_of_the_fourth(scenes):
    (entry, _), _ = scenes
    with pytest.raises(DataError, match="3 channels where the model has 4; name 'A', which is read as opacity, in"):
        check_slide(open_image(entry, CONFIG), CONFIG, 4)
