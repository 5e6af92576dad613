"""What tests of several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def data() -> Path:
    """Folder of the real data, or skip."""
    folder = os.environ.get("NESTED_ATS_DATA")
    if not folder:
        pytest.skip("NESTED_ATS_DATA is not set: it names the folder of the real data (see .ci/run)")
    return Path(folder)
