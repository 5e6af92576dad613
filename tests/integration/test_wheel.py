"""The wheel that users install holds all that the packages need, and works away from the repository."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage import write_pyramid

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "nested_ats", "pipeline", "storage")
CONFIG = """
model:
  levels: [{downsample: 2, samples: 3, stride: 4, channels: [4]}]
  patch_size: 24
  features: 8
train: {epochs: 1, batch_size: 4}
predict: {draws: 2}
"""


def run(*command, folder, **variables):
    """Run outside the repository, and without what leads a Python of these tests to it."""
    hidden = ("PYTHONPATH", "COVERAGE_PROCESS_START")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, in which no earlier build has left anything."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "demo", "*.egg-info", "benchmarks", "examples")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    for name in ("pipeline/deeper", "pipeline/deeper/still"):  # a sub-package that nobody listed
        (folder / "source" / name).mkdir()
        (folder / "source" / name / "__init__.py").touch()
    (folder / "source" / "pipeline" / "deeper" / "defaults.yaml").touch()
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", *build, folder / "source", folder=folder)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """Folder bin of an environment with the wheel; it borrows our dependencies, but not the editable install."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, folder=folder)
    return folder / "bin"


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    added = {f"pipeline/deeper/{name}" for name in ("__init__.py", "still/__init__.py", "defaults.yaml")}
    kinds = {".py", ".sh", ".typed", ".yaml", ".css", ".html", ".js", ".svg", ".txt"}
    files = [path.relative_to(ROOT) for package in PACKAGES for path in ROOT.glob(f"{package}/**/*")]
    assert held == {path.as_posix() for path in files if path.suffix in kinds} | added | {"nested_ats_start.py"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_the_main_job_runs_from_the_wheel(bin_folder, tmp_path):
    where = "import pipeline, cluster, storage, nested_ats as n; print(pipeline.__file__, n.__file__)"
    assert str(ROOT) not in run(bin_folder / "python", "-c", where, folder=tmp_path)
    rng = np.random.default_rng(0)
    rows = [["slide_id", "path", "label", "split"]]
    for i in range(8):
        pixels = rng.integers(0, 60 + 190 * (i % 2), (96, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append([str(i), f"{i}.png", ("dark", "light")[i % 2], "test" if i > 3 else "train"])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (tmp_path / "config.yaml").write_text(CONFIG)
    for words in (
        "convert labels.csv --out pyramids",
        "train --manifest pyramids/manifest.csv --config config.yaml --out run --device cpu",
        "predict run pyramids/manifest.csv --split test --out run/test --device cpu",
        "evaluate run/test",
        "report run run/test --out report.html",
    ):
        run(bin_folder / "nested-ats", *words.split(), folder=tmp_path)
    assert len((tmp_path / "run" / "test" / "predictions.csv").read_text().splitlines()) == 5
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["storage", "pipeline", "cluster", "nested_ats"])
def test_a_module_of_the_users_does_not_shadow_ours(bin_folder, tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    write_pyramid(tmp_path / "a.ome.zarr", np.zeros((3, 64, 64), np.uint8))
    told = run(bin_folder / "nested-ats", "info", "a.ome.zarr", folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert "64 x 64 pixels" in told
