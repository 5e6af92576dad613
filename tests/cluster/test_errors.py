import threading

import pytest

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
