"""Folds: cases never part, classes are spread evenly, and each fold's training has the splits that it says."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.data.duplicates import copies, copy_remarks, find_identities
from pipeline.data.folds import assign_folds, fold_gaps, fold_names, pick_folds, take_fold
from pipeline.data.groups import case_of, join_groups
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.data.splits import assign_splits
from pipeline.errors import UsageError
from storage import write_pyramid


def slide(number, label="a", **more):
    return Entry(slide_id=f"s{number:04}", path=f"/data/{number}.tif", label=label, **more)


@st.composite
def studies(draw):
    """Slides of cases of one to four slides each, in up to three classes, some of several classes in a case."""
    cases = draw(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=6, max_size=40))
    labelled = [(case, label) for case, labels in enumerate(cases) for label in labels]
    return [slide(i, label, case_id=f"p{case}" if case % 4 else "") for i, (case, label) in enumerate(labelled)]


def cases_by_class(entries):
    """Count the cases of each class in each fold, written down without the code under test."""
    labels, fold = {}, {}
    for entry in entries:
        labels.setdefault(case_of(entry), []).append(entry.label)
        fold[case_of(entry)] = entry.fold
    counts = {}
    for case, found in labels.items():
        label = max(sorted(set(found)), key=found.count)
        counts.setdefault(label, Counter())[fold[case]] += 1
    return counts


class TestAssign:
    @given(studies(), st.integers(2, 6), st.integers(0, 3))
    def test_no_case_parts_and_classes_differ_by_one_case(self, entries, folds, seed):
        dealt = assign_folds(entries, folds, seed=seed)
        assert [replace(entry, fold="") for entry in dealt] == entries
        of_case = {}
        for entry in dealt:
            of_case.setdefault(case_of(entry), set()).add(entry.fold)
        assert all(len(found) == 1 for found in of_case.values())
        names = [str(number) for number in range(folds)]
        for counts in cases_by_class(dealt).values():
            every = [counts[name] for name in names]
            assert sum(every) == counts.total()
            assert max(every) - min(every) <= 1
        shuffled = random.Random(1).sample(entries, len(entries))
        again = {entry.slide_id: entry.fold for entry in assign_folds(shuffled, folds, seed=seed)}
        assert again == {entry.slide_id: entry.fold for entry in dealt}

    @given(studies(), st.lists(st.sampled_from(["", "x", "y", "z", "w"]), min_size=200, max_size=200))
    def test_no_site_parts(self, entries, sites):
        site = {entry.slide_id: name for entry, name in zip(entries, sites, strict=False)}
        groups = join_groups(entries, site)
        if len(set(groups.values())) < 2:
            return
        dealt = assign_folds(entries, 2, seed=0, groups=groups)
        for shared in (site, {entry.slide_id: entry.case_id for entry in entries}):
            found = {}
            for entry in dealt:
                found.setdefault(shared[entry.slide_id], set()).add(entry.fold)
            assert all(len(folds) == 1 for name, folds in found.items() if name)

    def test_slides_are_spread_too(self):
        """Cases of 1 to 10 slides in one class: folds have about the same number of slides, not of cases alone."""
        sizes = [10, 9, 8, 7, 6, 5, 4, 3, 2, 1] * 2
        entries = [
            slide(i, case_id=f"p{case}") for i, case in enumerate(np.repeat(np.arange(len(sizes)), sizes).tolist())
        ]
        counts = Counter(entry.fold for entry in assign_folds(entries, 4, seed=0))
        assert max(counts.values()) - min(counts.values()) <= 2

    def test_seeds_differ(self):
        entries = [slide(i, "ab"[i % 2]) for i in range(40)]
        one, other = (assign_folds(entries, 4, seed=seed) for seed in (0, 1))
        assert one != other

    def test_test_slides_get_none(self):
        entries = [slide(i, "ab"[i % 2], split="test" if i < 4 else "train") for i in range(24)]
        assert {entry.fold for entry in assign_folds(entries, 5, seed=0)[:4]} == {""}

    def test_too_few_groups(self):
        with pytest.raises(UsageError, match="--folds 3: there are 2 groups"):
            assign_folds([slide(i, case_id=f"p{i % 2}") for i in range(9)], 3, seed=0)

    def test_gaps_are_told(self):
        entries = [slide(i, "a", fold="0") for i in range(5)] + [slide(9, "b", fold="1"), slide(10, "a", fold="1")]
        assert fold_gaps(entries) == {"a": 4, "b": 1}


class TestTake:
    def dealt(self, test=0.0, validation=0.0):
        entries = [slide(i, "ab"[i % 2], case_id=f"p{i // 2}") for i in range(80)]
        entries = [replace(entry, label="ab"[int(entry.case_id[1:]) % 2]) for entry in entries]
        return assign_folds(assign_splits(entries, validation=validation, test=test, seed=0), 4, seed=0)

    @pytest.mark.parametrize("share", [0.0, 0.2])
    def test_without_a_held_out_test_the_fold_is_the_test(self, share):
        dealt = self.dealt()
        tested = []
        for fold in fold_names(dealt):
            taken = take_fold(dealt, fold, validation=share, seed=0)
            assert [entry.split == "test" for entry in taken] == [entry.fold == fold for entry in dealt]
            validated = [entry for entry in taken if entry.split == "val"]
            assert len(validated) == round(share * 60)
            assert Counter(entry.label for entry in validated) == dict.fromkeys("ab", 6) if share else not validated
            splits = {(entry.case_id, entry.split) for entry in taken}
            assert len(splits) == 40
            tested += [entry.slide_id for entry in taken if entry.split == "test"]
        assert sorted(tested) == [entry.slide_id for entry in dealt]

    def test_with_a_held_out_test_the_fold_validates(self):
        dealt = self.dealt(test=0.25)
        held = {entry.slide_id for entry in dealt if entry.split == "test"}
        assert len(held) == 20
        for fold in fold_names(dealt):
            taken = take_fold(dealt, fold, validation=0.3, seed=0)
            assert {entry.slide_id for entry in taken if entry.split == "test"} == held
            assert {entry.slide_id for entry in taken if entry.split == "val"} == {
                entry.slide_id for entry in dealt if entry.fold == fold
            }

    @given(studies(), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.25, 0.5]), st.integers(0, 3))
    def test_nothing_leaks(self, entries, test, validation, seed):
        """No case is in two splits of a fold's training; the tests are all slides, each once, or the one held out."""
        dealt = assign_folds(assign_splits(entries, validation=0, test=test, seed=seed), 2, seed=seed)
        tests = []
        for fold in fold_names(dealt):
            taken = take_fold(dealt, fold, validation=validation, seed=seed)
            assert len({(case_of(entry), entry.split) for entry in taken}) == len(set(map(case_of, taken)))
            tests.append({entry.slide_id for entry in taken if entry.split == "test"})
        held = {entry.slide_id for entry in dealt if entry.split == "test"}
        if held:
            assert all(each == held for each in tests)
        else:
            assert sorted(slide_id for each in tests for slide_id in each) == [entry.slide_id for entry in dealt]

    def test_what_does_not_fit_is_named(self):
        with pytest.raises(UsageError, match="1 slides have neither fold nor split: s0002"):
            take_fold([slide(0, fold="0"), slide(1, fold="1"), slide(2)], "0", validation=0, seed=0)
        torn = [slide(0, fold="0", case_id="p"), slide(1, fold="1", case_id="p")]
        with pytest.raises(UsageError, match=r"cases in several folds: p \(0, 1\)"):
            take_fold(torn, "0", validation=0, seed=0)

    def test_folds_are_picked(self):
        names = fold_names([slide(i, fold=str(i)) for i in range(12)])
        assert names == [str(i) for i in range(12)]
        assert pick_folds(names, "all") == names
        assert pick_folds(names, "3, 0") == ["3", "0"]
        with pytest.raises(UsageError, match=r"no fold 12; there are 0, 1, .* or all"):
            pick_folds(names, "12")
        with pytest.raises(UsageError, match="nested-ats split --folds 5 writes one"):
            pick_folds([], "all")


