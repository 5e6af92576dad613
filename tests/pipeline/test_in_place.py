"""Slides read where they lie: the whole way without a conversion, with the numbers that a conversion would give."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest, write_manifest
from pipeline.data.selection import select
from pipeline.results.predict import predict
from pipeline.runs import MODEL
from pipeline.training.train import train
from storage import Slide, write_tiff


@pytest.fixture(scope="module")
def tiffs(pyramids, tmp_path_factory) -> Path:
    """Manifest of the same slides as single-level TIFFs, in a folder of their own."""
    folder = tmp_path_factory.mktemp("tiffs")
    entries = []
    for entry in read_manifest(pyramids):
        with Slide(entry.path) as slide:
            pixels = slide.read(0, (0, 0, *slide.shape_yx)).transpose(1, 2, 0)
        path = folder / f"{entry.slide_id}.tif"
        tiles = [pixels[y : y + 64, x : x + 64] for y in range(0, len(pixels), 64) for x in range(0, 150, 64)]
        write_tiff(path, iter(tiles), shape=pixels.shape, dtype="uint8", tile=64)
        entries.append(replace(entry, path=str(path)))
    write_manifest(folder / "manifest.csv", entries)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def run_in_place(config, tiffs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in place") / "run"
    train(read_manifest(tiffs), config, folder)
    return folder


def test_training_gives_the_weights_that_pyramids_give(run_in_place, finished):
    mine, theirs = (load_file(folder / MODEL / "model.safetensors") for folder in (run_in_place, finished))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def test_predictions_are_those_of_pyramids(finished, tiffs, pyramids, tmp_path):
    rows = [
        predict(read_manifest(manifest), finished, tmp_path / name)
        for name, manifest in (("tiffs", tiffs), ("pyramids", pyramids))
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["status"] == "ok"
        assert mine["prob_bar"] == theirs["prob_bar"]
        assert mine["se_bar"] == theirs["se_bar"]
        assert mine["bytes_read"] > 0


def test_the_command_line_takes_them_everywhere(run_in_place, tiffs, tmp_path):
    runner = CliRunner()

    def run(*words):
        result = runner.invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    slide = tiffs.parent / "slide 0.tif"
    [about] = json.loads(run("info", slide, "--json"))
    assert (about["kind"], about["size"], about["levels"][0]["downsample"]) == ("image", [120, 150], 1.0)
    assert [level.get("made_of") for level in about["levels"]] == [None, 1.0, 1.0]
    assert "level 1: 60 x 75, downsample 2, made of downsample 1 as it is read" in run("info", slide)
    assert "sound" in run("validate", tiffs, "--full")
    run("predict", run_in_place, tiffs, "--out", tmp_path / "predictions")
    run("evaluate", tmp_path / "predictions", "--split", "test")
    run("heatmap", run_in_place, slide, "--out", tmp_path / "heatmaps")
    assert (tmp_path / "heatmaps" / "slide 0" / "overlay.png").stat().st_size > 1000
    assert "an epoch:" in run(
        "train", "--manifest", tiffs, "--out", tmp_path / "dry", "--config", run_in_place / "config.yaml", "--dry-run"
    )


def test_a_slide_that_is_damaged_is_left_out_and_named(config, tiffs, tmp_path):
    shutil.copytree(tiffs.parent, tmp_path / "slides")
    broken = tmp_path / "slides" / "slide 3.tif"
    broken.write_bytes(broken.read_bytes()[:2000])
    chosen = select(read_manifest(tmp_path / "slides" / "manifest.csv"), config, fail_fast=False)
    assert [failure.slide_id for failure in chosen.failures] == ["slide 3"]
    assert "slide 3.tif: truncated" in chosen.failures[0].error


def test_what_is_slow_to_read_is_said(config, tmp_path, capsys):
    levels = [{"downsample": 16, "stride": 2, "samples": 3}]
    far = parse_config(
        {**plain(config), "model": {**plain(config)["model"], "levels": levels, "allow_gaps": True}}, "test"
    )
    rng = np.random.default_rng(0)
    for name in "ab":
        pixels = rng.integers(0, 255, (600, 800, 3), np.uint8)
        write_tiff(tmp_path / f"{name}.tif", iter([pixels]), shape=pixels.shape, dtype="uint8", tile=1024)
    (tmp_path / "m.csv").write_text("path,label,split\na.tif,x,train\nb.tif,y,train\n")
    entries = read_manifest(tmp_path / "m.csv")
    select(entries, far, fail_fast=False)
    words = capsys.readouterr().err
    assert "2 of 2 slides are slow to read where they lie" in words
    assert "a.tif: it lacks downsample 16, of which each look averages 256 times the pixels" in words
    assert "nested-ats convert makes pyramids of them" in words
    select(entries, config, fail_fast=False)
    assert "slow" not in capsys.readouterr().err
    wide = rng.integers(0, 255, (100, 5000, 3), np.uint8)
    tifffile.imwrite(tmp_path / "b.tif", wide, photometric="rgb", rowsperstrip=50, compression="deflate")
    select(entries, config, fail_fast=False)
    assert "1 of 2 slides are slow" in (words := capsys.readouterr().err)
    assert "b.tif: pixels are decoded in pieces that are 5000 pixels long" in words


def test_a_cohort_in_a_bucket_trains_where_it_lies(config, tiffs, finished, s3, tmp_path):
    entries = []
    for entry in read_manifest(tiffs):
        name = Path(entry.path).name
        s3.put(name, Path(entry.path).read_bytes())
        entries.append(replace(entry, path=f"{s3.url}/{name}"))
    write_manifest(tmp_path / "m.csv", entries)
    train(read_manifest(tmp_path / "m.csv"), config, tmp_path / "run")
    mine, theirs = (load_file(folder / MODEL / "model.safetensors") for folder in (tmp_path / "run", finished))
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
