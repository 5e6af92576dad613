"""``nested-ats convert`` on the command line: what it prints, and its exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.manifest import read_manifest
from storage import Slide, write_tiff


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with a good and two bad images in ``in``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    write_tiff(tmp_path / "in" / "deep" / "good.tif", [pixels], shape=pixels.shape, dtype="uint8", tile=96)
    (tmp_path / "in" / "empty.tif").write_bytes(b"")
    (tmp_path / "in" / "text.png").write_text("no image")
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)], catch_exceptions=False)


def complaints(result):
    return [line for line in result.stderr.splitlines() if not line.startswith(("convert: ", "next: "))]


class TestFailures:
    def test_are_a_table_at_the_end(self, folder):
        result = run("in", "--out", "out")
        assert result.exit_code == 3
        title, *rows = complaints(result)
        assert title == "2 of 3 failed:"
        assert rows[0].startswith("  empty ")
        assert f"{folder}/in/empty.tif: " in rows[0]
        assert f"{folder}/in/text.png: " in rows[1]
        assert len(rows) == 2
        assert result.stdout.splitlines()[1] == "out/manifest.csv"

    def test_alone(self, folder):
        result = run("in/e*.tif", "--out", "out")
        assert result.exit_code == 4
        assert complaints(result)[0].startswith(f"error: {folder}/in/empty.tif: ")

    def test_patterns(self, folder):
        result = run("in/**/g*.tif", "--out", "out")
        assert result.exit_code == 0
        assert [entry.slide_id for entry in read_manifest(folder / "out" / "manifest.csv")] == ["good"]


def test_options_reach_the_pyramid(folder):
    words = ["--chunk", 16, "--shard", 32, "--codec", "zstd", "--mpp", 0.5, "--min-level-size", 20]
    assert run("in/deep", "--out", "out", "--manifest", "m.csv", *words).stdout.splitlines()[1] == "m.csv"
    [entry] = read_manifest(folder / "m.csv")
    with Slide(entry.path) as slide:
        assert [(level.chunk, level.shard) for level in slide.levels] == [(16, 32)] * 4
        assert slide.mpp == 0.5


def test_dry_run(folder):
    result = run("in", "--out", "out", "--dry-run")
    assert result.exit_code == 3
    assert result.stdout == f"{folder}/out/good.ome.zarr: 80 x 96 pixels, 3 channels\n"
    assert complaints(result)[0] == "2 of 3 failed:"
    assert not (folder / "out").exists()
    shapes = [plan["shape"] for plan in json.loads(run("in", "--out", "out", "--dry-run", "--json").stdout)]
    assert shapes == [[3, 80, 96], None, None]


def test_json(folder):
    result = run("in", "--out", "out", "--json")
    assert result.exit_code == 3
    good, empty, _ = json.loads(result.stdout)
    assert good["entry"]["path"] == f"{folder}/out/good.ome.zarr"
    assert good["report"]["shape"] == [3, 80, 96]
    assert empty["report"] is None
    assert "empty" in empty["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "dask"], "--executor dask: choose threads, processes or tcp://HOST:PORT"),
        (["--executor", "processes", "--cluster", "local"], "give one of them"),
        (["--chunk", "100"], "multiple of"),
        (["in/deep/*.svs"], "in/deep/*.svs: no image here"),
    ],
)
def test_mistakes(folder, words, message):
    result = run("in", *words, "--out", "out")
    assert result.exit_code == 2
    [line] = complaints(result)
    assert message in line
    assert not (folder / "out").exists()


def test_a_page_of_a_stack(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 60, 70), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", metadata=None)
    failed = run(tmp_path / "x.tif", "--out", tmp_path / "o")
    assert failed.exit_code == 4
    assert "by --page 0 to --page 3" in failed.output
    for page, expected in (("2", pixels[2:3]), ("channels", pixels)):
        done = run(tmp_path / "x.tif", "--out", tmp_path / page, "--page", page)
        assert done.exit_code == 0, done.output
        with Slide(tmp_path / page / "x.ome.zarr") as slide:
            np.testing.assert_array_equal(slide.read(0, (0, 0, 60, 70)), expected)
    assert run(tmp_path / "x.tif", "--out", tmp_path / "o", "--page", "two").exit_code == 2
