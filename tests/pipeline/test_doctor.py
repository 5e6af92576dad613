"""The doctor names what is wrong with a machine, and what to do about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline import doctor
from pipeline.cli.app import app
from storage import write_pyramid

ROOT = Path(__file__).parents[2]


def findings(check, *words, code=0):
    """Findings of a check that the command prints."""
    result = CliRunner().invoke(app, ["doctor", "--json", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return [each for each in json.loads(result.stdout) if each["check"] == check]


def test_a_sound_machine_and_slide(tmp_path):
    write_pyramid(tmp_path / "a.ome.zarr", np.zeros((3, 300, 400), np.uint8), mpp=0.5)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "a.ome.zarr")], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"Python {sys.version.split()[0]}" in result.stdout
    assert "300 x 400 pixels" in result.stdout
    assert all(line.startswith(("ok ", "note ", "         -> ")) for line in result.stdout.splitlines())


def test_a_slide_that_cannot_be_read(tmp_path):
    [found] = findings("slide", tmp_path / "gone.tif", code=3)
    assert found["status"] == "problem"
    assert "gone.tif: does not exist; check the path" in found["found"]


def test_a_slide_without_a_scale(tmp_path):
    write_pyramid(tmp_path / "a.ome.zarr", np.zeros((3, 100, 100), np.uint8))
    _, found = findings("slide", tmp_path / "a.ome.zarr")
    assert (found["status"], "assume_mpp" in found["advice"]) == ("note", True)


@pytest.mark.parametrize("name", ["storage.py", "pipeline/__init__.py"])
def test_a_module_that_shadows_ours(tmp_path, monkeypatch, name):
    assert not findings("packages")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    [found] = findings("packages", code=3)
    assert str(tmp_path / name) in found["found"]
    assert "python -P" in found["advice"]


def test_a_clone_of_ours_beside_what_is_installed(tmp_path, monkeypatch):
    for name in ("pipeline/__init__.py", "nested_ats_start.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    [found] = findings("packages")
    assert found["status"] == "note"
    assert found["found"].startswith(f"{tmp_path}: ")


@pytest.mark.parametrize("name", ["storage", "pipeline"])
def test_the_command_takes_its_own_packages(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import nested_ats_start as start; start.main()"
    command = [sys.executable, "-c", code, "info", "gone.tif"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (4, "error: gone.tif: does not exist; check the path\n")


@pytest.mark.parametrize("missing", ["rasterio", "zarr"])
def test_packages_that_are_missing_or_old(monkeypatch, missing):
    def there(name):
        if name == missing:
            raise PackageNotFoundError
        return "0.1" if name == "dask" else version(name)

    needed = ["zarr>=3.1", "dask>=2025.1", "rasterio>=1.4; extra == 'geo'", "h5py>=3; extra == 'h5'"]
    monkeypatch.setattr(doctor, "version", there)
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    [wrong] = findings("versions", code=3)
    assert "dask 0.1 is not >=2025.1" in wrong["found"]
    assert ("zarr is not installed" in wrong["found"]) == (missing == "zarr")
    geo = next(each for each in findings("extra", code=3) if each["found"].startswith("geo"))
    assert geo["status"] == ("note" if missing == "rasterio" else "ok")
    assert geo["advice"] == ("pip install 'nested-ats[geo]'" if missing == "rasterio" else "")


def test_little_room(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=3e9))  # type: ignore[attr-defined]
    assert [each["status"] for each in findings("disk")] == ["note"] * 3


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    [found] = findings("disk", code=3)
    assert found["status"] == "problem"
    assert str(tmp_path / "file") in found["found"]


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "words"),
    [(None, None, "note", "none"), ("smi", None, "problem", "without CUDA"), ("smi", "13.0", "problem", "sees none")],
)
def test_without_a_gpu(monkeypatch, driver, cuda, status, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)  # type: ignore[attr-defined]
    [found] = findings("GPU", code=3 if status == "problem" else 0)
    assert found["status"] == status
    assert words in found["found"]


def test_credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("storage.place.credentials._on_ec2", lambda: False)
    assert findings("object stores")[0]["status"] == "note"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "secret")
    [found] = findings("object stores")
    assert "AWS_ACCESS_KEY_ID" in found["found"]
    assert "secret" not in found["found"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_on_ray(ray_head):
    [found] = findings("Ray", "--cluster", "local")
    assert found["status"] == "ok"
    assert "ran a task" in found["found"]


def test_a_cluster_that_does_not_answer():
    result = CliRunner().invoke(app, ["doctor", "--cluster", "127.0.0.1:9"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "no Ray cluster answers" in result.stderr


class TestCompletion:
    def test_names_commands_and_options(self):
        code = "import sys; sys.argv = ['nested-ats']; from nested_ats_start import main; main()"
        for words, expected in (("nested-ats tis", "tissue"), ("nested-ats doctor --js", "--json")):
            more = {"_NESTED_ATS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
            environment = os.environ | more | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
            )
            assert done.stdout.split() == [expected]

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_is_shown(self, shell, monkeypatch):
        monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
        result = CliRunner().invoke(app, ["--show-completion", shell], prog_name="nested-ats")
        assert result.exit_code == 0
        assert "_NESTED_ATS_COMPLETE" in result.stdout
