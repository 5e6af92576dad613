"""What a manifest may name besides single files: the bands of a scene, and pages of files that have several."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from nested_ats import LevelConfig, ModelConfig
from pipeline.cli.app import app
from pipeline.data.discovery import find_images, find_slides, name_slides
from pipeline.data.manifest import Entry, read_manifest, slide_name, write_manifest
from pipeline.data.pages import page_slides
from pipeline.data.slides import open_image
from pipeline.errors import DataError, UsageError
from storage import Slide, UnsupportedImageError
from storage.images.opening import image_pages

CONFIG = ModelConfig(levels=(LevelConfig(downsample=2, stride=4, samples=8, channels=(4,)),), patch_size=32)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def scene(tmp_path, rng):
    """Write a folder with bands of 10 and 20 m, and a manifest of the scene."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed: pip install '.[geo]'")
    (tmp_path / "bands").mkdir()
    pixels = {}
    for name, metres in (("B04_10m", 10), ("B03_10m", 10), ("B11_20m", 20)):
        side = 2000 // metres
        pixels[name[:3]] = rng.integers(1, 9000, (side, side), dtype=np.uint16)
        place = rasterio.Affine(metres, 0, 500000, 0, -metres, 5000000)
        shape = {"driver": "GTiff", "count": 1, "height": side, "width": side, "dtype": "uint16", "crs": "EPSG:32633"}
        with rasterio.open(tmp_path / "bands" / f"T1_{name}.tif", "w", transform=place, **shape) as file:
            file.write(pixels[name[:3]], 1)
    files = ["bands/T1_B04_10m.tif", "bands/T1_B03_10m.tif", "bands/T1_B11_20m.tif"]
    (tmp_path / "scenes.csv").write_text(f"path,label\n{'; '.join(files)},harbour\n")
    return tmp_path / "scenes.csv", pixels


@pytest.fixture
def stack(tmp_path, rng):
    """Write a TIFF of three pages, one of them of another size, with a copy of lower resolution of the last."""
    pages = [rng.integers(0, 255, shape, dtype=np.uint8) for shape in ((200, 240), (200, 240), (160, 100))]
    with tifffile.TiffWriter(tmp_path / "scan.tif") as file:
        for page in pages:
            file.write(page, tile=(64, 64), metadata=None)
        file.write(pages[2][::2, ::2], subfiletype=1, metadata=None)
    return tmp_path / "scan.tif", pages


class TestBands:
    def test_a_scene_of_several_files_is_one_slide(self, scene):
        manifest, pixels = scene
        (entry,) = read_manifest(manifest)
        assert entry.slide_id == "T1"
        assert entry.path.split(";")[2] == str(manifest.parent / "bands" / "T1_B11_20m.tif")
        image = open_image(entry, CONFIG, channels=["B11", "B04"])
        with image.slide as slide:
            read = slide.read(0, (0, 0, 200, 200))[image.numbers]
        np.testing.assert_array_equal(read, [np.kron(pixels["B11"], np.ones((2, 2), np.uint16)), pixels["B04"]])

    def test_it_is_written_back_as_it_was(self, scene, tmp_path):
        entries = read_manifest(scene[0])
        write_manifest(tmp_path / "again.csv", entries)
        assert "bands/T1_B04_10m.tif;bands/T1_B03_10m.tif" in (tmp_path / "again.csv").read_text()
        assert read_manifest(tmp_path / "again.csv") == entries

    def test_it_is_converted_and_described(self, scene, tmp_path, monkeypatch):
        manifest, pixels = scene
        done = run("convert", manifest, "--out", tmp_path / "pyramids")
        assert done.exit_code == 0, done.output
        (entry,) = read_manifest(tmp_path / "pyramids" / "manifest.csv")
        assert (entry.slide_id, entry.label) == ("T1", "harbour")
        with Slide(entry.path) as slide:
            assert slide.channels == ("B04", "B03", "B11")
            np.testing.assert_array_equal(slide.read(0, (0, 0, 200, 200))[1], pixels["B03"])
        assert "1 up to date" in run("convert", manifest, "--out", tmp_path / "pyramids").output
        place = read_manifest(manifest)[0].path
        about = json.loads(run("info", "--json", place).output)[0]
        assert (about["kind"], about["channels"]) == ("image", ["B04", "B03", "B11"])
        monkeypatch.chdir(tmp_path / "bands")
        relative = "T1_B04_10m.tif;T1_B11_20m.tif"
        for (found,) in (find_images([relative]), find_slides([relative]), name_slides([relative])):
            assert found.path.split(";")[1] == str(tmp_path / "bands" / "T1_B11_20m.tif")
        assert run("validate", tmp_path / "pyramids", "--sources", manifest).exit_code == 0

    def test_a_band_that_is_missing_is_named(self, scene, tmp_path):
        path = scene[0].read_text().replace("B03_10m", "B02_10m")
        (tmp_path / "other.csv").write_text(path)
        done = run("convert", tmp_path / "other.csv", "--out", tmp_path / "pyramids")
        assert done.exit_code == 4
        assert "T1_B02_10m.tif: does not exist; check the path" in done.output


