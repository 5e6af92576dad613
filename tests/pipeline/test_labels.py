"""Labels from tables of their own: what fits is joined, and every misfit is counted, named and decided by a rule."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.labels import Rules, choose_target, join_labels
from pipeline.data.manifest import Entry, is_manifest, read_manifest
from pipeline.errors import UsageError

SLIDES = [Entry(slide_id=f"s{i}", path=f"/data/s{i}.svs", case_id=f"p{i // 2}") for i in range(6)]


def write(tmp_path, text):
    path = tmp_path / "clinical.csv"
    path.write_text(text)
    return path


def joined(tmp_path, text, target="grade", slides=SLIDES, **options):
    """Labels by slide, and the remarks."""
    rules = Rules(**{name: options.pop(name) for name in list(options) if name in Rules.__dataclass_fields__})
    entries, remarks = join_labels(slides, write(tmp_path, text), target, rules=rules, **options)
    return {entry.slide_id: entry.label for entry in entries}, remarks


BY_CASE = "case_id,grade,age\np0,low,61\np1,high,NA\np2,low,7\n"


class TestJoin:
    def test_by_case_with_further_columns(self, tmp_path):
        entries, remarks = join_labels(SLIDES, write(tmp_path, BY_CASE), "grade")
        assert [entry.label for entry in entries] == ["low", "low", "high", "high", "low", "low"]
        assert entries[0].extra == {"age": "61"}
        assert remarks == []

    def test_by_slide_which_brings_the_case(self, tmp_path):
        text = "slide_id,grade,case_id\n" + "".join(f"s{i},{'ab'[i % 2]},q{i // 3}\n" for i in range(6))
        bare = [Entry(slide_id=f"s{i}", path=f"/data/{i}.svs") for i in range(6)]
        entries, _ = join_labels(bare, write(tmp_path, text), "grade")
        assert [(entry.label, entry.case_id) for entry in entries[2:4]] == [("a", "q0"), ("b", "q1")]
        kept, _ = join_labels(SLIDES, write(tmp_path, text), "grade")
        assert kept[3].case_id == "p1"  # the manifest's own

    @pytest.mark.parametrize(
        ("header", "join"),
        [("PATIENT", None), ("bcr", "case_id=bcr"), ("PATIENT", "case_id=PATIENT"), ("case_id", "case_id")],
    )
    def test_by_other_names(self, tmp_path, header, join):
        labels, _ = joined(tmp_path, BY_CASE.replace("case_id", header), join=join)
        assert labels["s2"] == "high"

    @pytest.mark.parametrize(
        ("header", "join"), [("FILENAME", None), ("wsi", None), ("slide_id", None), ("image", "slide_id=image")]
    )
    def test_by_files(self, tmp_path, header, join):
        text = f"{header},grade\n" + "".join(f"somewhere/s{i}.svs,g{i}\n" for i in range(6))
        assert joined(tmp_path, text, join=join)[0]["s5"] == "g5"

    def test_any_column_is_a_target(self, tmp_path):
        labels, _ = joined(tmp_path, BY_CASE.replace("NA", "61"), target="age")
        assert labels["s0"] == "61"
        text = "case_id,label,split\np0,x,train\np1,y,test\np2,x,train\n"
        assert joined(tmp_path, text, target="label")[0]["s2"] == "y"
        assert joined(tmp_path, text, target="split")[0]["s2"] == "test"

    @pytest.mark.parametrize("join", ["slide_id", "case_id"])
    def test_a_data_frame(self, join):
        frame = pd.DataFrame({"slide_id": [f"s{i}" for i in range(6)], "case_id": [f"p{i // 2}" for i in range(6)]})
        frame["grade"] = [1, 1, None, None, 2, 2]
        entries, remarks = join_labels(SLIDES, frame, "grade", join=join, rules=Rules(missing="drop"))
        assert [entry.label for entry in entries] == ["1", "1", "2", "2"]  # not 1.0, as pandas has it now
        assert "2 of 6 slides have no grade: s2, s3" in remarks[-1]
        by_index = join_labels(SLIDES, frame.dropna().set_index("slide_id"), "grade", rules=Rules(missing="drop"))
        assert by_index[0] == join_labels(SLIDES, frame, "grade", join="slide_id", rules=Rules(missing="drop"))[0]

    @pytest.mark.parametrize("target", [["age"], ["grade", "age"]])
    def test_columns_that_are_no_label_go_along(self, tmp_path, target):
        entries, _ = join_labels(SLIDES, write(tmp_path, BY_CASE), target, rules=Rules(missing="drop"))
        assert [entry.extra["age"] for entry in entries][:2] == ["61", "61"]
        assert {entry.label for entry in entries} == {""}
        assert len(entries) == (4 if target == ["age"] else 6)  # none may lack all of them

    def test_a_workbook(self, tmp_path):
        path = tmp_path / "clinical.xlsx"
        rows = {"case_id": ["p0", "p1", "p2", "007"], "grade": ["NA", "none", 3, 2.5]}
        pd.DataFrame(rows).to_excel(path, index=False)
        entries, remarks = join_labels(SLIDES, path, "grade", rules=Rules(missing="drop"))
        assert [entry.label for entry in entries] == ["none", "none", "3", "3"]
        assert f"{path}: 2 of 6 slides have no grade: s0, s1" in remarks[0]
        assert "007" in remarks[1]

    def test_a_workbook_is_a_manifest_too(self, tmp_path):
        pd.DataFrame({"slide_id": ["a"], "path": ["x/a.svs"], "mpp": [0.5]}).to_excel(
            tmp_path / "m.xlsx", index=False
        )
        assert is_manifest("m.xlsx")
        assert read_manifest(tmp_path / "m.xlsx") == [Entry(slide_id="a", path=str(tmp_path / "x/a.svs"), mpp=0.5)]

    def test_a_broken_workbook(self, tmp_path, monkeypatch):
        (tmp_path / "m.xlsx").write_text("case_id,grade\n")
        with pytest.raises(UsageError, match="m.xlsx: not a workbook of Excel .*; save it as CSV UTF-8"):
            join_labels(SLIDES, tmp_path / "m.xlsx", "grade")
        monkeypatch.setitem(sys.modules, "openpyxl", None)
        with pytest.raises(UsageError, match=r"pip install 'nested-ats\[tables\]'"):
            join_labels(SLIDES, tmp_path / "m.xlsx", "grade")


class TestMisfits:
    def test_slides_without_labels(self, tmp_path):
        text = "case_id,grade\np0,low\np1,\n"
        with pytest.raises(UsageError, match="4 of 6 slides have no grade: s2, s3, s4, s5; .* --missing drop leaves"):
            joined(tmp_path, text)
        labels, [remark] = joined(tmp_path, text, missing="drop")
        assert labels == {"s0": "low", "s1": "low"}
        assert "4 of 6 slides have no grade" in remark

    def test_labels_without_slides(self, tmp_path):
        text = BY_CASE + "p7,low,5\np8,low,5\np9,NA,5\n"
        _, [remark] = joined(tmp_path, text)
        assert "2 of 6 labels have no slide: p7, p8" in remark
        with pytest.raises(UsageError, match="2 of 6 labels have no slide: p7, p8; .* --unused ignore"):
            joined(tmp_path, text, unused="fail")

    def test_one_slide_twice(self, tmp_path):
        text = "slide_id,grade\n" + "".join(f"s{i},low\n" for i in [0, *range(6)])
        labels, [remark] = joined(tmp_path, text)
        assert len(labels) == 6
        assert "1 slide_id have several rows with one label: s0" in remark

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [("first", ["low", "low", "high", "high", "low", "low"]), ("drop", ["high"] * 2 + ["low"] * 2)],
    )
    def test_one_case_with_two_labels(self, tmp_path, rule, expected):
        text = BY_CASE + "p0,high,61\n"
        with pytest.raises(
            UsageError, match=r"1 case_id have several labels: p0 \(low and high\).*--conflicts first"
        ):
            joined(tmp_path, text)
        labels, remarks = joined(tmp_path, text, conflicts=rule, missing="drop")
        assert list(labels.values()) == expected
        assert "p0 (low and high)" in remarks[0]

    def test_a_missing_value_is_no_second_label(self, tmp_path):
        labels, _ = joined(tmp_path, "case_id,grade\np0,NA\np0,low\np1,high\np2,low\n")
        assert labels["s0"] == "low"

    @pytest.mark.parametrize(
        ("rule", "classes"), [("merge", {"tumour", "none"}), ("keep", {"tumour", "Tumour", "none"})]
    )
    def test_labels_that_look_alike(self, tmp_path, rule, classes):
        text = "slide_id,grade\ns0,tumour\ns1,Tumour\ns2,tumour\ns3,none\ns4,none\ns5,none\n"
        with pytest.raises(
            UsageError, match=r"'Tumour' \(1 slides\) and 'tumour' \(2\) differ in case.*--alike merge"
        ):
            joined(tmp_path, text)
        labels, _ = joined(tmp_path, text, alike=rule)
        assert set(labels.values()) == classes

    def test_chains_of_likeness_become_one(self, tmp_path):
        text = "slide_id,grade\ns0,tumour\ns1,tumour\ns2,tumour\ns3,tumor\ns4,tumor\ns5,Tumor\n"
        assert set(joined(tmp_path, text, alike="merge")[0].values()) == {"tumour"}

    def test_nothing_fits(self, tmp_path):
        with pytest.raises(
            UsageError, match="no case_id of its rows is that of a slide: there TCGA-1, in .* p0, p1, p2"
        ):
            joined(tmp_path, "case_id,grade\nTCGA-1,low\n")

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            (BY_CASE, {"target": "stage"}, "no column stage; the columns of .* are case_id, grade, age"),
            (BY_CASE, {"join": "slide_id"}, "no column slide_id"),
            (BY_CASE, {"join": "age"}, "--join age: choose slide_id, case_id, or case_id=COLUMN"),
            ("id,grade\np0,low\n", {}, "--join : choose slide_id"),
            ("case_id,grade,grade\np0,low,low\n", {}, "several columns grade"),
            (BY_CASE, {"missing": "maybe"}, "--missing maybe: choose fail, drop"),
        ],
    )
    def test_mistakes(self, tmp_path, text, options, message):
        with pytest.raises(UsageError, match=message):
            joined(tmp_path, text, **options)


def test_a_column_of_the_manifest_is_the_target():
    slides = [Entry(slide_id=f"s{i}", path="p", label="x", extra={"stage": "I" * (i % 3)}) for i in range(6)]
    with pytest.raises(UsageError, match="2 of 6 slides have no stage: s0, s3"):
        choose_target(slides, "stage")
    entries, _ = choose_target(slides, "stage", rules=Rules(missing="drop", alike="keep"))
    assert [entry.label for entry in entries] == ["I", "II", "I", "II"]
    with pytest.raises(UsageError, match="--target grade: the manifest has no such column; further columns: stage"):
        choose_target(slides, "grade")


def test_split_writes_one_manifest_of_both_tables(tmp_path):
    (tmp_path / "slides.csv").write_text(
        "slide_id,path,case_id\n" + "".join(f"s{i},s{i}.svs,p{i // 2}\n" for i in range(40))
    )
    text = "PATIENT,grade,centre\n" + "".join(f"p{i},{['low', 'high'][i % 2]},c{i % 3}\n" for i in range(19))
    command = ["split", str(tmp_path / "slides.csv"), "--labels", str(write(tmp_path, text)), "--target", "grade"]
    command += ["--out", str(tmp_path / "study.csv"), "--folds", "3", "--site", "centre"]
    refused = CliRunner().invoke(app, command, catch_exceptions=False)
    assert refused.exit_code == 2
    assert "2 of 40 slides have no grade: s38, s39" in refused.output
    result = CliRunner().invoke(app, [*command, "--missing", "drop"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    entries = read_manifest(tmp_path / "study.csv", labelled=True)
    assert len(entries) == 38
    assert len({(entry.extra["centre"], entry.fold) for entry in entries}) == 3
