"""Manifests: what is understood, and every problem named before any work."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data.manifest import (
    Entry,
    has_image_suffix,
    is_manifest,
    read_manifest,
    remarks,
    slide_name,
    write_manifest,
)
from pipeline.data.splits import assign_splits
from pipeline.errors import UsageError


def write(tmp_path, text, name="manifest.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return path


def test_reads_and_writes_back(tmp_path):
    path = write(tmp_path, "slide_id,path,label,case_id,mpp\n007,a/x.tif,50,p1,0.25\n008,/b/y.svs,none,p2,\n")
    entries = read_manifest(path, labelled=True)
    assert [entry.slide_id for entry in entries] == ["007", "008"]
    assert entries[0].path == str(tmp_path / "a/x.tif")
    assert entries[0].mpp == 0.25
    assert entries[1].mpp is None
    write_manifest(tmp_path / "again.csv", entries)
    assert read_manifest(tmp_path / "again.csv") == entries
    assert "a/x.tif" in (tmp_path / "again.csv").read_text()  # relative again: the folder can move
    assert str(tmp_path) not in (tmp_path / "again.csv").read_text()


def test_ways_through_other_folders_are_shortened(tmp_path):
    entry = read_manifest(write(tmp_path, "slide_id,path\na,lists/../out/a.ome.zarr\n"))[0]
    assert entry.path == str(tmp_path / "out" / "a.ome.zarr")
    write_manifest(tmp_path / "again.csv", [Entry(slide_id="a", path=f"{tmp_path}/lists/../out/a.ome.zarr")])
    assert (tmp_path / "again.csv").read_text() == "slide_id,path\na,out/a.ome.zarr\n"


def test_byte_order_mark_and_urls(tmp_path):
    path = write(tmp_path, "slide_id,path\na,https://host/a.ome.zarr\n", encoding="utf-8-sig")
    assert read_manifest(path)[0].path == "https://host/a.ome.zarr"


@pytest.mark.parametrize("header", ["wsi", "FILENAME", "path"])
def test_other_tools_columns(tmp_path, header):
    entry = read_manifest(write(tmp_path, f"{header}\nfolder/case-1.ome.tiff\n"))[0]
    assert entry.slide_id == "case-1"


def test_parquet_keeps_leading_zeros(tmp_path):
    path = tmp_path / "manifest.parquet"
    parquet.write_table(pa.table({"slide_id": ["01", "02"], "path": ["a", "b"], "label": ["x", None]}), path)
    assert [e.slide_id for e in read_manifest(path)] == ["01", "02"]
    with pytest.raises(UsageError, match="row 3: label is missing"):
        read_manifest(path, labelled=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,path,lable\na,b,c\n", "unknown column lable.*missing column label.*known columns"),
        ("slide_id,path,label\na,b,\n", "row 2: label is missing"),
        ("slide_id,label\na,b\n", "missing column path"),
        ("slide_id,path,label\na,,x\n", "row 2: path is empty"),
        ("slide_id,path,label\na,b,x\na,c,x\n", "slide_id a occurs 2 times"),
        ("slide_id,path,label,split\na,b,x,tran\n", "split is 'tran', not one of"),
        ("slide_id,path,label,split\na,b,x,train\nb,c,x,\n", "for some slides and not for others"),
        ("slide_id,path,label,split,case_id\na,b,x,train,p\nb,c,x,test,p\n", "case p is in splits test, train"),
        ("slide_id,path,label,mpp\na,b,x,big\n", "mpp is 'big'"),
        ("slide_id,path,label,mpp\na,b,x,-1\n", "mpp -1 is not between"),
        ("slide_id,path,label\na,b\n", "row 2: not 3 fields"),
        ("slide_id,path,label\n", "no slides"),
        ("", "empty"),
        ("path,path,label\na,b,c\n", "column path given twice"),
        ("slide_id,path,label\na,b\0,x\n", "row 2: path holds a NUL character"),
        ("path,label,splt\na,x,test\n", r"unknown column splt \(did you mean split\?\)"),
        ("path,label,Case\na,x,p\n", r"unknown column Case \(did you mean case_id\?\)"),
        ("path,label,\na,x,note\n", "column 3 has values and no name"),
    ],
)
def test_problems_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        read_manifest(write(tmp_path, text), labelled=True)
    assert "manifest.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_at_once(tmp_path):
    text = "slide_id,path,label,split\na,,x,train\na,b,,up\n"
    with pytest.raises(UsageError, match="row 2: path.*row 3: label.*row 3: split.*occurs 2 times"):
        read_manifest(write(tmp_path, text), labelled=True)


@pytest.mark.parametrize(
    ("encoding", "delimiter"),
    [("utf-8", ";"), ("utf-8-sig", ";"), ("utf-16", "\t"), ("utf-16", ","), ("utf-8", "\t")],
)
def test_what_spreadsheets_write_is_understood(tmp_path, encoding, delimiter):
    """A decimal comma comes with semicolons, empty columns with much clicking."""
    rows = [["slide_id", "path", "label", "mpp", "", ""], ["Ä1", "a.tif", '"x,;y"', '"0,25"', "", ""]]
    text = "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n"
    [entry] = read_manifest(write(tmp_path, text, encoding=encoding), labelled=True)
    assert (entry.slide_id, entry.label, entry.mpp, entry.extra) == ("Ä1", "x,;y", 0.25, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "a workbook of Excel or LibreOffice, not a CSV file; save it there as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0rest", "a workbook of old Excel"),
        ("path,label\na,Gewächs\n".encode("latin-1"), "not a CSV file in UTF-8 .*; save it as CSV UTF-8"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_manifest(tmp_path / "m.csv")


def test_other_columns_are_kept(tmp_path):
    entries = read_manifest(write(tmp_path, "path,label,site,age\na.tif,x,Bern,061\nb.tif,y,,\n"))
    assert entries[0].extra == {"site": "Bern", "age": "061"}
    write_manifest(tmp_path / "again.csv", entries)
    assert (tmp_path / "again.csv").read_text().splitlines()[1] == "a,a.tif,x,Bern,061"
    assert read_manifest(tmp_path / "again.csv") == entries


def test_rows_are_named_each(tmp_path):
    text = "path,mpp\n" + "a{},big\n" * 2 + "b,0.5\nc,big\n"
    with pytest.raises(UsageError, match="row 2: mpp is 'big', not a number; row 3: mpp .*; row 5: mpp"):
        read_manifest(write(tmp_path, text.replace("{}", "1", 1).replace("{}", "2", 1)))


def test_labels_that_look_alike_and_folds_are_remarked_on():
    labels = ["tumour"] * 3 + [
        "Tumour",
        "tu mour",
        "tumor",
        "normal",
        "normol",
        "50",
        "70",
        "type A",
        "type B",
        "Grade",
    ]
    entries = [Entry(slide_id=str(i), path="p", label=label) for i, label in enumerate(labels)]
    pairs = [remark.split("two classes")[0] + remark[remark.index("differ") :] for remark in remarks(entries)]
    assert len(pairs) == 7
    assert (
        "labels 'Tumour' (1 slides) and 'tumour' (3) are differ in case or blanks" in pairs[0] + pairs[1] + pairs[2]
    )
    text = " ".join(pairs)
    assert "'tu mour' (1 slides) and 'tumour' (3)" in text
    assert "'tumor' (1 slides) and 'tumour' (3) are differ by one letter" in text
    assert "'normal' (1 slides) and 'normol' (1)" in text
    assert not any(name in text for name in ("50", "type", "Grade"))
    [remark] = remarks([Entry(slide_id="a", path="p", label="x", fold="1")])
    assert remark.startswith("column fold: ignored without --fold")


def test_names_of_manifests():
    assert is_manifest("a/M.CSV")
    assert is_manifest("m.Parquet")
    assert not is_manifest("m.ome.zarr")


@pytest.mark.parametrize(("name", "content"), [("m.csv", b"\xff\xfe\x00"), ("m.parquet", b"no"), ("m.csv", b'"a')])
def test_not_a_table(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        read_manifest(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_manifest(tmp_path / "none.csv")


def test_slide_names():
    assert slide_name("a/b/CMU-1.svs") == "CMU-1"
    assert slide_name("x.ome.zarr/") == "x"
    assert slide_name("scene.v2") == "scene.v2"
    assert slide_name("x.ome.qptiff") == slide_name("x.JPG") == "x"


def test_names_of_images():
    assert all(map(has_image_suffix, ["a.TIF", "b.c/a.jpg", "https://host/a.svs?key=1", "s3://bucket/a.png"]))
    assert not any(map(has_image_suffix, ["a.ome.zarr", "a", "https://host/a?x=.tif", "https://host.tif/a"]))


class TestSplits:
    def entries(self):
        return [
            Entry(slide_id=str(i), path="p", label="ab"[i % 2], case_id=f"c{i // 4}" if i < 40 else "")
            for i in range(100)
        ]

    def test_cases_stay_together_and_labels_are_balanced(self):
        split = assign_splits(self.entries(), validation=0.2, test=0.3, seed=0)
        cases = {}
        for entry in split:
            cases.setdefault(entry.case_id or entry.slide_id, set()).add(entry.split)
        assert all(len(names) == 1 for names in cases.values())
        for label in "ab":
            tests = [e for e in split if e.label == label and e.split == "test"]
            assert 10 <= len(tests) <= 20
        assert {e.split for e in split} == {"train", "val", "test"}

    def test_seed_decides(self):
        one = assign_splits(self.entries(), validation=0.2, test=0.3, seed=0)
        assert one == assign_splits(self.entries(), validation=0.2, test=0.3, seed=0)
        assert one != assign_splits(self.entries(), validation=0.2, test=0.3, seed=1)

    def test_given_splits_stand(self):
        given = [Entry(slide_id="a", path="p", label="x", split="test")]
        assert assign_splits(given, validation=0.5, test=0.0, seed=0) == given

    def test_the_order_of_rows_does_not_matter(self):
        """A case with as many slides of one label as of another still counts under the same one."""
        entries = [Entry(slide_id=str(i), path="p", label="ab"[i % 2], case_id=f"c{i // 2}") for i in range(40)]
        one = {e.slide_id: e.split for e in assign_splits(entries, validation=0.2, test=0.3, seed=0)}
        other = {e.slide_id: e.split for e in assign_splits(entries[::-1], validation=0.2, test=0.3, seed=0)}
        assert one == other
