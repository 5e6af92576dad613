"""Files are whole or as they were, and every slide id makes a file name of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.files import file_name, make_folder, write_atomic, write_json


def test_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "a", "é\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"
    write_atomic(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00"
    write_json(tmp_path / "b.json", {"a": None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.json"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, name, error):
    path = tmp_path / "a"
    write_atomic(path, "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, "fsync") if name == "fsync" else (Path, "replace")), fail)
    expected = UsageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be written: No space left" if expected is UsageError else None):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file/a", "missing/a", "folder"])
def test_places_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=f"{place}: cannot be written"):
        write_atomic(tmp_path / place, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_make_folder(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="choose another --out"):
            make_folder(place)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # tests may run as root, who may write
    with pytest.raises(UsageError, match="no permission to write"):
        make_folder(tmp_path)


def test_ordinary_ids_are_their_own_names():
    for slide_id in ("CMU-1", "TCGA-A1_B2.x", "slide 7 (b)+c,d=e@f~"):
        assert file_name(slide_id) == slide_id


AWKWARD = ["", ".", "..", "...", "%", "%2E", "%2E%2E", "a/b", "a%2Fb", "../../etc", "\0", "日本" * 100]
AWKWARD += ["a" * n for n in (199, 200, 201, 202, 5000)] + ["a" * 201 + "b", file_name("a" * 300)]


def test_awkward_ids_have_different_names():
    names = [file_name(slide_id) for slide_id in AWKWARD]
    assert len(set(names)) == len(AWKWARD)


@given(st.text())
@example("a" * 300)
@example("日" * 300)
def test_any_id_makes_a_safe_name(slide_id):
    name = file_name(slide_id)
    assert name.isascii()
    assert 0 < len(name) <= 200
    assert not set(name) & set('/\\\0\n"*:<>?|')
    assert name.strip(".")


@given(st.text(max_size=40), st.text(max_size=40))
def test_different_ids_have_different_names(one, other):
    assert (file_name(one) == file_name(other)) == (one == other)


@pytest.mark.parametrize("slide_id", AWKWARD)
def test_names_work_on_the_disk(tmp_path, slide_id):
    path = tmp_path / f"{file_name(slide_id)}.ome.zarr"
    make_folder(path)
    write_json(path.with_suffix(".json"), 1)
    assert sorted(p.parent for p in tmp_path.iterdir()) == [tmp_path, tmp_path]
