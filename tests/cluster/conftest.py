import sys
import time

import psutil
import pytest


@pytest.fixture
def head(ray_head, request):
    """The running instance; the functions of the test module travel to its workers by value."""
    from ray import cloudpickle

    module = sys.modules[request.module.__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def wait_until():
    def wait(condition, seconds=200):
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
