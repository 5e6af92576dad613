"""Helpers that tests of several rooms share, and rules for which tests run beside each other.

Notable: `make test` runs two processes at once (pytest-xdist). A file's tests stay in one of them, in order, so that
what a module makes is made once; each process has at most one Ray head.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy come: their threads would only get in the way
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # its list of fonts takes seconds

import pytest
from hypothesis import settings

from cluster import session

# `make test` tries the same examples each time; `make test-random` draws anew and prints how to draw them again.
# No deadline: another process on this machine must not fail a test.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that none is left for the end."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what tests keep out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of the real data, or skip."""
    folder = os.environ.get("NESTED_ATS_DATA")
    if not folder:
        pytest.skip("NESTED_ATS_DATA is not set: it names the folder of the real data (see .ci/run)")
    return Path(folder)


@contextmanager
def head_of_its_own(**room: int) -> Iterator[None]:
    """A local Ray instance with so many ``num_cpus`` and ``num_gpus``, away from the user's home."""
    home = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths must stay short
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", home)
            patch.setenv("RAY_TMPDIR", home)
            stack.enter_context(session("local", **room))
        yield
    left = {path.name for path in Path(home).iterdir()}
    shutil.rmtree(home, ignore_errors=True)
    assert left <= {".ray"}, "a session's temporary folder goes with it; only the user's token stays"


@pytest.fixture(scope="session")
def ray_head():
    """One local Ray instance of two CPUs for the whole run."""
    with head_of_its_own(num_cpus=2, num_gpus=0):
        yield


@pytest.fixture(scope="session")
def gpu_head():
    """One that knows of this machine's GPU, for a run of the GPU's tests alone."""
    with head_of_its_own(num_cpus=4, num_gpus=1):
        yield
