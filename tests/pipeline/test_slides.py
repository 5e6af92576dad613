"""Slides of every kind as training data: what is opened, kept and refused."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import torch
import zarr

from nested_ats import CNNConfig
from nested_ats.images import find_level
from pipeline.config import parse_config, plain
from pipeline.data import slides as module
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.data.samples import SampleCache
from pipeline.data.slides import SlideImage, check_slide, open_slide
from pipeline.errors import DataError
from pipeline.results.predict import predict
from pipeline.sections import CacheConfig
from pipeline.training.train import train
from storage import Slide, StorageError, write_pyramid


def write_png(path, pixels):
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels.transpose(1, 2, 0))))
    return str(path)


def write_foreign(path, pixels, factors=(1, 2, 4)):
    """OME-Zarr 0.4 as other tools write it; sizes of coarser levels are rounded down."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    datasets = []
    for i, factor in enumerate(factors):
        level = pixels[
            :, : pixels.shape[1] // factor * factor : factor, : pixels.shape[2] // factor * factor : factor
        ]
        group.create_array(str(i), data=level[None, :, None], chunks=(1, 1, 1, 64, 64))
        scale = {"type": "scale", "scale": [1, 1, 1, 0.5 * factor, 0.5 * factor]}
        datasets.append({"path": str(i), "coordinateTransformations": [scale]})
    axes = [{"name": name, "type": kind} for name, kind in (("t", "time"), ("c", "channel"))]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return str(path)


@pytest.fixture
def manifest(tmp_path):
    """PNG files and OME-Zarr images of another writer, in turn."""
    rng = np.random.default_rng(0)
    entries = []
    for i in range(10):
        label = ("bar", "box")[i % 2]
        pixels = rng.integers(0, 60, (3, 121, 150), dtype=np.uint8)
        height, width = (20, 6) if label == "bar" else (12, 12)
        pixels[:, 40 : 40 + height, 50 : 50 + width] = 230
        foreign = i % 5 == 4
        path = tmp_path / f"slide {i}{'.zarr' if foreign else '.png'}"
        place = write_foreign(path, pixels) if foreign else write_png(path, pixels)
        split = "train" if i < 6 else "test"
        entries.append(Entry(slide_id=f"slide {i}", path=place, label=label, split=split))
    write_manifest(tmp_path / "manifest.csv", entries)
    return tmp_path / "manifest.csv"


def test_images_that_were_not_converted_are_trained_on_and_classified(config, manifest, tmp_path):
    once = parse_config({**plain(config), "train": {**plain(config)["train"], "epochs": 1}}, "test")
    entries = read_manifest(manifest)
    metrics, failures = train(entries, once, tmp_path / "run")
    assert failures == []
    assert np.isfinite(metrics["loss"])
    rows = predict([entry for entry in entries if entry.split == "test"], tmp_path / "run", tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(row["bytes_read"] > 0 for row in rows)


def test_levels_of_other_writers_are_found_whatever_their_rounding(tmp_path):
    pixels = np.ones((3, 1003, 997), np.uint8)
    with Slide(write_foreign(tmp_path / "f.zarr", pixels, (1, 4, 16))) as slide:
        assert [find_level(SlideImage(slide), downsample) for downsample in (1, 4, 16)] == [0, 1, 2]


def check(place, model):
    with open_slide(place) as slide:
        return check_slide(SlideImage(slide, mpp=model.mpp), model)


def test_what_a_model_does_not_take_is_refused(config, tmp_path):
    place = write_foreign(tmp_path / "single.zarr", np.ones((3, 64, 64), np.uint8), (1,))
    with pytest.raises(DataError, match=r"no level at downsample 4 \(it has 1\)"):
        check(place, config.model)
    narrow = write_foreign(tmp_path / "narrow.zarr", np.ones((3, 64, 20), np.uint8), (1,))
    with pytest.raises(DataError, match="64 x 20 pixels where the model looks first, .* no less than 24"):
        check(narrow, CNNConfig(encoder="lenet"))


def test_floats_of_any_precision_are_read(tmp_path):
    pixels = np.random.default_rng(0).random((2, 64, 64))
    with Slide(write_foreign(tmp_path / "f.zarr", pixels)) as slide:
        found = SlideImage(slide).read(0, torch.tensor([[0, 0, 64, 64]]))
    np.testing.assert_array_equal(found[0].numpy(), pixels)


def test_images_in_memory_are_kept_up_to_a_size(tmp_path, monkeypatch):
    places = [write_png(tmp_path / f"{i}.png", np.full((3, 64, 64), i, np.uint8)) for i in range(4)]
    with Slide(places[0]) as slide:
        monkeypatch.setattr("pipeline.data.samples._HELD_BYTES", 2 * slide.memory_bytes)
    cache = SampleCache(CNNConfig(), background=0)
    entries = [Entry(slide_id=str(place), path=str(place)) for place in places]
    images = [cache.open(entry) for entry in entries]
    assert cache.open(entries[3]) is images[3]
    assert cache.open(entries[2]) is images[2]
    assert cache.open(entries[0]) is not images[0]
    monkeypatch.setattr("pipeline.data.samples._HELD_BYTES", 1)
    assert cache.open(entries[1]) is cache.open(entries[1])  # one is always kept


def test_a_slide_that_is_open_is_not_taken_for_one_of_another_scale(tmp_path):
    place = tmp_path / "a.ome.zarr"
    write_pyramid(place, np.zeros((3, 64, 64), np.uint8), mpp=0.5)
    cache = SampleCache(CNNConfig(mpp=1.0), background=0)
    scales = [cache.open(Entry(slide_id="a", path=str(place), mpp=mpp)).scale for mpp in (None, 1.0, 0.5)]
    assert scales == [2.0, 1.0, 2.0]


def test_only_slides_at_urls_are_cached(monkeypatch, tmp_path):
    opened = []

    def spy(path, *, cache=None):
        opened.append((path, cache and cache.max_bytes))
        return Slide(place)

    place = write_png(tmp_path / "a.png", np.zeros((3, 8, 8), np.uint8))
    monkeypatch.setattr(module, "Slide", spy)
    slides = SampleCache(CNNConfig(), background=0, cache=CacheConfig(folder=tmp_path / "cache", gigabytes=0.5))
    slides.open(Entry(slide_id="a", path="s3://bucket/a.zarr"))
    slides.open(Entry(slide_id="b", path=place))
    assert opened == [("s3://bucket/a.zarr", 5 * 10**8), (place, None)]


def test_the_cache_is_configured_and_off_by_default(tmp_path, monkeypatch):
    assert parse_config({}, "").data.cache is None
    monkeypatch.chdir(tmp_path)
    config = parse_config({"data": {"cache": {"folder": "chunks", "gigabytes": 2}}}, "")
    assert config.data.cache == CacheConfig(folder=tmp_path / "chunks", gigabytes=2)
    assert parse_config(plain(config), "") == config
    (tmp_path / "chunks").touch()
    with pytest.raises(StorageError, match="cannot be used as a cache"):
        SampleCache(CNNConfig(), background=0, cache=config.data.cache).open(
            Entry(slide_id="a", path="s3://bucket/a.zarr")
        )
