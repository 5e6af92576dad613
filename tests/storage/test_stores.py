"""Folders and object stores behind one face."""

import pickle

import pytest

from storage import CorruptImageError, MissingImageError, TransferError
from storage.place.ranges import Occupied
from storage.place.stores import open_store
from storage.place.urls import is_remote


@pytest.fixture(params=["folder", "objects"])
def store(request, tmp_path):
    return open_store(tmp_path if request.param == "folder" else f"{request.getfixturevalue('s3').url}/p")


def test_what_is_put_is_read_listed_and_deleted(store):
    tag = store.put("0/a", [b"ab", memoryview(b"cde")])
    store.put("b", [])
    assert store.get("0/a") == b"abcde"
    assert list(store.get_ranges([("0/a", 1, 2), ("0/a", -2, 2), ("0/a", 3, 9)])) == [b"bc", b"de", b"de"]
    size, version = store.stat("0/a")
    assert size == 5
    assert len(version) == 1
    assert store.entries() == {"0/a": (5, tag), "b": (0, store.entries()["b"].tag)}
    store.put("0/a", [b"x"])
    assert store.get("0/a") == b"x"
    assert store.stat("0/a") != (size, version)
    store.delete(["0/a", "b"])
    assert store.entries() == {}
    store.delete(["0/a"])
    store.close()


def test_what_is_there_is_replaced_only_by_the_same_if_it_should_not_be_there(store):
    tag = store.put("a", [b"ab"], if_absent=True)
    again = pickle.loads(pickle.dumps(store))
    assert again.put("a", [b"a", b"b"], if_absent=True) == tag
    for other in (b"ac", b"abc", b""):
        with pytest.raises(Occupied, match=f"{store.name}/a: another conversion has written this"):
            again.put("a", [other], if_absent=True)
    assert store.get("a") == b"ab"


def test_what_is_missing_or_too_large(store):
    store.put("0/a", [b"abc"])
    for request in (store.get, store.stat, lambda key: next(store.get_ranges([(key, 0, 1)]))):
        for key in ("0", "0/b", "c/d"):
            with pytest.raises(FileNotFoundError):
                request(key)
    with pytest.raises(CorruptImageError, match="0/a: holds 3 bytes, more than the 2 it may"):
        store.get("0/a", 2)


def test_places_that_are_none(tmp_path, web):
    with pytest.raises(MissingImageError, match="does not exist; check the path"):
        open_store(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(MissingImageError, match="is a file, not a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(TransferError, match="do not list their files"):
        open_store(web.url).entries()
    assert is_remote(web.url)
    assert not is_remote(tmp_path)
