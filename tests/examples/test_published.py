"""Loaders of the two published data sets, on small data in their layouts."""

from __future__ import annotations

import io
import pickle
import struct

import imagecodecs
import numpy as np
import pytest
from example_data.published import colon_cancer, colon_cancer_points, traffic_sign_boxes, traffic_signs
from scipy.io import savemat
from scipy.sparse import coo_array

from pipeline.errors import DataError

BMP = imagecodecs.bmp_encode(np.zeros((8, 8, 3), np.uint8))


def write_image(folder, number, detection):
    """One image of the colon cancer set; `detection` is an array, or the bytes of the .mat file."""
    place = folder / f"img{number}"
    place.mkdir()
    (place / f"img{number}.bmp").write_bytes(BMP)
    mat = place / f"img{number}_epithelial.mat"
    if isinstance(detection, bytes):
        mat.write_bytes(detection)
    else:
        savemat(mat, {"detection": detection})
    return mat


class TestColonCancer:
    def test_labels_and_points(self, tmp_path):
        write_image(tmp_path, 10, np.array([[3.5, 1.0], [8.0, 2.25]]))
        write_image(tmp_path, 2, np.empty((0, 0)))
        write_image(tmp_path, 1, np.array([[5, 6]], np.uint16))
        write_image(tmp_path, 3, np.full((1, 2), np.nan))
        (tmp_path / "img2" / "img2_fibroblast.mat").write_bytes(b"not looked at")
        (tmp_path / "imgs").mkdir()
        entries = colon_cancer(tmp_path)
        assert [(entry.slide_id, entry.label) for entry in entries] == [
            ("img1", "epithelial"), ("img2", "none"), ("img3", "none"), ("img10", "epithelial"),
        ]  # fmt: skip
        assert entries[3].path == str(tmp_path / "img10" / "img10.bmp")
        assert {entry.split for entry in entries} == {""}
        points = colon_cancer_points(tmp_path)
        np.testing.assert_array_equal(points["img10"], [[0.0, 2.5], [1.25, 7.0]])  # y, x from 0
        np.testing.assert_array_equal(points["img1"], [[5, 4]])
        assert points["img2"].shape == points["img3"].shape == (0, 2)

    def test_a_compressed_file_is_read(self, tmp_path):
        buffer = io.BytesIO()
        savemat(buffer, {"detection": np.ones((400, 2))}, do_compression=True)
        write_image(tmp_path, 1, buffer.getvalue())
        assert colon_cancer_points(tmp_path)["img1"].shape == (400, 2)

    def test_a_folder_without_images_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="no folders img1.*Classification"):
            colon_cancer(tmp_path)

    @pytest.mark.parametrize("name", ["img1.bmp", "img1_epithelial.mat"])
    def test_a_missing_file_is_named(self, tmp_path, name):
        write_image(tmp_path, 1, np.empty((0, 0)))
        (tmp_path / "img1" / name).unlink()
        with pytest.raises(DataError, match=rf"img1/{name}: is not there"):
            colon_cancer(tmp_path)

    @pytest.mark.parametrize(
        ("detection", "reason"),
        [
            (np.ones((3, 4)), "no array of x and y"),
            (np.ones((3, 2, 2)), "no array of x and y"),
            (np.array([["a", "b"]]), "no array of x and y"),
            (np.array([["a", 1.0]], dtype=object), "no array of x and y"),
            (coo_array(np.ones((3, 2))), "no array of x and y"),
            (b"", "not a MATLAB file"),
            (b"\x89HDF\r\n\x1a\n" + bytes(600), "not a MATLAB file"),
            (pickle.dumps({"detection": np.ones((1, 2))}), "not a MATLAB file"),
            (bytes(2**20 + 1), "more than 1048576 bytes"),
        ],
    )
    def test_what_is_no_list_of_points_is_refused(self, tmp_path, detection, reason):
        write_image(tmp_path, 1, detection)
        with pytest.raises(DataError, match=rf"img1_epithelial\.mat: .*({reason})"):
            colon_cancer(tmp_path)

    def test_another_array_is_refused(self, tmp_path):
        savemat(write_image(tmp_path, 1, b""), {"points": np.ones((1, 2))})
        with pytest.raises(DataError, match="no array named detection"):
            colon_cancer(tmp_path)

    def test_pickles_are_not_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return (tmp_path / "harmed").touch, ()

        write_image(tmp_path, 1, pickle.dumps(Harm()))
        with pytest.raises(DataError):
            colon_cancer(tmp_path)
        assert not (tmp_path / "harmed").exists()

    def test_damage_anywhere_is_an_error_of_ours_or_goes_unnoticed(self, tmp_path):
        buffer = io.BytesIO()
        savemat(buffer, {"detection": np.arange(40.0).reshape(20, 2)}, do_compression=True)
        data = buffer.getvalue()
        mat = write_image(tmp_path, 1, data)
        rng = np.random.default_rng(0)
        refused = 0
        for cut in range(0, len(data), 7):
            mat.write_bytes(data[:cut])
            with pytest.raises(DataError, match=r"img1_epithelial\.mat: "):
                colon_cancer(tmp_path)
        for _ in range(200):
            changed = bytearray(data)
            changed[rng.integers(len(data))] = rng.integers(256)
            mat.write_bytes(changed)
            try:
                colon_cancer(tmp_path)
            except DataError:
                refused += 1
        assert refused > 20

    def test_a_claim_of_many_points_is_not_believed(self, tmp_path):
        buffer = io.BytesIO()
        savemat(buffer, {"detection": np.ones((3, 2))})
        data = buffer.getvalue()
        place = data.index(struct.pack("<ii", 3, 2))
        write_image(tmp_path, 1, data[:place] + struct.pack("<ii", 2**30, 2) + data[place + 8 :])
        with pytest.raises(DataError, match="not a MATLAB file"):
            colon_cancer(tmp_path)


