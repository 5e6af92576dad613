"""Tissue and valid pixels are found once for each slide, kept, and decide which patches can be drawn."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

from nested_ats import LevelConfig, ModelConfig
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.augment import AugmentedImage
from pipeline.data.manifest import Entry, read_manifest
from pipeline.data.outlines import read_mask, to_outlines
from pipeline.data.samples import SampleCache
from pipeline.data.selection import select
from pipeline.data.slides import open_image
from pipeline.data.tissue import Finding, find_mask, put_into_pyramid
from pipeline.errors import DataError
from pipeline.results.predictions import receipt
from pipeline.sections import AugmentConfig
from storage import Slide, validate, write_pyramid

EOSIN, HAEMATOXYLIN, DAB = (225, 150, 185), (110, 80, 150), (130, 85, 50)
LEVELS = (LevelConfig(downsample=2, stride=4, samples=8, channels=(4,)),)
INKS = {"blue": (40, 70, 170), "green": (30, 120, 70), "red": (210, 40, 50), "black": (25, 25, 28)}


def paint(size=1024, glass=240, **parts):
    """Glass with the noise of a camera, and boxes (y0, x0, y1, x1) of a colour."""
    rng = np.random.default_rng(0)
    pixels = np.full((size, size, 3), glass, np.float64)
    for boxes, colour in parts.values():
        for y0, x0, y1, x1 in boxes:
            pixels[y0:y1, x0:x1] = colour
    return np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8).transpose(2, 0, 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def slide_of(folder, pixels, name="a", mpp=8.0):
    write_pyramid(folder / f"{name}.ome.zarr", pixels, mpp=mpp)
    return Entry(slide_id=name, path=str(folder / f"{name}.ome.zarr"))


def found_on(entry, prior="tissue", **options):
    with Slide(entry.path) as slide:
        return find_mask(slide, entry, prior, **options)


def overlap(mask, boxes):
    """Intersection over union of a mask and boxes."""
    wanted = np.zeros(mask.shape, bool)
    for y0, x0, y1, x1 in boxes:
        wanted[y0:y1, x0:x1] = True
    return (mask & wanted).sum() / (mask | wanted).sum()


class TestTissue:
    @pytest.mark.parametrize(
        ("colour", "glass"), [(EOSIN, 245), (EOSIN, 230), (HAEMATOXYLIN, 205), (DAB, 205), ((200, 185, 198), 245)]
    )
    def test_stained_tissue_is_found_on_glass(self, tmp_path, colour, glass):
        boxes = [(200, 300, 600, 800), (700, 100, 900, 250)]
        entry = slide_of(tmp_path, paint(glass=glass, tissue=(boxes, colour)))
        assert overlap(found_on(entry).pixels, boxes) > 0.97

    @pytest.mark.parametrize("ink", INKS)
    def test_ink_and_dark_borders_are_left_out(self, tmp_path, ink):
        boxes = [(300, 300, 700, 700)]
        parts = {"tissue": (boxes, HAEMATOXYLIN), "ink": ([(50, 50, 80, 900)], INKS[ink])}
        entry = slide_of(tmp_path, paint(**parts, border=([(960, 0, 1024, 1024)], (12, 9, 10))))
        assert overlap(found_on(entry).pixels, boxes) > 0.97

    def test_specks_go_and_holes_are_filled(self, tmp_path):
        tissue, hole, lumen = (200, 200, 800, 800), (300, 300, 310, 310), (500, 500, 600, 600)
        speck = (50, 50, 60, 60)
        pixels = paint(tissue=([tissue, speck], EOSIN), hole=([hole, lumen], (240,) * 3))
        found = found_on(slide_of(tmp_path, pixels)).pixels
        assert not found[40:70, 40:70].any()  # 0.0064 mm2
        assert found[300:310, 300:310].all()
        assert not found[520:580, 520:580].any()  # 0.64 mm2
        finding = Finding(speck_um2=0, hole_um2=0, closing_um=0)
        found = found_on(Entry(slide_id="a", path=str(tmp_path / "a.ome.zarr")), finding=finding).pixels
        assert found[52:58, 52:58].all()
        assert not found[302:308, 302:308].any()

    def test_a_slide_that_is_all_tissue_is_all_found(self, tmp_path):
        entry = slide_of(tmp_path, paint(tissue=([(0, 0, 1024, 1024)], EOSIN)))
        assert found_on(entry).pixels.mean() > 0.99

    def test_the_view_is_that_of_eight_micrometres(self, tmp_path):
        pixels = paint(size=2048, tissue=([(512, 512, 1536, 1536)], EOSIN))
        found = found_on(slide_of(tmp_path, pixels, mpp=2.0))
        assert found.pixels.shape == (512, 512)
        assert found.pitch_yx == (4.0, 4.0)
        assert found.area_l0 == pytest.approx(1024**2, rel=0.02)

    def test_grey_slides_and_empty_ones_are_named(self, tmp_path):
        config = ModelConfig(levels=LEVELS, prior="tissue")
        grey = slide_of(tmp_path, np.full((1, 600, 600), 90, np.uint8), "grey")
        with pytest.raises(DataError, match=r"grey\.ome\.zarr: tissue is told by colour, and it has 1 channels"):
            open_image(grey, config)
        empty = slide_of(tmp_path, paint(), "empty")
        with pytest.raises(DataError, match=r"empty\.ome\.zarr: no tissue was found on it; leave it out"):
            open_image(empty, config)

    def test_a_mask_is_found_once(self, tmp_path, monkeypatch):
        entry = slide_of(tmp_path, paint(tissue=([(200, 200, 800, 800)], EOSIN)))
        first = found_on(entry)
        monkeypatch.setattr("pipeline.data.tissue.tissue", None)  # it would fail
        again = found_on(entry)
        assert (again.pixels == first.pixels).all()
        assert again.pitch_yx == first.pitch_yx
        with pytest.raises(TypeError):
            found_on(entry, finding=Finding(threshold=0.3))

    @pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive"])
    def test_a_damaged_mask_is_found_again(self, tmp_path, damage):
        entry = slide_of(tmp_path, paint(tissue=([(200, 200, 800, 800)], EOSIN)))
        first = found_on(entry)
        [kept] = (tmp_path / "cache" / "nested-ats" / "masks").iterdir()
        kept.write_bytes(damage)
        assert (found_on(entry).pixels == first.pixels).all()
        assert kept.stat().st_size > 100


class TestMasksInPyramids:
    """They go where the pyramid goes, and are taken where the view that they are of is looked for."""

    def entry(self, folder, monkeypatch):
        """A slide that holds its mask, on a machine that has seen neither; and the mask."""
        entry = slide_of(folder, paint(tissue=([(200, 200, 800, 800)], EOSIN)))
        with Slide(entry.path) as slide:
            found = find_mask(slide, entry, "tissue")
            put_into_pyramid(slide, "tissue", found)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "another machine"))
        return entry, found

    def test_they_are_found_again(self, tmp_path, monkeypatch):
        entry, first = self.entry(tmp_path, monkeypatch)
        monkeypatch.setattr("pipeline.data.tissue.tissue", None)  # it would fail
        again = found_on(entry)
        assert (again.pixels == first.pixels).all()
        assert again.pitch_yx == first.pitch_yx
        with pytest.raises(TypeError):
            found_on(replace(entry, mpp=4.0))  # which is found on another view
        model = ModelConfig(levels=LEVELS, patch_size=24, prior="tissue")
        assert open_image(entry, model).mask.nbytes > 0

    def test_a_damaged_one_is_found_anew(self, tmp_path, monkeypatch):
        entry, first = self.entry(tmp_path, monkeypatch)
        shard = Path(entry.path, "labels", "tissue", "0", "c", "0", "0", "0")
        shard.write_bytes(shard.read_bytes()[:-9])
        assert (found_on(entry).pixels == first.pixels).all()

    def test_that_of_another_slide_is_not_taken(self, tmp_path, monkeypatch):
        entry, first = self.entry(tmp_path, monkeypatch)
        other = slide_of(tmp_path, paint(tissue=([(100, 100, 900, 300)], EOSIN)), "b")
        shutil.copytree(Path(entry.path, "labels"), Path(other.path, "labels"))
        assert (found_on(other).pixels != first.pixels).any()

    def test_the_command_puts_them_there(self, cohort, tmp_path, monkeypatch):
        done = CliRunner().invoke(app, ["tissue", str(cohort), "--out", str(tmp_path / "masks"), "--into-pyramids"])
        assert done.exit_code == 3, done.output  # slide-6 has no tissue
        entries = read_manifest(cohort)
        assert [Path(entry.path, "labels", "tissue").exists() for entry in entries] == [True] * 6 + [False]
        assert all(validate(entry.path, full=True) == [] for entry in entries)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        monkeypatch.setattr("pipeline.data.tissue.tissue", None)
        assert found_on(entries[0]).pixels.any()

    def test_slides_that_hold_none_are_named_and_keep_their_outlines(self, tmp_path):
        pixels = paint(tissue=([(200, 200, 800, 800)], EOSIN)).transpose(1, 2, 0)
        tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(128, 128), photometric="rgb")
        out = tmp_path / "masks"
        done = CliRunner().invoke(app, ["tissue", str(tmp_path / "a.tif"), "--out", str(out), "--into-pyramids"])
        assert done.exit_code == 4
        assert "a.tif: is no pyramid that convert made, and can hold no mask" in done.stderr
        assert [entry.slide_id for entry in read_manifest(out / "manifest.csv")] == ["a"]


def test_valid_pixels_are_all_but_nodata(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 255, (4, 512, 512), dtype=np.uint8)
    pixels[:, :, :200] = 0
    pixels[1:, 300:310, 300:310] = 0  # one channel was recorded
    entry = slide_of(tmp_path, pixels, mpp=None)
    found = found_on(entry, "valid", nodata=0.0)
    assert found.pixels.shape == (64, 64)  # a 64th of the pixels is read, however small the slide
    assert found.pitch_yx == (8, 8)
    assert not found.pixels[:, : 200 // 8].any()
    assert found.pixels[:, 200 // 8 :].all()
    assert found_on(entry, "valid").pixels.all()


class TestColumn:
    POLYGON = ((100, 50), (900, 50), (900, 450), (100, 450))  # x, y
    HOLE = ((300, 150), (500, 150), (500, 250), (300, 250))

    def write(self, path, content):
        path.write_text(json.dumps(content))
        return str(path)

    def feature(self, *rings, kind="Polygon", name="Tissue"):
        closed = [[*map(list, ring), list(ring[0])] for ring in rings]
        coordinates = closed if kind == "Polygon" else [closed]
        properties = {"classification": {"name": name}}
        return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}

    @pytest.mark.parametrize("kind", ["Polygon", "MultiPolygon"])
    @pytest.mark.parametrize("wrapped", [True, False])
    def test_outlines_of_qupath_are_filled(self, tmp_path, kind, wrapped):
        features = [self.feature(self.POLYGON, self.HOLE, kind=kind), self.feature(self.HOLE, name="Ignore*")]
        content = {"type": "FeatureCollection", "features": features} if wrapped else features
        mask, pitch = read_mask(self.write(tmp_path / "a.geojson", content), (600, 1000))
        assert (mask.shape, pitch) == ((600, 1000), (1.0, 1.0))
        wanted = np.zeros((600, 1000), bool)
        wanted[50:450, 100:900] = True
        wanted[150:250, 300:500] = False
        assert (mask == wanted).all()

    def test_large_slides_have_coarser_masks_of_the_same_area(self, tmp_path):
        rings = [[(100 * x, 100 * y) for x, y in ring] for ring in (self.POLYGON, self.HOLE)]
        mask, pitch = read_mask(self.write(tmp_path / "a.json", self.feature(*rings)), (60_000, 100_000))
        assert max(mask.shape) == 4096
        assert mask.sum() * pitch[0] * pitch[1] == pytest.approx(3e9, rel=1e-3)

    def test_outlines_come_back_as_the_mask_that_they_outline(self, tmp_path):
        yy, xx = np.mgrid[:300, :400]
        mask = ((yy - 120) ** 2 + (xx - 150) ** 2 < 90**2) & ~((yy - 100) ** 2 + (xx - 150) ** 2 < 30**2)
        mask |= (yy > 250) & (xx > 300)
        content = to_outlines(mask, (8.0, 8.0), "tissue")
        assert [len(each["geometry"]["coordinates"]) for each in content["features"]] == [2, 1]
        again, pitch = read_mask(self.write(tmp_path / "a.geojson", content), (2400, 3200))
        assert pitch == (1.0, 1.0)
        wanted = mask.repeat(8, 0).repeat(8, 1)
        assert (again != wanted).mean() < 0.004

    def test_an_image_may_be_a_mask(self, tmp_path):
        pixels = np.zeros((300, 500), np.uint8)
        pixels[100:200, 250:] = 1
        tifffile.imwrite(tmp_path / "m.tif", pixels, tile=(64, 64))
        mask, pitch = read_mask(str(tmp_path / "m.tif"), (1500, 2500))
        assert (mask == (pixels > 0)).all()
        assert pitch == (5.0, 5.0)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "is not JSON"),
            ("[" * 9999, "is not JSON"),
            ('{"a": 1}', "is not GeoJSON"),
            ('{"type": "Polygon", "coordinates": [[["x", 1]]]}', "is not GeoJSON"),
            ('{"type": "Polygon", "coordinates": [[[1e999, 1], [2, 3]]]}', "is not GeoJSON"),
            ('{"type": "Polygon", "coordinates": []}', "is not GeoJSON"),
            ('{"type": "FeatureCollection", "features": []}', "has no polygon"),
            ('{"type": "Polygon", "coordinates": [[[0, 0], [5000, 0], [0, 900]]]}', "off the slide"),
        ],
    )
    def test_what_is_no_outline_of_the_slide_is_refused(self, tmp_path, content, match):
        (tmp_path / "a.geojson").write_text(content)
        with pytest.raises(DataError, match=rf"a\.geojson: .*{match}"):
            read_mask(str(tmp_path / "a.geojson"), (600, 1000))

    def test_a_mask_that_is_missing_or_of_another_slide_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"gone\.geojson: does not exist"):
            read_mask(str(tmp_path / "gone.geojson"), (600, 1000))
        tifffile.imwrite(tmp_path / "m.tif", np.ones((300, 300), np.uint8), tile=(64, 64))
        with pytest.raises(DataError, match=r"m\.tif: 300 x 300 pixels have other proportions than the slide's"):
            read_mask(str(tmp_path / "m.tif"), (600, 1000))
        entry = slide_of(tmp_path, paint())
        with pytest.raises(DataError, match="has no mask, and model.prior is column"):
            found_on(entry, "column")


class TestKept:
    """Masks in files are filled once for each state of the file."""

    def outlined(self, folder, right):
        content = {"type": "Polygon", "coordinates": [[[100, 100], [right, 100], [right, 900], [100, 900]]]}
        (folder / "a.geojson").write_text(json.dumps(content))
        return replace(slide_of(folder, paint()), mask=str(folder / "a.geojson"))

    def test_more_slides_than_are_held_open_fill_no_mask_twice(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pipeline.data.samples._OPEN_SLIDES", 1)
        entries = [self.outlined(tmp_path, 900)]
        entries.append(replace(slide_of(tmp_path, paint(), "b"), mask=entries[0].mask))
        calls = []
        monkeypatch.setattr("pipeline.data.tissue.read_mask", lambda *args: calls.append(args) or read_mask(*args))
        cache = SampleCache(ModelConfig(levels=LEVELS, patch_size=24, prior="column"))
        for _ in range(3):
            for entry in entries:
                assert cache.open(entry).mask is not None
        assert len(calls) == 1  # they are of one size and have one mask

    def test_a_corrected_one_is_filled_anew(self, tmp_path):
        entry = self.outlined(tmp_path, 900)
        first = found_on(entry, "column")
        assert (found_on(entry, "column").pixels == first.pixels).all()
        corrected = Path(entry.mask).read_text().replace("900", "800")  # of as many bytes
        Path(entry.mask).write_text(corrected)
        assert found_on(entry, "column").pixels.sum() < first.pixels.sum()

    def test_one_that_is_a_pyramid_is_read_each_time(self, tmp_path):
        entry = slide_of(tmp_path, paint())
        inside = np.zeros((1, 512, 512), np.uint8)
        write_pyramid(tmp_path / "mask.ome.zarr", inside + 1)
        entry = replace(entry, mask=str(tmp_path / "mask.ome.zarr"))
        assert found_on(entry, "column").pixels.all()
        write_pyramid(tmp_path / "mask.ome.zarr", inside, overwrite=True)
        assert not found_on(entry, "column").pixels.any()


@pytest.mark.parametrize("key", range(12))
def test_a_mask_is_moved_like_the_pixels(tmp_path, key):
    pixels = np.random.default_rng(0).integers(0, 2, (1, 70, 90), dtype=np.uint8) * 255
    entry = slide_of(tmp_path, pixels)
    tifffile.imwrite(tmp_path / "m.tif", pixels[0], tile=(64, 64))
    config = ModelConfig(levels=LEVELS, patch_size=24, prior="column")
    image = open_image(Entry(slide_id="a", path=entry.path, mask=str(tmp_path / "m.tif")), config)
    moved = AugmentedImage(image, AugmentConfig(flip=True, translation=0.3), key, downsample=2)
    corners = torch.randint(-5, 60, (40, 2), generator=torch.Generator().manual_seed(key))
    wanted = (moved.read(0, torch.cat([corners, torch.full_like(corners, 9)], -1)) > 0).sum((1, 2, 3)).double()
    assert moved.mask is not None
    torch.testing.assert_close(moved.mask.area(torch.cat([corners, corners + 9], -1)), wanted)


@pytest.fixture
def cohort(tmp_path):
    """Six slides with tissue, of two labels, and one without."""
    rows = []
    for number in range(7):
        boxes = [(100 + 20 * number, 200, 500, 700)] if number < 6 else []
        entry = slide_of(tmp_path, paint(tissue=(boxes, EOSIN)), f"slide-{number}")
        rows.append([entry.slide_id, entry.path, "ab"[number % 2], "test" if number > 3 else "train"])
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "path", "label", "split"], *rows])
    return tmp_path / "slides.csv"


def test_the_command_writes_what_one_can_look_at_and_train_with(cohort, tmp_path):
    out = tmp_path / "masks"
    done = CliRunner().invoke(app, ["tissue", str(cohort), "--out", str(out)])
    assert done.exit_code == 3, done.output
    assert "slide-6  " in done.stderr
    assert "nothing was found" in done.stderr
    assert "slide-0: 19.1% of the slide, 12.8 mm2" in done.stdout
    assert (out / "contact-1.png").read_bytes()[:4] == b"\x89PNG"
    entries = read_manifest(out / "manifest.csv", labelled=True)
    assert [entry.slide_id for entry in entries] == [f"slide-{number}" for number in range(6)]
    with (out / "tissue.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["error"]) for row in rows] == [False] * 6 + [True]
    with Slide(entries[0].path) as slide:
        own = find_mask(slide, entries[0], "column")
        found = find_mask(slide, entries[0], "tissue")
    assert own.area_l0 == pytest.approx(found.area_l0, rel=0.01)


def test_a_training_leaves_out_what_has_nothing_to_see(cohort, config):
    raw = plain(config)
    raw["model"] |= {"prior": "tissue"}
    chosen = select(read_manifest(cohort), parse_config(raw, "test"), fail_fast=False)
    assert [failure.slide_id for failure in chosen.failures] == ["slide-6"]
    assert "no tissue was found on it" in chosen.failures[0].error


def test_a_result_is_not_kept_where_the_mask_or_the_scale_changed(tmp_path):
    entry = Entry(slide_id="a", path="/slides/a.svs", mask=str(tmp_path / "a.geojson"))
    Path(entry.mask).write_text("first")
    first, at_url = receipt(entry), receipt(replace(entry, mask="s3://bucket/a.geojson"))
    assert receipt(replace(entry, label="tumour")) == first
    others = [replace(entry, mpp=0.5), replace(entry, mask=""), replace(entry, path="/slides/b.svs")]
    assert len({first, at_url, *map(receipt, others)}) == 5
    Path(entry.mask).write_text("corrected")
    assert receipt(entry) != first
    assert receipt(replace(entry, mask="s3://bucket/a.geojson")) == at_url


def test_tissue_of_twelve_bits_is_that_of_eight(tmp_path):
    boxes = [(200, 300, 600, 800)]
    pixels = paint(tissue=(boxes, EOSIN)).astype(np.uint16) * 16
    tifffile.imwrite(
        tmp_path / "a.tif", pixels.transpose(1, 2, 0), tile=(128, 128), photometric="rgb", bitspersample=12
    )
    with Slide(tmp_path / "a.tif") as slide:
        assert slide.bits == 12
        found = find_mask(slide, Entry(slide_id="a", path=str(tmp_path / "a.tif")), "tissue")
    assert overlap(found.pixels, boxes) > 0.97


def test_masks_of_open_slides_are_held_within_bounds(tmp_path, monkeypatch):
    entries = [slide_of(tmp_path, paint(tissue=([(200, 300, 600, 800)], EOSIN)), name) for name in "abc"]
    cache = SampleCache(ModelConfig(levels=LEVELS, patch_size=24, prior="tissue"))
    images = [cache.open(entry) for entry in entries]
    monkeypatch.setattr("pipeline.data.samples._HELD_BYTES", 2 * images[0].memory_bytes)
    assert images[0].memory_bytes > 8 * 1024**2
    assert cache.open(entries[2]) is images[2]
    assert cache.open(entries[0]) is not images[0]
