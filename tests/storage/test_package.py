"""The package's face: light to import, and complete."""

import os
import subprocess
import sys

import numpy as np
import pytest

import storage

HEAVY = ["tifffile", "imagecodecs", "dask", "zarr", "obstore", "torch", "ray"]


def imported(statement, names):
    """Which of ``names`` a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}; import sys; print(*[name for name in {names} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light():
    assert imported("import storage", ["numpy", *HEAVY]) == []


def test_reading_local_pyramids_needs_no_heavy_package():
    assert imported("from storage import Slide", HEAVY) == []


def test_a_function_is_not_hidden_by_its_module():
    code = "import storage.conversion, storage.read.slide, storage; assert callable(storage.convert); storage.Slide"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    for name in storage.__all__:
        assert getattr(storage, name).__module__.startswith("storage.")
        assert name in dir(storage)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = storage.nothing


def test_errors_form_one_tree():
    errors = [getattr(storage, name) for name in storage.__all__ if name.endswith("Error")]
    assert all(issubclass(error, storage.StorageError) for error in errors)


def test_processors_are_counted_where_none_can_be_bound(monkeypatch):
    assert storage.processors() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert storage.processors() == os.cpu_count()


def test_processors_are_counted_in_one_place(monkeypatch, tmp_path):
    """macOS has no `sched_getaffinity`: converting and validating ask for none of it."""
    monkeypatch.delattr(os, "sched_getaffinity")
    storage.write_tiff(
        tmp_path / "a.tif", [np.zeros((16, 16, 3), np.uint8)], shape=(16, 16, 3), dtype="uint8", tile=16
    )
    storage.convert(tmp_path / "a.tif", tmp_path / "a.ome.zarr")
    assert storage.validate(tmp_path / "a.ome.zarr") == []