class TestPages:
    def test_a_column_names_them(self, stack, tmp_path):
        _, pages = stack
        (tmp_path / "m.csv").write_text("path,page,label\nscan.tif,0,a\nscan.tif,2,b\n")
        entries = read_manifest(tmp_path / "m.csv")
        assert [entry.slide_id for entry in entries] == ["scan_p0", "scan_p2"]
        for entry, page in zip(entries, (pages[0], pages[2]), strict=True):
            with open_image(entry, CONFIG).slide as slide:
                np.testing.assert_array_equal(slide.read(0, (0, 0, *page.shape))[0], page)
        assert len({Slide(entry.path).identity for entry in entries}) == 2
        write_manifest(tmp_path / "again.csv", entries)
        assert read_manifest(tmp_path / "again.csv") == entries

    def test_equal_ones_may_be_channels(self, tmp_path, rng):
        pages = rng.integers(0, 255, (3, 100, 120), dtype=np.uint8)
        tifffile.imwrite(tmp_path / "z.tif", pages, photometric="minisblack", metadata=None)
        (tmp_path / "m.csv").write_text("path,page\nz.tif,channels\n")
        (entry,) = read_manifest(tmp_path / "m.csv")
        with Slide(entry.path) as slide:
            np.testing.assert_array_equal(slide.read(0, (0, 0, 100, 120)), pages)

    def test_what_is_no_page_is_refused(self, stack, tmp_path):
        (tmp_path / "m.csv").write_text("path,page\nscan.tif,first\n")
        with pytest.raises(UsageError, match="m.csv: page is 'first', not the number of one, from 0, or channels"):
            read_manifest(tmp_path / "m.csv")
        with pytest.raises(UnsupportedImageError, match=r"scan.tif: no page 7: it has 4, numbered from 0"):
            Slide(f"{stack[0]}#page=7")
        from PIL import Image

        Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
        with pytest.raises(UnsupportedImageError, match=r"x.png: one image, which has no other pages"):
            Slide(f"{tmp_path / 'x.png'}#page=1")

    def test_a_copy_of_another_page_is_no_level(self, stack):
        with Slide(f"{stack[0]}#page=0") as slide:
            assert [level.made_of for level in slide.levels] == [None, 1, 1]

    def test_each_becomes_a_slide(self, stack, tmp_path):
        path, pages = stack
        done = run("convert", path, "--out", tmp_path / "p", "--page", "slides")
        assert done.exit_code == 0, done.output
        entries = read_manifest(tmp_path / "p" / "manifest.csv")
        assert [entry.slide_id for entry in entries] == ["scan_p0", "scan_p1", "scan_p2"]
        for entry, page in zip(entries, pages, strict=True):
            with Slide(entry.path) as slide:
                np.testing.assert_array_equal(slide.read(0, (0, 0, *page.shape))[0], page)
        again = run("convert", path, "--out", tmp_path / "p", "--pages", "slides")
        assert "3 up to date" in again.output
        refused = run("convert", path, "--out", tmp_path / "p2")
        assert refused.exit_code == 4
        assert "or of each by --page slides, or name it in the manifest's column page" in refused.output

    def test_files_of_one_image_stay_as_they_are(self, tmp_path, rng):
        tifffile.imwrite(tmp_path / "one.tif", rng.integers(0, 255, (50, 60), dtype=np.uint8))
        (tmp_path / "damaged.tif").write_bytes(b"II*\\0 no directory")
        entries = [Entry(slide_id=name, path=str(tmp_path / f"{name}.tif")) for name in ("one", "damaged", "missing")]
        entries.append(Entry(slide_id="p", path=f"{tmp_path / 'one.tif'}#page=0"))
        assert list(page_slides(entries)) == entries

    @pytest.mark.data
    def test_labels_of_slides_are_none(self, data):
        assert image_pages(data / "CMU-1-Small-Region.svs") == [0]


def test_slides_go_by_their_places():
    assert slide_name("/a/scan.tif#page=3") == "scan_p3"
    assert slide_name("s3://b/scan.ome.tif#page=channels") == "scan_pchannels"
    assert slide_name("s3://b/x_B04.tif;s3://b/x_B03.tif") == "x"


def test_a_slide_of_other_channels_names_its_place(scene):
    (entry,) = read_manifest(scene[0])
    with pytest.raises(DataError, match="T1_B11_20m.tif: no channel 'B8A', only B04, B03, B11"):
        open_image(entry, CONFIG, channels=["B8A"])
