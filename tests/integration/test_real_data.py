"""The product on real data: an Aperio slide, and Megapixel MNIST from the real digits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def nested_ats(*arguments):
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)


def test_an_aperio_slide_from_file_to_heatmap(data, tmp_path):
    """Convert, describe, train on two copies with different labels, predict and draw."""
    slide = data / "CMU-1-Small-Region.svs"
    (tmp_path / "labels.csv").write_text(f"slide_id,path,label,split\na,{slide},x,train\nb,{slide},y,train\n")
    result = nested_ats("convert", tmp_path / "labels.csv", "--out", tmp_path / "pyramids")
    assert result.returncode == 0, result.stderr
    result = nested_ats("info", "--json", tmp_path / "pyramids" / "a.ome.zarr")
    about = json.loads(result.stdout)[0]
    assert about["mpp"] == pytest.approx(0.499)
    assert about["size"] == [2967, 2220]
    manifest = tmp_path / "pyramids" / "manifest.csv"
    settings = ["--set", "train.epochs=1", "--set", "data.background=1"]
    result = nested_ats("train", "--manifest", manifest, "--out", tmp_path / "run", *settings)
    assert result.returncode == 0, result.stderr
    result = nested_ats("predict", tmp_path / "run", manifest, "--out", tmp_path / "predictions")
    assert result.returncode == 0, result.stderr
    result = nested_ats("heatmap", tmp_path / "run", manifest, "--limit", 1, "--out", tmp_path / "heatmaps")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "heatmaps" / "a" / "overlay.png").stat().st_size > 100_000
    attention = json.loads(nested_ats("info", "--json", tmp_path / "heatmaps" / "a" / "attention.ome.zarr").stdout)
    assert attention[0]["mpp"] == pytest.approx(0.499 * 32)  # cells of 8 pixels at downsample 4


def test_megapixel_mnist_from_the_real_digits(data, tmp_path):
    """The example of the README, much reduced: every stage runs and prints its figure."""
    command = [sys.executable, EXAMPLES / "megapixel_mnist.py", "--quick", "--only", "ATS-10"]
    command += ["--digits", data / "mnist", "--out", tmp_path / "mnist", "--train", "40", "--test", "20"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "| ATS-10 | 0.25/1 |" in result.stdout
    run = tmp_path / "mnist" / "ATS-10 0.25-1" / "seed-0"
    predictions = (run / "predictions" / "predictions.csv").read_text().splitlines()
    assert len(predictions) == 1 + 20
