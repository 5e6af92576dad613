"""Slides of several scanners at the model's scale: the same pixels and draws, and places that are the slide's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import torch

from nested_ats.images import find_level, scale_pixels
from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry, read_manifest
from pipeline.data.selection import select
from pipeline.data.slides import SlideImage, check_slide
from pipeline.errors import DataError
from pipeline.results.heatmap import heatmaps
from pipeline.results.map_files import OBJECTS
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.training.train import train
from storage import Slide, convert, write_pyramid
from storage.images.halving import downsample


def smooth(height, width, seed=0):
    """(3, H, W) uint8 that a mean over areas changes little, so that scales can be compared."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((3, height // 16 + 2, width // 16 + 2))
    fine = np.kron(coarse, np.ones((16, 16)))[:, :height, :width]
    for axis in (1, 2):
        fine = sum(np.roll(fine, shift, axis) for shift in range(-6, 7)) / 13
    return (fine * 255).round().astype(np.uint8)


def slide_at(path, pixels, mpp):
    write_pyramid(path, pixels, mpp=mpp)
    return Slide(path)


def read(image, downsample, box):
    return image.read(find_level(image, downsample), torch.tensor([box]))[0].numpy()


@pytest.fixture
def pixels():
    return smooth(400, 520)


class TestPixels:
    def test_without_a_scale_nothing_changes(self, tmp_path, pixels):
        with slide_at(tmp_path / "a.ome.zarr", pixels, 0.25) as slide:
            image = SlideImage(slide)
            assert (image.scale, image.downsamples[0], image.shapes[0]) == (1.0, 1.0, (400, 520))
            assert image.sources == list(range(len(slide.levels)))
            assert image.identity == SlideImage(slide, mpp=0.25).identity

    @pytest.mark.parametrize("own", [0.25, 0.2278, 0.27])
    def test_a_level_within_a_tenth_is_taken_as_it_is(self, tmp_path, pixels, own):
        with slide_at(tmp_path / "a.ome.zarr", pixels, own) as slide:
            image = SlideImage(slide, mpp=0.5)
            assert image.scale == 2.0
            assert image.downsamples[:3] == [1.0, 2.0, 4.0]
            assert image.shapes[0] == (200, 260)
            np.testing.assert_array_equal(read(image, 1, (10, 20, 50, 60)), slide.read(1, (10, 20, 50, 60)))

    @pytest.mark.parametrize("shrink", [1.2, 1.5, 1.7, 3.0])
    def test_other_pixels_are_means_over_areas(self, tmp_path, pixels, shrink):
        """Against every pixel cut in 20 x 20, of which a new one has a whole number."""
        with slide_at(tmp_path / "a.ome.zarr", pixels, 0.25) as slide:
            image = SlideImage(slide, mpp=0.25 * shrink)
            assert image.scale == pytest.approx(shrink)
            source = image.sources[0]
            own = slide.read(source, (0, 0, *slide.levels[source].shape_yx))
            factor = shrink / slide.levels[source].downsample
            y, x, h, w = 17, 31, 12, 9
            found = read(image, 1, (y, x, h, w))
            fine = np.repeat(np.repeat(own, 20, 1), 20, 2)
            step = round(20 * factor)
            assert step == pytest.approx(20 * factor)
            wanted = fine[:, y * step : (y + h) * step, x * step : (x + w) * step]
            wanted = wanted.reshape(3, h, step, w, step).mean((2, 4))
            assert np.abs(found - wanted).max() <= 0.51

    def test_boxes_that_leave_the_image_and_several_at_once(self, tmp_path, pixels):
        with slide_at(tmp_path / "a.ome.zarr", pixels, 0.25) as slide:
            image = SlideImage(slide, mpp=0.37, background=1.0)
            boxes = torch.tensor([[-5, -7, 30, 30], [100, 200, 30, 30], [260, 340, 30, 30]])
            together = image.read(0, boxes)
            for box, own in zip(boxes, together, strict=True):
                assert torch.equal(image.read(0, box[None])[0], own)
            assert (together[0, :, :4, :6] == 255).all()

    @pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
    def test_types_stay(self, tmp_path, dtype):
        pixels = np.full((2, 90, 90), 1234, dtype)
        with slide_at(tmp_path / "a.ome.zarr", pixels, 0.25) as slide:
            found = read(SlideImage(slide, mpp=0.4), 1, (3, 4, 20, 20))
        assert found.dtype == pixels.dtype
        np.testing.assert_allclose(found, 1234, rtol=1e-6)

    def test_its_identity_is_of_the_scale_too(self, tmp_path, pixels):
        with slide_at(tmp_path / "a.ome.zarr", pixels, 0.25) as slide:
            names = {SlideImage(slide, mpp=mpp).identity for mpp in (None, 0.4, 0.5, 1.0)}
        assert len(names) == 4

    def test_a_slide_that_is_too_coarse_or_does_not_tell(self, tmp_path, pixels):
        with slide_at(tmp_path / "a.ome.zarr", pixels, 0.5) as slide:
            with pytest.raises(DataError, match=r"a\.ome\.zarr: recorded at 0\.5 .* coarser than the model's 0\.25"):
                SlideImage(slide, mpp=0.25)
            assert SlideImage(slide, mpp=0.25, own_mpp=0.25).scale == 1.0  # the manifest knows better
        with slide_at(tmp_path / "b.ome.zarr", pixels, None) as slide:
            with pytest.raises(DataError, match="does not tell what a pixel measures, .* give it a column mpp"):
                SlideImage(slide, mpp=0.25)
            assert SlideImage(slide, mpp=0.25, own_mpp=0.125).scale == 2.0


