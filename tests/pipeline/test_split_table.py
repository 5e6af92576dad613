"""Tables of splits: ours, CLAM's and STAMP's say the same of the same slides, and contradictions are refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pipeline.config import Config
from pipeline.data.manifest import Entry, write_manifest
from pipeline.data.split_table import fold_entries, read_splits
from pipeline.errors import UsageError

SLIDES = [Entry(slide_id=f"s{i}", path=f"/data/s{i}.svs", label="ab"[i % 2], case_id=f"p{i // 2}") for i in range(12)]
PLACES = ["train"] * 6 + ["val"] * 2 + ["test"] * 4


def write(tmp_path, text, name="splits.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def placed(entries):
    return [(entry.split, entry.fold) for entry in entries]


def ours(tmp_path):
    return write(tmp_path, "slide_id,fold,split\n" + "".join(f"s{i},,{split}\n" for i, split in enumerate(PLACES)))


def by_case(tmp_path):
    return write(tmp_path, "case_id,split\n" + "".join(f"p{i},{PLACES[2 * i]}\n" for i in range(6)))


def clam(tmp_path, name="splits_0.csv"):
    columns = [[f"s{i}" for i, split in enumerate(PLACES) if split == name] for name in ("train", "val", "test")]
    rows = [[column[i] if i < len(column) else "" for column in columns] for i in range(6)]
    return write(
        tmp_path, ",train,val,test\n" + "".join(f"{i},{','.join(row)}\n" for i, row in enumerate(rows)), name
    )


def clam_bool(tmp_path):
    names = ("train", "val", "test")
    rows = [f"s{i},{','.join(str(split == name) for name in names)}\n" for i, split in enumerate(PLACES)]
    return write(tmp_path, ",train,val,test\n" + "".join(rows), "splits_0_bool.csv")


class TestRead:
    @pytest.mark.parametrize("table", [ours, by_case, clam, clam_bool])
    def test_the_same_of_any_tool(self, tmp_path, table):
        assert placed(read_splits(SLIDES[::-1], table(tmp_path)))[::-1] == [(split, "") for split in PLACES]

    def test_a_manifest_is_one(self, tmp_path):
        entries = [Entry(slide_id=e.slide_id, path="/x", fold=str(i % 3)) for i, e in enumerate(SLIDES)]
        write_manifest(tmp_path / "m.csv", entries)
        assert placed(read_splits(SLIDES, tmp_path / "m.csv")) == [("", str(i % 3)) for i in range(12)]

    def test_stamp(self, tmp_path):
        """Fold k tests on the patients that its split k tests on; one that is never tested trains always."""
        patients = [f"p{i}" for i in range(6)]
        splits = [
            {
                "train_patients": [p for i, p in enumerate(patients) if i % 2 != fold or i == 5],
                "test_patients": patients[fold:5:2],
            }
            for fold in range(2)
        ]
        path = write(tmp_path, json.dumps({"splits": splits}), "splits.json")
        folds = fold_entries(SLIDES, path, "all", Config())
        assert list(folds) == ["0", "1"]
        for fold, entries in folds.items():
            for entry in entries:
                number = int(entry.case_id[1:])
                assert entry.split == ("test" if number < 5 and number % 2 == int(fold) else "train")

    def test_slides_that_are_missing(self, tmp_path):
        path = write(tmp_path, "slide_id,split\ns0,train\ns1,test\n")
        with pytest.raises(UsageError, match="10 of 12 slides are not in it: s2, s3, .*--missing drop"):
            read_splits(SLIDES, path)
        assert placed(read_splits(SLIDES, path, drop=True)) == [("train", ""), ("test", "")]
        with pytest.raises(UsageError, match="2 of 2 slides are not in it"):
            read_splits(SLIDES[4:6], path, drop=True)

    @pytest.mark.parametrize(
        ("text", "name", "message"),
        [
            (
                "slide_id,split\ns0,train\ns0,test\n",
                "x.csv",
                r"1 are in several splits or folds: s0 \(test and train\)",
            ),
            (",train,val,test\n0,s0,,s0\n", "x.csv", r"s0 \(test and train\)"),
            ("slide_id,split\ns0,trian\n", "x.csv", "split trian: not one of train, val, test"),
            ("slide_id,label\ns0,a\n", "x.csv", "not a table of splits .*: it needs slide_id or case_id"),
            ("[1]", "x.json", "not STAMP's splits.json"),
            ('{"splits": [{"test_patients": ["p0"]}]}', "x.json", "not STAMP's splits.json .*train_patients"),
            (
                json.dumps({"splits": [{"train_patients": [], "test_patients": ["p0"]}] * 2}),
                "x.json",
                r"several splits or folds: p0 \(0 and 1\)",
            ),
        ],
    )
    def test_what_is_no_such_table(self, tmp_path, text, name, message):
        with pytest.raises(UsageError, match=message):
            read_splits(SLIDES, write(tmp_path, text, name))

    def test_a_table_that_is_not_there(self, tmp_path):
        for name in ("x.csv", "x.json"):
            with pytest.raises(UsageError, match=f"{name}: cannot be read"):
                read_splits(SLIDES, tmp_path / name)


class TestFolds:
    def test_a_folder_of_clams(self, tmp_path):
        for name in ("splits_0.csv", "splits_1.csv", "splits_10.csv"):
            clam(tmp_path, name)
        clam_bool(tmp_path)
        folds = fold_entries(SLIDES, tmp_path, "all", Config())
        assert list(folds) == ["0", "1", "10"]
        assert Counter(entry.split for entry in folds["10"]) == Counter(PLACES)
        with pytest.raises(UsageError, match="give --fold 0, --fold all, or one table"):
            fold_entries(SLIDES, tmp_path, None, Config())
        (tmp_path / "none").mkdir()
        with pytest.raises(UsageError, match=r"no splits_0.csv, splits_1.csv, \.\.\. here"):
            fold_entries(SLIDES, tmp_path / "none", "all", Config())

    def test_without_a_fold_the_splits_count(self, tmp_path):
        [(name, entries)] = fold_entries(SLIDES, ours(tmp_path), None, Config()).items()
        assert name == ""
        assert [entry.split for entry in entries] == PLACES
