"""Converting: one bad slide costs one slide, and nothing of the user's is overwritten."""

from __future__ import annotations

import os
import shutil
import threading
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import obstore
import pytest
from moto.server import ThreadedMotoServer

from pipeline.convert import MANIFEST, _locked, convert_all, known_slides, plan_all
from pipeline.data.discovery import find_images, name_slides
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.errors import DataError, UsageError
from pipeline.validate import find_pyramids, find_sources, validate_all
from storage import ConvertOptions, MissingImageError, Slide, StorageError, convert, write_tiff
from storage.place.objects import connect

OPTIONS = ConvertOptions(min_level_size=16)


@pytest.fixture
def image():
    """Write a small TIFF of random pixels and return its path."""

    def write(path, *, seed=0, mpp=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        write_tiff(path, [pixels], shape=pixels.shape, dtype="uint8", tile=64, mpp=mpp)
        return path

    return write


def run(sources, folder, **settings):
    return convert_all(find_images([str(source) for source in sources]), folder, options=OPTIONS, **settings)


class TestSources:
    def test_files_folders_and_subfolders(self, tmp_path, image):
        image(tmp_path / "in" / "b.tif")
        image(tmp_path / "in" / "deep" / "er" / "a.TIFF")
        image(tmp_path / "in" / ".hidden.tif")
        (tmp_path / "in" / "folder.tif").mkdir()
        (tmp_path / "in" / "notes.txt").write_text("no image")
        other = image(tmp_path / "c.svs.tif")
        entries = find_images([str(tmp_path / "in"), str(other)])
        assert [entry.slide_id for entry in entries] == ["b", "a", "c.svs"]
        assert all(entry.path.startswith(str(tmp_path)) for entry in entries)

    def test_relative_paths_become_absolute(self, tmp_path, image, monkeypatch):
        image(tmp_path / "a.tif")
        monkeypatch.chdir(tmp_path)
        assert find_images(["a.tif"])[0].path == str(tmp_path / "a.tif")

    def test_a_manifest_keeps_what_it_says(self, tmp_path, image):
        image(tmp_path / "images" / "a.tif")
        (tmp_path / "m.csv").write_text("slide_id,path,label,case_id,split\n007,images/a.tif,x,p1,val\n")
        conversion = run([tmp_path / "m.csv"], tmp_path / "out")[0]
        assert conversion.report.levels == 3
        [entry] = read_manifest(tmp_path / "out" / MANIFEST, labelled=True)
        assert (entry.slide_id, entry.label, entry.case_id, entry.split) == ("007", "x", "p1", "val")
        assert entry.path == str(tmp_path / "out" / "007.ome.zarr")

    def test_a_place_given_twice_is_one_slide(self, tmp_path, image):
        path = image(tmp_path / "a.tif")
        assert len(find_images([str(path), str(tmp_path), str(path)])) == 1
        assert len(name_slides(["https://host/a.ome.zarr", "https://host/a.ome.zarr"])) == 1

    @pytest.mark.parametrize("other", ["deep/a.tif", "a.tiff", "a.svs"])
    def test_two_files_of_one_name_are_refused_and_the_others_go_on(self, tmp_path, image, other):
        for seed, name in enumerate(["a.tif", other, "b.tif"]):
            image(tmp_path / "in" / name, seed=seed)
        plans = plan_all(find_images([str(tmp_path / "in")]), tmp_path / "out", options=OPTIONS)
        assert sorted(plan.entry.slide_id for plan in plans if plan.error) == ["a", "a"]
        conversions = run([tmp_path / "in"], tmp_path / "out")
        errors = {c.entry.path: c.error for c in conversions if c.error}
        places = [str(tmp_path / "in" / name) for name in ("a.tif", other)]
        assert sorted(errors) == sorted(places)
        for place, twin in (places, places[::-1]):
            assert errors[place].startswith(
                f"{place}: {twin} would be slide a too; tell them apart by --name-by path"
            )
        assert [e.slide_id for e in read_manifest(tmp_path / "out" / MANIFEST)] == ["b"]
        with pytest.raises(DataError, match="slide a: .*--name-by path"):
            run([tmp_path / "in"], tmp_path / "other", fail_fast=True)
        with pytest.raises(UsageError, match="would both be slide a; name them apart in a manifest"):
            name_slides(places)  # as predict has it

    def test_names_by_path(self, tmp_path, image, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("in/a.tif", "in/x/a.svs", "in/x/y/a.tif", "in/[x].tif"):
            image(tmp_path / name)

        def names(*sources):
            return [entry.slide_id for entry in find_images(sources, name_by="path")]

        expected = ["[x].tif", "a.tif", "x/a.svs", "x/y/a.tif"]
        assert names("in") == names("in/") == names(str(tmp_path / "in")) == names("in/../in") == expected
        assert names("in/**/*.tif") == ["[x].tif", "a.tif", "x/y/a.tif"]
        assert names("in/x/*") == ["a.svs", "y/a.tif"]
        assert names("in/[x].tif", "in/x/a.svs", "in") == ["[x].tif", "a.svs", "a.tif", "x/y/a.tif"]
        with pytest.raises(UsageError, match="--name-by stem: choose name or path"):
            find_images(["in"], name_by="stem")
        (tmp_path / "m.csv").write_text("path\nin/a.tif\n")
        with pytest.raises(UsageError, match="m.csv names its slides itself; give it a column slide_id"):
            find_images(["m.csv"], name_by="path")

    @pytest.mark.parametrize(
        "suffix", [".btf", ".tf8", ".scn", ".bif", ".qptiff", ".ome.tif", ".png", ".JPG", ".jpeg", ".bmp"]
    )
    def test_kinds_of_images(self, tmp_path, suffix):
        (tmp_path / f"a{suffix}").write_bytes(b"")
        assert len(find_images([str(tmp_path)])) == 1

    def test_patterns(self, tmp_path, image, monkeypatch):
        for name in ("a.tif", "deep/b.tif", "deep/er/c.tiff", "deep/er/c.csv", "[x].tif"):
            image(tmp_path / "in" / name)
        monkeypatch.chdir(tmp_path)

        def names(*sources):
            return [entry.slide_id for entry in find_images(sources)]

        assert names("in/*.tif") == ["[x]", "a"]
        assert names("in/**/*.tif*") == ["[x]", "a", "b", "c"]
        assert names("in/**") == ["[x]", "a", "b", "c"]
        assert names("in/d*") == ["b", "c"]
        assert names("in/[x].tif") == ["[x]"]  # a file of that name goes before the pattern
        with pytest.raises(UsageError, match=r"in/\*\.svs: no image here"):
            names("in/a.tif", "in/*.svs")

    def test_linked_folders_are_looked_into_once(self, tmp_path, image):
        image(tmp_path / "far" / "deep" / "b.tif")
        image(tmp_path / "in" / "a.tif")
        for name in ("link", "other"):
            (tmp_path / "in" / name).symlink_to(tmp_path / "far")
        (tmp_path / "far" / "loop").symlink_to(tmp_path / "in")
        (tmp_path / "in" / "lost.tif").symlink_to(tmp_path / "gone.tif")
        entries = find_images([str(tmp_path / "in")])
        names = ["a.tif", "link/deep/b.tif", "lost.tif"]  # what is lost fails later, and by its name
        assert [entry.path for entry in entries] == [str(tmp_path / "in" / name) for name in names]

    def test_a_folder_that_cannot_be_read(self, tmp_path, image, monkeypatch):
        image(tmp_path / "in" / "a.tif")
        image(tmp_path / "in" / "shut" / "b.tif")
        scandir = os.scandir

        def refuse(place):  # by permissions it would not be refused to root
            if Path(place).name == "shut":
                raise PermissionError(13, "Permission denied", str(place))
            return scandir(place)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(UsageError, match="in/shut: cannot be read: Permission denied"):
            find_images([str(tmp_path / "in")])

    def test_a_pipe_is_no_image(self, tmp_path, image):
        image(tmp_path / "a.tif")
        os.mkfifo(tmp_path / "x.tif")
        assert [entry.slide_id for entry in find_images([str(tmp_path)])] == ["a"]
        assert [entry.slide_id for entry in find_images([f"{tmp_path}/*.tif"])] == ["a"]

    def test_two_ways_to_a_file_are_one_slide(self, tmp_path, image):
        path = image(tmp_path / "in" / "a.tif")
        [entry] = find_images([str(path), f"{tmp_path}/in/../in/a.tif"])
        assert entry.path == str(path)

    def test_urls_stay_as_they_are(self):
        [entry] = find_images(["https://host/a*b/c.svs"])
        assert (entry.slide_id, entry.path) == ("c", "https://host/a*b/c.svs")

    def test_a_manifest_among_images(self, tmp_path, image):
        with pytest.raises(UsageError, match="give a manifest alone"):
            find_images([str(image(tmp_path / "a.tif")), "m.csv"])

    def test_a_folder_without_images(self, tmp_path):
        with pytest.raises(UsageError, match=f"{tmp_path}: no image here"):
            find_images([str(tmp_path)])


class TestConvertAll:
    def test_pixels_and_manifest(self, tmp_path, image):
        image(tmp_path / "in" / "a b.tif")
        run([tmp_path / "in"], tmp_path / "out")
        expected = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        with Slide(tmp_path / "out" / "a b.ome.zarr") as slide:
            assert np.array_equal(slide.read(0, (0, 0, 48, 64)), expected.transpose(2, 0, 1))
        text = (tmp_path / "out" / MANIFEST).read_text()
        assert text == "slide_id,path\na b,a b.ome.zarr\n"

    def test_bad_files_are_named_and_the_others_go_on(self, tmp_path, image):
        image(tmp_path / "in" / "a.tif")
        (tmp_path / "in" / "bad.tif").write_text("no TIFF")
        (tmp_path / "in" / "cut.tif").write_bytes(image(tmp_path / "x.tif").read_bytes()[:2000])
        image(tmp_path / "in" / "z.tif", seed=1)
        found = [*find_images([str(tmp_path / "in")]), *name_slides([str(tmp_path / "gone.tif")])]
        conversions = convert_all(found, tmp_path / "out", options=OPTIONS)
        errors = {c.entry.slide_id: c.error for c in conversions if c.report is None}
        assert errors.keys() == {"bad", "cut", "gone"}
        assert all(f"{name}.tif" in error for name, error in errors.items())
        assert [e.slide_id for e in read_manifest(tmp_path / "out" / MANIFEST)] == ["a", "z"]
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.ome.zarr", MANIFEST, "z.ome.zarr"]
        with pytest.raises(DataError, match="slide bad"):
            convert_all(found, tmp_path / "other", options=OPTIONS, fail_fast=True)
        assert [e.slide_id for e in read_manifest(tmp_path / "other" / MANIFEST)] == ["a"]

    def test_nothing_converted_leaves_no_manifest(self, tmp_path):
        (tmp_path / "bad.tif").write_text("no TIFF")
        assert run([tmp_path / "bad.tif"], tmp_path / "out")[0].error
        assert not (tmp_path / "out" / MANIFEST).exists()

    def test_again_it_does_what_is_missing(self, tmp_path, image, monkeypatch):
        for name in "abc":
            image(tmp_path / "in" / f"{name}.tif")
        calls = []

        def dies_at_b(source, target, **settings):
            calls.append(Path(target).name)
            if calls[-1].startswith("b"):
                raise KeyboardInterrupt
            return convert(source, target, **settings)

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.convert.convert", dies_at_b)
            with pytest.raises(KeyboardInterrupt):
                run([tmp_path / "in"], tmp_path / "out")
        assert calls == ["a.ome.zarr", "b.ome.zarr"]
        assert [e.slide_id for e in read_manifest(tmp_path / "out" / MANIFEST)] == ["a"]
        conversions = run([tmp_path / "in"], tmp_path / "out")
        assert [c.report.up_to_date for c in conversions] == [True, False, False]
        assert len(read_manifest(tmp_path / "out" / MANIFEST)) == 3

    def test_images_keep_the_names_that_they_have(self, tmp_path, image):
        """Whatever --name-by says later: an image is one slide, and keeps its label."""
        out = tmp_path / "out"
        for seed, name in enumerate(["a.tif", "x/007.tif", "x/007.svs", "y/007.tif", "b.svs.tif"]):
            image(tmp_path / "in" / name, seed=seed)

        def again(name_by):
            found = find_images([str(tmp_path / "in")], name_by=name_by, known=known_slides(out))
            conversions = convert_all(found, out, options=OPTIONS)
            table = [(c.entry.slide_id, bool(c.report), bool(c.report and c.report.up_to_date)) for c in conversions]
            return table, sorted(entry.slide_id for entry in read_manifest(out / MANIFEST))

        table, ids = again("name")
        assert ids == ["a", "b.svs"]
        assert [row for row in table if not row[1]] == [("007", False, False)] * 3
        (out / MANIFEST).write_text((out / MANIFEST).read_text().replace("path\n", "path,label\n").replace(
            ".ome.zarr\n", ".ome.zarr,tumour\n"))  # fmt: skip
        table, ids = again("path")
        assert ids == ["a", "b.svs", "x/007.svs", "x/007.tif", "y/007.tif"]
        assert {name for name, _, there in table if there} == {"a", "b.svs"}
        for name_by in ("name", "path"):
            table, same = again(name_by)
            assert same == ids
            assert all(there for _, _, there in table)
        labels = {entry.slide_id: entry.label for entry in read_manifest(out / MANIFEST)}
        assert labels == dict.fromkeys(ids, "") | {"a": "tumour", "b.svs": "tumour"}
        image(tmp_path / "in" / "z" / "a.tif", seed=9)  # now another is called a
        table, same = again("name")
        assert same == ids
        assert ("a", False, False) in table
        assert again("path")[1] == sorted([*ids, "z/a.tif"])

    def test_pyramids_named_by_path_find_their_sources(self, tmp_path, image):
        for seed, name in enumerate(["a.tif", "x/a.tif"]):
            image(tmp_path / "in" / name, seed=seed)
        entries = find_images([str(tmp_path / "in")], name_by="path")
        convert_all(entries, tmp_path / "out", options=OPTIONS)
        found = validate_all(find_pyramids([str(tmp_path / "out")]), sources=find_sources(str(tmp_path / "in")))
        assert [(one.sound, one.problems) for one in found] == [(True, ())] * 2

    def test_another_source_of_the_same_name(self, tmp_path, image):
        path = image(tmp_path / "a.tif")
        run([path], tmp_path / "out")
        image(path, seed=1)
        assert "ask to overwrite" in run([path], tmp_path / "out")[0].error
        assert run([path], tmp_path / "out", overwrite=True)[0].report

    def test_pixel_size_comes_from_the_manifest_then_the_option_then_the_file(self, tmp_path, image):
        image(tmp_path / "a.tif", mpp=0.5)
        (tmp_path / "m.csv").write_text("slide_id,path,mpp\nown,a.tif,0.3\nnone,a.tif,\n")
        for options, expected in ((OPTIONS, 0.5), (ConvertOptions(mpp=0.7), 0.7)):
            folder = tmp_path / f"out {expected}"
            convert_all(find_images([str(tmp_path / "m.csv")]), folder, options=options)
            entries = read_manifest(folder / MANIFEST)
            assert [entry.mpp for entry in entries] == [None, None]  # converted again, it is not overruled
            for entry, mpp in zip(entries, (0.3, expected), strict=True):
                with Slide(entry.path) as slide:
                    assert slide.mpp == pytest.approx(mpp)

    @pytest.mark.parametrize("slide_id", ["../up", "a/b", "..", "x" * 300, "日本"])
    def test_no_id_leaves_the_folder(self, tmp_path, image, slide_id):
        path = image(tmp_path / "a.tif")
        folder = tmp_path / "deep" / "out"
        [conversion] = convert_all([Entry(slide_id=slide_id, path=str(path))], folder, options=OPTIONS)
        assert conversion.report, conversion.error
        assert len(list(folder.iterdir())) == 2
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
        assert read_manifest(folder / MANIFEST)[0].slide_id == slide_id
        assert Slide(read_manifest(folder / MANIFEST)[0].path).shape_yx == (48, 64)

    @pytest.mark.parametrize("inside", [True, False])
    def test_a_manifest_of_images_is_not_overwritten(self, tmp_path, image, inside):
        path = image(tmp_path / ("a.tif" if inside else "images/a.tif"))
        write_manifest(tmp_path / MANIFEST, [Entry(slide_id="a", path=str(path), label="precious")])
        before = (tmp_path / MANIFEST).read_text()
        for source in (tmp_path / MANIFEST, path):
            with pytest.raises(UsageError, match=r"manifest\.csv: would be replaced"):
                run([source], tmp_path)
        assert (tmp_path / MANIFEST).read_text() == before
        assert not list(tmp_path.glob("*.zarr"))

    @pytest.mark.parametrize("text", ["invoice,amount\n1,2\n", ""])
    def test_a_table_of_other_things_is_not_overwritten(self, tmp_path, image, text):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UsageError, match=r"manifest\.csv: .*mend it or move it away"):
            run([image(tmp_path / "a.tif")], tmp_path)
        assert (tmp_path / MANIFEST).read_text() == text

    def test_labels_filled_in_by_hand_stay(self, tmp_path, image):
        """Do as the README says: convert, give every row a label, and perhaps run the same command again."""
        image(tmp_path / "in" / "a.tif")
        image(tmp_path / "in" / "b.tif")
        run([tmp_path / "in"], tmp_path / "out")
        path = tmp_path / "out" / MANIFEST
        text = "slide_id,path,label,case_id\na,a.ome.zarr,x,p\nb,b.ome.zarr,y,q\n"
        path.write_text(text)
        run([tmp_path / "in"], tmp_path / "out")
        assert path.read_text() == text
        run([image(tmp_path / "c.tif")], tmp_path / "out")
        assert path.read_text() == text + "c,c.ome.zarr,,\n"
        (tmp_path / "relabel.csv").write_text("slide_id,path,label\nb,in/b.tif,z\n")
        run([tmp_path / "relabel.csv"], tmp_path / "out")
        assert [(e.label, e.case_id) for e in read_manifest(path)] == [("x", "p"), ("z", "q"), ("", "")]

    def test_pyramids_that_were_removed_leave_the_manifest(self, tmp_path, image):
        for name in "ab":
            image(tmp_path / "in" / f"{name}.tif")
        run([tmp_path / "in"], tmp_path / "out")
        shutil.rmtree(tmp_path / "out" / "a.ome.zarr")
        run([tmp_path / "in" / "b.tif"], tmp_path / "out")
        assert [entry.slide_id for entry in read_manifest(tmp_path / "out" / MANIFEST)] == ["b"]

    def test_a_place_that_cannot_be_written_is_found_before_any_work(self, tmp_path, image, monkeypatch):
        monkeypatch.setattr("pipeline.convert.convert", lambda *_, **__: pytest.fail("worked"))
        with pytest.raises(UsageError, match="cannot be made"):
            run([image(tmp_path / "a.tif")], tmp_path / "a.tif" / "out")

    def test_pyramids_are_no_images(self, tmp_path, image):
        run([image(tmp_path / "a.tif")], tmp_path / "out")
        with pytest.raises(UsageError, match="no image here"):
            find_images([str(tmp_path / "out")])

    def test_what_another_process_adds_meanwhile_stays(self, tmp_path, image, monkeypatch):
        first, second = image(tmp_path / "a.tif"), image(tmp_path / "b.tif", seed=1)

        def while_another_runs(*args, **settings):
            with monkeypatch.context() as patch:
                patch.setattr("pipeline.convert.convert", convert)
                run([second], tmp_path / "out")
            return convert(*args, **settings)

        monkeypatch.setattr("pipeline.convert.convert", while_another_runs)
        run([first], tmp_path / "out")
        assert [entry.slide_id for entry in read_manifest(tmp_path / "out" / MANIFEST)] == ["b", "a"]

    def test_one_process_at_a_time_writes_the_manifest(self, tmp_path, image):
        path = image(tmp_path / "a.tif")
        (tmp_path / "out").mkdir()
        with _locked(tmp_path / "out"):
            other = threading.Thread(target=run, args=([path], tmp_path / "out"))
            other.start()
            other.join(0.5)
            assert not (tmp_path / "out" / MANIFEST).exists()
        other.join()
        assert (tmp_path / "out" / MANIFEST).exists()

    def test_the_manifest_may_lie_elsewhere(self, tmp_path, image):
        run([image(tmp_path / "a.tif")], tmp_path / "out", manifest=tmp_path / "lists" / "m.csv")
        assert not (tmp_path / "out" / MANIFEST).exists()
        [entry] = read_manifest(tmp_path / "lists" / "m.csv")
        assert entry.path == str(tmp_path / "out" / "a.ome.zarr")

    def test_a_manifest_elsewhere_may_lead_back(self, tmp_path, image):
        """A row may be written as ``../out/a.ome.zarr``, and --out too."""
        manifest = tmp_path / "lists" / "m.csv"
        path = image(tmp_path / "a.tif")
        run([path], tmp_path / "out", manifest=manifest)
        manifest.write_text("slide_id,path,label\na,../out/a.ome.zarr,x\n")
        [conversion] = run([path], tmp_path / "lists" / ".." / "out", manifest=manifest)
        assert conversion.report.up_to_date
        [entry] = read_manifest(manifest)
        assert (entry.path, entry.label) == (str(tmp_path / "out" / "a.ome.zarr"), "x")

    @pytest.mark.parametrize("out", ["s3:", "s3:/", "s3://", "s3:/bucket/x", "s3:///x", "gs:///"])
    def test_half_a_url_makes_no_folder(self, tmp_path, image, monkeypatch, out):
        path = image(tmp_path / "a.tif")
        monkeypatch.chdir(tmp_path)
        for work in (run, lambda sources, out: plan_all(find_images(list(map(str, sources))), out, options=OPTIONS)):
            with pytest.raises(UsageError, match=r"not a whole URL; give scheme://bucket\[/folder\]"):
                work([path], out)
        assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]

    def test_a_folder_with_a_colon(self, tmp_path, image, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run([image(tmp_path / "a.tif")], "run:5")[0].report
        assert (tmp_path / "run:5" / "a.ome.zarr").is_dir()

    def test_processes_make_the_same(self, tmp_path, image):
        path = image(tmp_path / "a.tif")
        for executor in ("threads", "processes"):
            assert run([path], tmp_path / executor, executor=executor, workers=2)[0].report
        name = "a.ome.zarr/0/c/0/0/0"
        assert (tmp_path / "threads" / name).read_bytes() == (tmp_path / "processes" / name).read_bytes()

    @pytest.mark.parametrize(
        ("name", "slide", "target"),
        [
            (b"bad\xff.tif", "bad\\xff", "bad%5Cxff.ome.zarr"),  # a name that is no UTF-8
            (b" blanks .tif", "blanks", "blanks.ome.zarr"),
            (b".hidden.tif", ".hidden", "%2Ehidden.ome.zarr"),
        ],
    )
    def test_strange_names(self, tmp_path, image, name, slide, target):
        """Converted, listed and found again, by name and in the folder."""
        path = image(tmp_path / "a.tif").rename(tmp_path / os.fsdecode(name))
        for _ in range(2):
            [conversion] = run([path], tmp_path / "out")
            assert conversion.report, conversion.error
        [entry] = read_manifest(tmp_path / "out" / MANIFEST)
        assert (entry.slide_id, entry.path) == (slide, str(tmp_path / "out" / target))
        [found] = validate_all(find_pyramids([str(tmp_path / "out")]))
        assert found.sound

    def test_a_storage_error_of_any_kind_is_of_its_slide(self, tmp_path, image, monkeypatch):
        def fail(*_, **__):
            raise MissingImageError("gone while it was read")

        monkeypatch.setattr("pipeline.convert.convert", fail)
        assert run([image(tmp_path / "a.tif")], tmp_path / "out")[0].error == "gone while it was read"


class TestPlanAll:
    def test_looks_and_writes_nothing(self, tmp_path, image):
        image(tmp_path / "in" / "a.tif")
        (tmp_path / "in" / "bad.tif").write_text("no TIFF")
        good, bad = plan_all(find_images([str(tmp_path / "in")]), tmp_path / "out", options=OPTIONS)
        assert good.text == f"{tmp_path}/out/a.ome.zarr: 48 x 64 pixels, 3 channels"
        assert "bad.tif" in bad.error
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


class TestUrls:
    @pytest.fixture
    def bucket(self, monkeypatch):
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}
        for name, value in (values | {"REGION": "us-east-1"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        connection = HTTPConnection(host, port)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        connection.close()
        yield "s3://bucket"
        server.stop()

    def test_folders(self, tmp_path, image, bucket, monkeypatch):
        monkeypatch.chdir(tmp_path)
        here = f"{bucket}/folders"  # other tests of this process have left theirs in the bucket
        store = connect(here)
        for key in ("raw/a.tif", "raw/deep/b.tif", "raw/.hidden.tif", "raw/notes.txt", "raw/x.zarr/c.tif"):
            obstore.put(store, key, image(tmp_path / "local.tif").read_bytes())
        conversions = run([f"{here}/raw/"], f"{here}/out")
        assert [c.entry.slide_id for c in conversions] == ["a", "b"]
        assert all(c.report for c in conversions)
        found = find_pyramids([f"{here}/out"])
        assert [entry.path for entry in found] == [f"{here}/out/a.ome.zarr", f"{here}/out/b.ome.zarr"]
        assert all(one.sound for one in validate_all(found))
        everything = [entry.path for entry in find_pyramids([here])]
        assert everything == [f"{here}/out/a.ome.zarr", f"{here}/out/b.ome.zarr", f"{here}/raw/x.zarr"]
        with pytest.raises(StorageError, match="s3://nobucket/raw"):
            find_images(["s3://nobucket/raw"])

    def test_out(self, tmp_path, image, bucket, monkeypatch):
        """The manifest of a URL is written to the working directory, and added to like any other."""
        monkeypatch.chdir(tmp_path)
        for name in "ab":
            [conversion] = run([image(tmp_path / f"{name}.tif")], f"{bucket}/out/")
            assert conversion.report, conversion.error
        entries = read_manifest(tmp_path / MANIFEST)
        assert [entry.path for entry in entries] == [f"{bucket}/out/a.ome.zarr", f"{bucket}/out/b.ome.zarr"]
        assert Slide(entries[0].path).shape_yx == (48, 64)
        with pytest.raises(UsageError, match="not a manifest of pyramids in s3://bucket/other"):
            run([tmp_path / "a.tif"], f"{bucket}/other")
