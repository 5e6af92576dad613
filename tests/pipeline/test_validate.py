"""``nested-ats validate``: what it looks at, what it prints, and its exit codes. (What it finds: tests/storage.)"""

from __future__ import annotations

import json

import imagecodecs
import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.convert import convert_all
from pipeline.data.discovery import find_images
from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.validate import Validation, find_pyramids, find_sources, validate_all
from storage import ConvertOptions, Problem, write_pyramid, write_tiff

OPTIONS = ConvertOptions(chunk=16, shard=32, min_level_size=16)


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(1, 255, (48, 64, 3), dtype=np.uint8)
    write_tiff(path, [pixels], shape=pixels.shape, dtype="uint8", tile=64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with images a, b and c in ``in`` and their pyramids in ``out``."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        write_image(tmp_path / "in" / f"{name}.tif", seed)
    convert_all(find_images(["in"]), "out", options=OPTIONS)
    return tmp_path


def damage(folder, name):
    path = folder / "out" / f"{name}.ome.zarr" / "0" / "c" / "0" / "1" / "0"
    path.write_bytes(path.read_bytes() + b"x")


def run(*words):
    return CliRunner().invoke(app, ["validate", *map(str, words)], catch_exceptions=False)


def complaints(result):
    return [line for line in result.stderr.splitlines() if not line.startswith("validate: ")]


class TestFindPyramids:
    def names(self, *places):
        return [entry.path for entry in find_pyramids([str(place) for place in places])]

    def test_pyramids_folders_patterns_and_urls(self, folder):
        write_pyramid(folder / "out" / "deep" / "plain", np.ones((1, 40, 40), np.uint8), options=OPTIONS)
        all_of_it = ["out/a.ome.zarr", "out/b.ome.zarr", "out/c.ome.zarr", "out/deep/plain"]
        assert self.names("out") == all_of_it
        assert self.names("out/**") == all_of_it
        assert self.names("out/[ab]*") == all_of_it[:2]
        assert self.names("out/b.ome.zarr", "out") == ["out/b.ome.zarr", *all_of_it[:1], *all_of_it[2:]]
        assert self.names("out/deep/plain", "s3://bucket/x.ome.zarr") == ["out/deep/plain", "s3://bucket/x.ome.zarr"]

    def test_a_manifest(self, folder):
        assert [entry.slide_id for entry in find_pyramids(["out/manifest.csv"])] == ["a", "b", "c"]
        with pytest.raises(UsageError, match="give a manifest alone"):
            find_pyramids(["out/manifest.csv", "out"])

    def test_unfinished_ones_unless_finished_before(self, folder):
        (folder / "out" / "a.ome.zarr").rename(folder / "out" / "x.ome.zarr.partial")
        (folder / "out" / "b.ome.zarr.partial").mkdir()
        (folder / "out" / "notes.partial").mkdir()
        assert self.names("out") == ["out/b.ome.zarr", "out/c.ome.zarr", "out/x.ome.zarr.partial"]

    def test_one_that_lost_its_metadata(self, folder):
        (folder / "out" / "b.ome.zarr" / "zarr.json").unlink()
        assert len(self.names("out")) == 3

    def test_nothing(self, folder):
        with pytest.raises(UsageError, match=r"out/\*\.zip: no slide here"):
            find_pyramids(["out/*.zip"])

    def test_slides_where_no_pyramid_is(self, folder):
        found = [entry.path for entry in find_pyramids(["in"])]
        assert found == sorted(str(path) for path in (folder / "in").iterdir())
        assert found


class TestSources:
    def test_are_found_by_the_slide_or_its_file(self, tmp_path):
        write_image(tmp_path / "x.tif")
        (tmp_path / "m.csv").write_text("slide_id,path\na/b,x.tif\n")
        path = str(tmp_path / "x.tif")
        assert find_sources(str(tmp_path / "m.csv")) == {"a/b": path, "a%2Fb": path}
        convert_all(find_images([str(tmp_path / "m.csv")]), tmp_path / "out", options=OPTIONS)
        for place in (tmp_path / "out", tmp_path / "out" / "manifest.csv"):
            [found] = validate_all(find_pyramids([str(place)]), sources=find_sources(str(tmp_path / "m.csv")))
            assert found.problems == ()

    def test_another_image_of_that_name(self, folder):
        write_image(folder / "in" / "b.tif", seed=9)
        result = run("out", "--sources", "in")
        assert result.exit_code == 3
        assert "out/a.ome.zarr: sound\nout/b.ome.zarr: 4 problems\n" in result.stdout
        assert (
            "level 0   pixels 0, 1     1024 of 1024 pixels, the first at y=0, x=32 in chunk (0, 2)" in result.stdout
        )
        assert run("out", "--full").exit_code == 0

    def test_no_image_of_that_name_is_a_warning(self, folder):
        (folder / "in" / "b.tif").unlink()
        result = run("out", "--sources", "in")
        assert result.exit_code == 0
        assert (
            "out/b.ome.zarr: sound\n  level 0   unchecked       no source image has its name, or several have\n"
            in result.stdout
        )

    def test_one_image(self, folder):
        assert run("out/a.ome.zarr", "--source", "in/a.tif").exit_code == 0
        result = run("out/a.ome.zarr", "--source", "in/b.tif")
        assert result.exit_code == 4
        assert complaints(result) == ["error: out/a.ome.zarr: 4 problems"]


class TestCommand:
    @pytest.mark.parametrize("option", [[], ["--full"]])
    def test_all_sound(self, folder, option):
        result = run("out", *option)
        assert result.exit_code == 0
        assert result.stdout.splitlines() == [f"out/{name}.ome.zarr: sound" for name in "abc"]
        assert complaints(result) == []

    def test_some_bad(self, folder):
        damage(folder, "b")
        result = run("out")
        assert result.exit_code == 3
        lines = result.stdout.splitlines()
        assert lines[:2] == ["out/a.ome.zarr: sound", "out/b.ome.zarr: 1 problem"]
        assert lines[2].startswith("  level 0   shard 1, 0      0/c/0/1/0 holds ")
        assert complaints(result) == ["1 of 3 failed:", "  b  out/b.ome.zarr: 1 problem"]

    def test_all_bad(self, folder):
        for name in "abc":
            damage(folder, name)
        assert run("out").exit_code == 4

    def test_missing_ones_are_named_and_the_others_looked_at(self, folder):
        result = run("gone.ome.zarr", "out/a.ome.zarr")
        assert result.exit_code == 3
        assert result.stdout == "out/a.ome.zarr: sound\n"
        assert complaints(result)[1] == "  gone  gone.ome.zarr: does not exist; check the path"

    def test_warnings_are_shown_and_do_no_harm(self, folder):
        (folder / "out" / "a.ome.zarr" / "notes.txt").write_text("mine")
        result = run("out")
        assert result.exit_code == 0
        assert "a.ome.zarr: sound\n            stray           notes.txt does not belong here\n" in result.stdout

    def test_json(self, folder):
        damage(folder, "b")
        result = run("out", "gone.ome.zarr", "--json")
        assert result.exit_code == 3
        a, b, _, gone = json.loads(result.stdout)
        assert (a["sound"], a["problems"], a["error"]) == (True, [], "")
        assert (b["sound"], b["entry"]["slide_id"]) == (False, "b")
        assert [(p["level"], p["place"], p["what"]) for p in b["problems"]] == [(0, [1, 0], "shard")]
        assert not gone["sound"]
        assert "does not exist" in gone["error"]

    def test_rows_that_are_image_files(self, folder):
        data = imagecodecs.png_encode(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
        (folder / "good.png").write_bytes(data)
        (folder / "cut.png").write_bytes(data[:-200])
        names = ("out/a.ome.zarr", "good.png", "cut.png", "in/b.tif")
        (folder / "m.csv").write_text("\n".join(["path", *names, ""]))
        result = run("m.csv")
        assert result.exit_code == 3
        assert result.stdout.splitlines() == [f"{folder}/{name}: sound" for name in (*names[:2], names[3])]
        title, cut = complaints(result)
        assert title == "1 of 4 failed:"
        assert f"{folder}/cut.png: " in cut

    def test_an_image_file_is_not_compared(self, folder):
        (folder / "a.png").write_bytes(imagecodecs.png_encode(np.zeros((40, 40), np.uint8)))
        result = run("a.png", "--source", "in/a.tif")
        assert result.exit_code == 0
        assert "unchecked       an image file, which is decoded and not compared" in result.stdout

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["gone/*"], "gone/*: no slide here"),
            (["gone.csv"], "gone.csv: cannot be read"),
            (["out", "--source", "in/a.tif"], "--source is for one pyramid"),
            (["out/a.ome.zarr", "--source", "in/a.tif", "--sources", "in"], "--source is for one pyramid"),
            (["out", "--sources", "out"], "out: no image here"),
        ],
    )
    def test_mistakes(self, folder, words, message):
        result = run(*words)
        assert result.exit_code == 2
        [line] = complaints(result)
        assert line.startswith("error: ")
        assert message in line

    def test_long_lists_are_cut(self):
        problems = tuple(Problem(0, (0, x), "shard", f"{x} is missing") for x in range(25))
        lines = list(Validation(Entry(slide_id="a", path="a.zarr"), problems).lines())
        assert lines[0] == "a.zarr: 25 problems"
        assert lines[1] == "  level 0   shard 0, 0      0 is missing"
        assert lines[-1] == "  and 5 more; --json shows all"
        assert len(lines) == 22
