"""The package's face: light to import, and complete."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import nested_ats


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light():
    assert run("import nested_ats, sys; print(*{'torch', 'numpy'} & sys.modules.keys())") == []


def test_errors_need_no_torch():
    assert run("from nested_ats import EncoderError; import sys; print('torch' in sys.modules)") == ["False"]


def test_every_public_name_exists_and_is_listed():
    assert set(nested_ats.__all__) <= set(dir(nested_ats))
    for name in nested_ats.__all__:
        assert not isinstance(getattr(nested_ats, name), ModuleType)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = nested_ats.nothing


def test_no_name_is_hidden_by_a_module():
    """A module that is imported becomes an attribute of its package, and would stand before what is fetched."""
    code = f"""
import pkgutil, nested_ats
for found in pkgutil.walk_packages(nested_ats.__path__, "nested_ats."):
    __import__(found.name)
print(*[name for name in {nested_ats.__all__} if type(getattr(nested_ats, name)).__name__ == "module"])
"""
    assert run(code) == []