@pytest.fixture
def split(tmp_path):
    """Run the command on entries; return what it wrote, and what it printed."""

    def run(entries, *options, code=0):
        write_manifest(tmp_path / "all.csv", entries)
        out = tmp_path / "study.csv"
        words = ["split", str(tmp_path / "all.csv"), "--out", str(out), "--overwrite", *map(str, options)]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return (read_manifest(out) if not code else [], result.output)

    return run


class TestCommand:
    def entries(self, count=60):
        return [
            slide(i, "ab"[i % 3 == 0], case_id=f"p{i // 2 if i > 9 else i}", extra={"site": "XYZ"[i % 60 // 20]})
            for i in range(count)
        ]

    def test_folds_and_a_held_out_test(self, split):
        written, printed = split(self.entries(), "--folds", 4, "--test", 0.2)
        assert {entry.split for entry in written} == {"train", "test"}
        assert {bool(entry.fold) for entry in written if entry.split == "test"} == {False}
        assert fold_names(written) == ["0", "1", "2", "3"]
        assert "fold 0: " in printed
        assert "cases (" in printed
        gaps = fold_gaps([entry for entry in written if entry.fold])
        assert max(gaps.values()) <= 1
        assert "folds differ by at most: 1 cases of a" in printed or "0 cases of a" in printed

    def test_sites_stay_whole_and_the_imbalance_is_printed(self, split):
        written, printed = split(self.entries(), "--folds", 3, "--site", "site")
        assert len({(entry.extra["site"], entry.fold) for entry in written}) == 3
        gaps = fold_gaps(written)
        assert ", ".join(f"{gap} cases of {label}" for label, gap in gaps.items()) in printed

    def test_a_fold_without_a_class_is_named(self, split):
        entries = [slide(i, "a") for i in range(20)] + [slide(30, "rare"), slide(31, "rare")]
        assert "warning: no slide of rare in fold" in split(entries, "--folds", 4)[1]

    def test_a_given_test_is_kept(self, split):
        entries = [replace(entry, split="test" if i > 49 else "train") for i, entry in enumerate(self.entries())]
        written, _ = split(entries, "--folds", 4)
        assert [entry.split for entry in written] == [entry.split for entry in entries]
        assert [bool(entry.fold) for entry in written] == [entry.split == "train" for entry in entries]

    def test_several_columns_are_spread(self, split):
        entries = [slide(i, "ab"[i % 2], extra={"sex": "fm"[i % 4 < 2]}) for i in range(48)]
        written, _ = split(entries, "--folds", 4, "--stratify", "label,sex")
        counts = Counter((entry.fold, entry.label, entry.extra["sex"]) for entry in written)
        assert set(counts.values()) == {3}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--site", "centre"], "column centre: neither the manifest nor --labels has it; further columns: site"),
            (["--folds", 4, "--validation", 0.1], "train takes the validation of a fold"),
            (["--folds", 90], "--folds 90: there are"),
        ],
    )
    def test_mistakes(self, split, options, message):
        assert message in split(self.entries(), *options, code=2)[1]

    def test_copies_stay_together_and_are_named(self, split, tmp_path):
        rng = np.random.default_rng(0)
        entries = []
        for i in range(12):
            pixels = rng.integers(0, 255, (1, 20, 20), np.uint8)
            for name in (f"{i}", f"{i}b")[: 2 if i < 4 else 1]:
                write_pyramid(tmp_path / f"{name}.ome.zarr", pixels)
                label = "b" if name == "2b" else "a"
                entries.append(Entry(slide_id=name, path=str(tmp_path / f"{name}.ome.zarr"), label=label))
        written, printed = split(entries, "--folds", 4)
        fold = {entry.slide_id: entry.fold for entry in written}
        assert all(fold[str(i)] == fold[f"{i}b"] for i in range(4))
        assert "slides of the same pixels: 0 = 0b, 1 = 1b, 2 = 2b, 3 = 3b" in printed
        assert "several labels: 2 (a) = 2b (b)" in printed
        apart, _ = split(entries, "--folds", 4, "--no-duplicates")
        fold = {entry.slide_id: entry.fold for entry in apart}
        assert any(fold[str(i)] != fold[f"{i}b"] for i in range(4))


@pytest.mark.data
def test_idrids_copies_are_found(data):
    """The six pairs that its README names, among some others."""
    pairs = [("train", a, "train", b) for a, b in ((79, 279), (21, 391), (45, 333), (73, 375), (28, 327))]
    pairs.append(("train", 118, "test", 64))
    folder = data / "idrid-half"
    named = [(split, number) for a, b, c, d in pairs for split, number in ((a, b), (c, d))]
    entries = [
        Entry(slide_id=f"{split}-{number}", path=str(folder / f"{split}/IDRiD_{number:03}.jpg"), split=split)
        for split, number in [*named, *(("train", number) for number in range(1, 9))]
    ]
    found = find_identities(entries)
    assert len(found) == len(entries)
    assert [[entry.slide_id for entry in group] for group in copies(entries, found)] == [
        [f"{a}-{b}", f"{c}-{d}"] for a, b, c, d in pairs
    ]
    [torn] = copy_remarks(entries, found)
    assert "in several splits: train-118 (train) = test-64 (test); as test slides they count as seen" in torn