@pytest.fixture(scope="module")
def two_scales(pyramids, tmp_path_factory):
    """Entries of the same slides, stored at the pixels they have, at 0.5, and finer by two, at 0.25 micrometres."""
    folder = tmp_path_factory.mktemp("fine")
    coarse, fine = [], []
    for entry in read_manifest(pyramids):
        with Slide(entry.path) as slide:
            pixels = slide.read(0, (0, 0, *slide.shape_yx))
        path = folder / f"{entry.slide_id}.ome.zarr"
        write_pyramid(path, np.repeat(np.repeat(pixels, 2, 1), 2, 2), mpp=0.25)  # whose mean is the pixels again
        coarse.append(entry)
        fine.append(Entry(slide_id=entry.slide_id, path=str(path), label=entry.label, split=entry.split))
    return coarse, fine


@pytest.fixture(scope="module")
def scaled(config):
    raw = plain(config)
    return parse_config({**raw, "model": {**raw["model"], "mpp": 0.5}}, "test")


class TestTheWholeWay:
    def test_both_scales_train_and_predict_alike(self, two_scales, scaled, tmp_path):
        coarse, fine = two_scales
        mixed = [one if i % 3 else other for i, (one, other) in enumerate(zip(coarse, fine, strict=True))]
        rows = {}
        for name, entries in (("coarse", coarse), ("mixed", mixed)):
            train(entries, scaled, tmp_path / name)
            rows[name] = predict(fine, tmp_path / name, tmp_path / f"of {name}")
        rows["coarse again"] = predict(coarse, tmp_path / "coarse", tmp_path / "again")
        for one, other, again in zip(*rows.values(), strict=True):
            assert one["status"] == other["status"] == "ok"
            assert one["prob_bar"] == other["prob_bar"] == again["prob_bar"]

    def test_heatmaps_are_in_pixels_of_the_slide(self, two_scales, scaled, tmp_path):
        coarse, fine = two_scales
        train(coarse, scaled, tmp_path / "run")
        settings = prediction_settings(tmp_path / "run")
        corners = []
        for name, entry, factor in (("coarse", coarse[0], 1), ("fine", fine[0], 2)):
            [made] = heatmaps([entry], settings, tmp_path / name)
            assert not made.error
            features = json.loads((made.folder / OBJECTS).read_text())["features"]
            corners.append([np.array(each["geometry"]["coordinates"][0]) / factor for each in features])
            with Slide(made.folder / "attention.ome.zarr") as heat, Slide(entry.path) as slide:
                side = heat.levels[0].shape_yx[0] * heat.levels[0].scale_yx[0]  # micrometres
                assert side == pytest.approx(slide.shape_yx[0] * slide.mpp, rel=0.1)
        np.testing.assert_allclose(*corners)

    def test_scanners_that_differ_are_named_unless_the_model_has_a_scale(self, two_scales, config, scaled, capsys):
        coarse, fine = two_scales
        both = [*coarse[:4], *fine[4:]]
        select(both, config, fail_fast=False)
        words = capsys.readouterr().err
        assert "scanned at 0.25 (10) and 0.5 (4) micrometres per pixel, and the model sees them as if at one" in words
        chosen = select(both, scaled, fail_fast=False)
        assert "scanned" not in capsys.readouterr().err
        assert sorted(set(chosen.downsamples)) == [(4.0, 2.0, 1.0), (8.0, 4.0, 2.0)]
        select(coarse, config, fail_fast=False)
        assert "scanned" not in capsys.readouterr().err

    def test_one_that_does_not_fit_is_left_out_alone(self, two_scales, config, tmp_path):
        coarse, fine = two_scales
        raw = plain(config)
        finer = parse_config({**raw, "model": {**raw["model"], "mpp": 0.25}}, "test")
        chosen = select([*coarse[:2], *fine[2:]], finer, fail_fast=False)
        assert [failure.slide_id for failure in chosen.failures] == ["slide 0", "slide 1"]
        assert "coarser than the model's 0.25" in chosen.failures[0].error

    def test_a_level_that_no_power_of_two_reaches(self, tmp_path, scaled):
        with slide_at(tmp_path / "a.ome.zarr", smooth(400, 520), 0.3) as slide:
            assert check_slide(SlideImage(slide, mpp=scaled.model.mpp), scaled.model) == [2, 1, 0]


