import shutil
import sys
import tempfile
import time
from contextlib import ExitStack

import psutil
import pytest

from cluster import session


@pytest.fixture(scope="session")
def _head():
    """One local Ray instance of two CPUs for the whole run, away from the user's home."""
    home = tempfile.mkdtemp(prefix="r", dir="/tmp")  # Ray's socket paths must stay short
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", home)
            patch.setenv("RAY_TMPDIR", home)
            stack.enter_context(session("local", num_cpus=2, num_gpus=0))
        yield
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def head(_head, request):
    """The running instance; the functions of the test module travel to its workers by value."""
    from ray import cloudpickle

    module = sys.modules[request.module.__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def wait_until():
    def wait(condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
            time.sleep(0.1)

    return wait


@pytest.fixture
def gone():
    """Whether a process has ended (a zombie has)."""

    def check(pid):
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return check
