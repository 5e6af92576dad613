"""The package's face: light to import, and complete."""

import subprocess
import sys

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
    code = "import storage.converter, storage.slide, storage; assert callable(storage.convert); storage.Slide"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    for name in storage.__all__:
        assert getattr(storage, name).__module__.startswith("storage.")
    with pytest.raises(AttributeError, match="no attribute"):
        _ = storage.nothing


def test_errors_form_one_tree():
    errors = [getattr(storage, name) for name in storage.__all__ if name.endswith("Error")]
    assert all(issubclass(error, storage.StorageError) for error in errors)