def test_pixels_that_are_not_square_are_refused(tmp_path):
    image = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.6, "axes": "YXS"}
    tifffile.imwrite(
        tmp_path / "a.ome.tif", smooth(90, 90).transpose(1, 2, 0), photometric="rgb", metadata=image, ome=True
    )
    with Slide(tmp_path / "a.ome.tif") as slide:
        assert SlideImage(slide).scale == 1.0
        with pytest.raises(DataError, match=r"a\.ome\.tif: its pixels are 1\.2 times as high as wide"):
            SlideImage(slide, mpp=0.5)


def test_a_mean_of_two_is_that_of_a_conversion(tmp_path):
    pixels = smooth(200, 240)
    write_pyramid(tmp_path / "a.ome.zarr", pixels, mpp=0.5)
    with Slide(tmp_path / "a.ome.zarr") as slide:
        image = SlideImage(slide, mpp=0.5)
        image._levels[1] = image._levels[1]._replace(source=0, shrink=2.0)  # as if the level were missing
        np.testing.assert_array_equal(image.read(1, torch.tensor([[0, 0, 100, 120]]))[0].numpy(), downsample(pixels))


class TestNodata:
    """Pixels without data are background to the model, and count in no mean."""

    def slide(self, path, pixels, nodata):
        tags = [(42113, "s", 0, str(nodata), True)]
        options = {"photometric": "minisblack", "planarconfig": "separate", "tile": (64, 64)}
        tifffile.imwrite(path, pixels, extratags=tags, resolution=(20000, 20000), resolutionunit=3, **options)
        return Slide(path)

    def scene(self, dtype, nodata):
        pixels = np.random.default_rng(0).integers(1, 200, (2, 200, 240)).astype(dtype)
        pixels[:, :64, :64], pixels[1, 100, 100:110], pixels[0, 101, 100:110] = nodata, nodata, nodata
        return pixels

    @pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize(("dtype", "nodata"), [("int16", -32768), ("uint16", 65535), ("float32", np.nan)])
    def test_it_becomes_the_background(self, tmp_path, dtype, nodata, background):
        pixels = self.scene(dtype, nodata)
        with self.slide(tmp_path / "x.tif", pixels, nodata) as slide:
            image = SlideImage(slide, background=background)
            box = (-10, 30, 150, 120)
            found = read(image, 1, box)
            gone = np.isnan(pixels) if dtype == "float32" else pixels == nodata
            expected = np.full((2, 150, 120), image.fill, dtype)
            expected[:, 10:] = np.where(gone, image.fill, pixels)[:, :140, 30:150]
            np.testing.assert_array_equal(found, expected)
            assert image.identity != SlideImage(slide, background=0.25).identity

    @pytest.mark.parametrize(("dtype", "nodata"), [("int16", -32768), ("float32", -9999)])
    def test_it_is_not_averaged_over_areas(self, tmp_path, dtype, nodata):
        pixels = self.scene(dtype, nodata)
        with self.slide(tmp_path / "x.tif", pixels, nodata) as slide:
            assert slide.mpp == pytest.approx(0.5)
            image = SlideImage(slide, mpp=0.75, background=0.5)
            y, x, h, w = 38, 38, 40, 60
            found = read(image, 1, (y, x, h, w)).astype(float)
            fine = np.repeat(np.repeat(pixels.astype(float), 2, 1), 2, 2)  # of which a new pixel has 3 x 3
            fine[fine == nodata] = np.nan
            blocks = fine[:, 3 * y : 3 * (y + h), 3 * x : 3 * (x + w)].reshape(2, h, 3, w, 3)
            count = (~np.isnan(blocks)).sum((2, 4))
            mean = np.nansum(blocks, (2, 4)) / np.maximum(count, 1)
            assert (count == 0).any()
            assert ((count > 0) & (count < 9)).any()
            np.testing.assert_allclose(
                found, np.where(count, mean, image.fill), atol=0.51 if dtype == "int16" else 1e-3
            )


