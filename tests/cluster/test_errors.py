import copyreg
import threading

import pytest
from tblib import pickling_support

from cluster import ClusterError
from cluster.errors import one_line, portable


class TwoArgumentsError(Exception):
    """Pickles, but does not unpickle: its constructor wants more than args holds."""

    def __init__(self, path, cause):
        super().__init__(f"{path}: {cause}")


class HoldsALockError(Exception):
    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()


@pytest.fixture(autouse=True)
def _as_defined(monkeypatch):
    """Importing `dask.multiprocessing` teaches pickle every exception that there is by then."""
    for error in (TwoArgumentsError, HoldsALockError):
        monkeypatch.delitem(copyreg.dispatch_table, error, raising=False)


def test_one_line_folds_white_space():
    assert one_line(ValueError("a\n  b\tc")) == "ValueError: a b c"
    assert one_line(KeyError()) == "KeyError"


def test_portable_keeps_what_pickles():
    error = ValueError("x")
    assert portable(error) is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TwoArgumentsError("s.tif", "bad"), "TwoArgumentsError: s.tif: bad"),
        (HoldsALockError(), "HoldsALockError: locked"),
    ],
)
def test_portable_names_what_does_not_pickle(error, message):
    got = portable(error)
    assert type(got) is ClusterError
    assert str(got) == message


def test_portable_keeps_what_a_reducer_that_others_registered_brings_back():
    pickling_support.install(TwoArgumentsError)
    error = TwoArgumentsError("s.tif", "bad")
    assert portable(error) is error