def sign(name, visibility="VISIBLE", x=100, y=50, side=20, kind="PROHIBITORY"):
    return f"{visibility}, {x + side}.000000, {y + side}.500000, {x}.000000, {y}.500000, {kind}, {name};"


def write_sets(folder, first, second="e.jpg:\n", *, without=()):
    for name, text in {"Set1": first, "Set2": second}.items():
        place = folder / name
        place.mkdir(parents=True)
        (place / "annotations.txt").write_text(text)
        for line in text.splitlines():
            file = line.partition(":")[0]
            if file and "/" not in file and file not in without:
                (place / file).write_bytes(b"")
    return folder


class TestTrafficSigns:
    def test_the_rule_of_the_authors(self, tmp_path):
        lines = {
            "empty.jpg": ("", "none"),
            "misc.jpg": ("MISC_SIGNS;", "none"),
            "blank.jpg": (" ", "none"),
            "fifty.jpg": (sign("50_SIGN"), "50"),
            "seventy.jpg": ("MISC_SIGNS;" + sign("70_SIGN"), "70"),
            "eighty.jpg": (sign("PRIORITY_ROAD", kind="INFORMATION") + sign("80_SIGN"), "80"),
            "largest.jpg": (sign("50_SIGN") + sign("80_SIGN", side=30) + sign("70_SIGN", side=10), "80"),
            "first of equals.jpg": (sign("70_SIGN") + sign("50_SIGN"), "70"),
            "visible.jpg": (sign("50_SIGN", "BLURRED", side=90) + sign("70_SIGN", side=10), "70"),
            "other.jpg": (sign("PEDESTRIAN_CROSSING"), None),
            "other limit.jpg": (sign("100_SIGN") + "MISC_SIGNS;", None),
            "blurred.jpg": (sign("50_SIGN", "BLURRED"), None),
            "occluded.jpg": (sign("70_SIGN", "OCCLUDED") + sign("STOP"), None),
            "side.jpg": (sign("80_SIGN", "SIDE_ROAD"), None),
            # As in the authors' code, only what decides a class must be sound.
            "unreadable.jpg": (sign("50_SIGN", "UNREADABLE"), None),
            "word.jpg": ("UNREADABLE;", None),
            "word and sign.jpg": ("UNREADABLE;" + sign("50_SIGN"), "50"),
            "swapped.jpg": (sign("OTHER", side=-9, kind="INFORMATION") + sign("70_SIGN"), "70"),
            "comma.jpg": (sign("80_SIGN").replace(";", ",;"), "80"),
            "numbers.jpg": ("VISIBLE, 1e3, 20., .5, 1, PROHIBITORY, 50_SIGN;", "50"),
        }
        text = "".join(f"{file}:{rest}\n" for file, (rest, _) in lines.items()) + "empty.jpg:\n"  # twice
        write_sets(tmp_path, text, f"empty.jpg:\nx.jpg:{sign('50_SIGN')}\n", without=("blurred.jpg",))
        entries = traffic_signs(tmp_path)
        training = {entry.slide_id: entry.label for entry in entries if entry.split == "train"}
        assert training == {f"Set1-{file[:-4]}": label for file, (_, label) in lines.items() if label}
        tests = [(e.slide_id, e.label, e.split, e.path) for e in entries if e.split != "train"]
        assert tests == [
            ("Set2-empty", "none", "test", str(tmp_path / "Set2" / "empty.jpg")),
            ("Set2-x", "50", "test", str(tmp_path / "Set2" / "x.jpg")),
        ]

    def test_boxes(self, tmp_path):
        text = f"a.jpg:{sign('STOP')}{sign('50_SIGN', x=10, y=20, side=30)}{sign('70_SIGN', 'BLURRED')}\nb.jpg:\n"
        boxes = traffic_sign_boxes(write_sets(tmp_path, text))
        assert boxes == {"Set1-a": [(20.5, 10.0, 30.0, 30.0), (50.5, 100.0, 20.0, 20.0)], "Set1-b": [], "Set2-e": []}

    def test_what_some_published_numbers_have_behind_them_is_dropped(self, tmp_path):
        text = sign("50_SIGN").replace("120.000000", "120.5a").replace(" 50.500000", " 50")
        boxes = traffic_sign_boxes(write_sets(tmp_path, f"a.jpg:{text}\n"))
        assert boxes["Set1-a"] == [(50.0, 100.0, 20.5, 20.5)]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("a.jpg", "no colon"),
            (":", "'' is no name"),
            ("../a.jpg:", "no name of a file beside it"),
            ("/etc/passwd:", "no name of a file beside it"),
            ("a.jpg:VISIBLE, 1, 2, 3;", "has 4 fields"),
            ("a.jpg:VISIBLE, 4, 4, a, 1, PROHIBITORY, 50_SIGN;", "no box"),
            ("a.jpg:VISIBLE, 1, 4, 4, 1, PROHIBITORY, 50_SIGN;", "no box"),
            (f"e.jpg:{sign('50_SIGN')}", "was in line 1 already"),
        ],
    )
    def test_malformed_lines_are_named(self, tmp_path, line, reason):
        write_sets(tmp_path, f"e.jpg:\n\n{line}\n")
        with pytest.raises(DataError, match=rf"Set1/annotations\.txt: line 3: .*{reason}"):
            traffic_signs(tmp_path)

    def test_a_missing_image_is_named(self, tmp_path):
        write_sets(tmp_path, "e.jpg:\na.jpg:\n", without=("a.jpg",))
        with pytest.raises(DataError, match=r"line 2: a\.jpg is not there; unpack Set1Part0\.zip"):
            traffic_signs(tmp_path)

    def test_missing_and_unreadable_annotations(self, tmp_path):
        write_sets(tmp_path, "e.jpg:\n")
        place = tmp_path / "Set2" / "annotations.txt"
        place.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="not a text"):
            traffic_signs(tmp_path)
        place.unlink()
        with pytest.raises(DataError, match=r"Set2/annotations\.txt: cannot be read"):
            traffic_signs(tmp_path)
        place.write_text(f"a.jpg:{sign('STOP')}\n")
        with pytest.raises(DataError, match="no image that is used"):
            traffic_signs(tmp_path)
