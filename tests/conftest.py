"""What tests of several rooms share."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import session


@pytest.fixture
def data() -> Path:
    """Folder of the real data, or skip."""
    folder = os.environ.get("NESTED_ATS_DATA")
    if not folder:
        pytest.skip("NESTED_ATS_DATA is not set: it names the folder of the real data (see .ci/run)")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_head():
    """One local Ray instance of two CPUs for the whole run, away from the user's home."""
    home = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths must stay short
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", home)
            patch.setenv("RAY_TMPDIR", home)
            stack.enter_context(session("local", num_cpus=2, num_gpus=0))
        yield
    shutil.rmtree(home, ignore_errors=True)