class TestValues:
    """Pixels are over the largest value that the slide can have, whatever type holds them."""

    @pytest.mark.parametrize(
        ("dtype", "bits", "largest"),
        [
            ("uint16", 12, 4095),
            ("uint8", 4, 15),
            ("uint16", 16, 65535),
            ("int8", 8, 127),
            ("int32", 32, 2**31 - 1),
            ("uint32", 32, 2**32 - 1),
        ],
    )
    @pytest.mark.parametrize("mpp", [None, 0.75])
    def test_they_reach_one(self, tmp_path, dtype, bits, largest, mpp):
        pixels = np.full((90, 100), largest, dtype)
        pixels[50:] = 0
        options = {"bitspersample": bits} if dtype[0] == "u" and bits not in (16, 32) else {}
        path = tmp_path / "x.tif"
        tifffile.imwrite(
            path, pixels, photometric="minisblack", resolution=(20000, 20000), resolutionunit=3, **options
        )
        convert(path, tmp_path / "p.ome.zarr")
        for place in (path, tmp_path / "p.ome.zarr"):
            with Slide(place) as slide:
                assert slide.bits == options.get("bitspersample")
                image = SlideImage(slide, background=0.5, mpp=mpp)
                found = scale_pixels(image.read(0, torch.tensor([[-2, 0, 60, 40]])))[0, 0]
                assert found[:2].mean() == pytest.approx(0.5, rel=1e-2 if dtype != "uint8" else 0.1)
                assert found[2:30].min() == pytest.approx(1, rel=1e-6)
                assert found[2:30].max() == pytest.approx(1, rel=1e-6)


class TestAssumedScale:
    def test_slides_without_units_are_taken_as_told(self, tmp_path, scaled, capsys):
        entries = []
        for number, mpp in enumerate((0.25, 0.25, None, None)):
            write_pyramid(tmp_path / f"{number}.ome.zarr", smooth(400, 520), mpp=mpp)
            label, split = "ab"[number % 2], "train" if number < 3 else "test"
            entries.append(
                Entry(slide_id=str(number), path=str(tmp_path / f"{number}.ome.zarr"), label=label, split=split)
            )
        raw = plain(scaled)
        without = select(entries, scaled, fail_fast=False)
        assert [failure.slide_id for failure in without.failures] == ["2", "3"]
        assert "or set data.assume_mpp" in without.failures[0].error
        raw["data"]["assume_mpp"] = 0.25
        assert not select(entries, parse_config(raw, "test"), fail_fast=False).failures
        assert (
            "2 of 4 slides do not tell what their pixels measure, and are taken as of 0.25" in capsys.readouterr().err
        )
