"""Localisation AUC and FROC against scikit-learn, a slow count written apart, and outlines whose place is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.errors import DataError
from pipeline.results.localise import RATES, Annotation, Localised, froc, localise, mean_area, read_annotation

PITCH = 10.0


def box(y0, x0, y1, x1):
    """An outline around cells, in pixels."""
    ring = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]) * PITCH
    return ring, []


def heat(shape=(20, 30), seed=0):
    values = np.random.default_rng(seed).exponential(size=shape).astype(np.float32)
    return values / values.mean()


class TestArea:
    def test_is_that_of_scikit_learn_over_the_cells_that_count(self):
        values = heat()
        values[:, 25:] = np.nan
        found = localise(values, PITCH, Annotation([box(2, 3, 8, 9), box(10, 24, 12, 28)], [box(15, 0, 20, 30)]))
        inside = np.zeros(values.shape, bool)
        inside[2:8, 3:9] = inside[10:12, 24:28] = True
        counted = np.isfinite(values)
        counted[15:] = False
        # A ring's corner lies in the cell beyond its lower and right edges too.
        for y, x in ((2, 9), (8, 3), (8, 9), (12, 24), (10, 28), (12, 28)):
            inside[y, x] = True
        expected = roc_auc_score(inside[counted], values[counted])
        assert found.area == pytest.approx(expected)

    def test_a_map_that_shows_it_has_one_and_its_opposite_none(self):
        values = np.full((20, 30), 0.5, np.float32)
        values[5:8, 5:8] = 40
        lesion = [box(5.1, 5.1, 7.9, 7.9)]
        assert localise(values, PITCH, Annotation(lesion, [])).area == 1
        assert localise(1 / values, PITCH, Annotation(lesion, [])).area == 0
        assert localise(values * 0 + 1, PITCH, Annotation(lesion, [])).area == 0.5

    @pytest.mark.parametrize("lesions", [[], [box(-1, -1, 40, 40)]])
    def test_without_cells_of_both_kinds_there_is_none(self, lesions):
        assert localise(heat(), PITCH, Annotation(lesions, [])).area is None

    def test_an_outline_smaller_than_a_cell_has_its_cell(self):
        values = np.ones((20, 30), np.float32)
        values[7, 11] = 9
        found = localise(values, PITCH, Annotation([box(7.41, 11.41, 7.43, 11.43)], []))
        assert found.area == 1
        assert found.found.tolist() == [9]
        assert found.false.tolist() == []

    def test_holes_are_outside(self):
        outer, hole = box(2, 2, 12, 12)[0], box(4, 4, 10, 10)[0]
        values = np.ones((20, 30), np.float32)
        values[6, 6] = 5
        found = localise(values, PITCH, Annotation([(outer, [hole])], []))
        assert found.found.tolist() == [-np.inf]
        assert found.false.tolist() == [5]


class TestDetections:
    def test_maxima_are_once_each_and_only_above_chance(self):
        values = np.full((20, 30), 0.2, np.float32)
        values[3:6, 3:6] = 7  # a plateau is one
        values[3, 20], values[4, 21] = 5, 6  # neighbours are one
        values[15, 10] = 0.9  # below the uniform attention
        found = localise(values, PITCH, Annotation([box(3, 19, 6, 23)], []))
        assert found.false.tolist() == [7]
        assert found.found.tolist() == [6]

    def test_what_is_ignored_counts_neither_way(self):
        values = np.full((20, 30), 0.2, np.float32)
        values[3, 3], values[10, 10] = 7, 5
        found = localise(values, PITCH, Annotation([box(10, 10, 11, 11)], [box(2, 2, 5, 5)]))
        assert found.false.tolist() == []
        assert found.found.tolist() == [5]


def counted(slides):
    """Sensitivity at each of the rates, by counting at every threshold."""
    confidences = sorted({v for each in slides for v in (*each.found, *each.false) if np.isfinite(v)}, reverse=True)
    lesions = sum(len(each.found) for each in slides)
    at = dict.fromkeys(RATES, 0.0)
    for threshold in confidences:
        hits = sum(int((each.found >= threshold).sum()) for each in slides)
        false = sum(int((each.false >= threshold).sum()) for each in slides) / len(slides)
        for rate in RATES:
            if false <= rate:
                at[rate] = max(at[rate], hits / lesions)
    return list(at.values())


class TestFROC:
    @pytest.mark.parametrize("seed", range(4))
    def test_is_what_counting_gives(self, seed):
        rng = np.random.default_rng(seed)
        slides = [
            Localised(
                None, np.where(rng.random(n) < 0.2, -np.inf, rng.integers(1, 9, n)), rng.integers(1, 9, m) * 1.0
            )
            for n, m in rng.integers(0, 7, (6, 2))
        ]
        curve = froc(slides)
        assert curve.at.tolist() == pytest.approx(counted(slides))
        assert curve.score == pytest.approx(np.mean(counted(slides)))
        assert (np.diff(curve.rates) >= 0).all()
        assert (np.diff(curve.sensitivities) >= 0).all()
        assert curve.slides == 6

    def test_slides_without_lesions_dilute_the_false_ones(self):
        found = Localised(None, np.array([3.0]), np.array([9.0, 8.0]))
        empty = Localised(None, np.zeros(0), np.zeros(0))
        assert froc([found]).at.tolist() == [0, 0, 0, 1, 1, 1]
        assert froc([found, *[empty] * 7]).at.tolist() == [1] * 6
        assert froc([empty]) is None
        assert froc([]) is None


def test_the_mean_is_over_slides_and_its_interval_over_cases():
    slides = [Localised(area, np.zeros(0), np.zeros(0)) for area in (0.7, 0.9, 0.8, None)]
    value, (low, high) = mean_area(slides, np.arange(4))
    assert value == pytest.approx(0.8)
    assert 0 < low < 0.8 < high < 1
    assert mean_area(slides[:1], np.zeros(1, np.int64)) == (0.7, None)
    assert mean_area(slides[3:], np.zeros(1, np.int64)) is None


class TestFile:
    def test_lesions_and_what_is_ignored(self, tmp_path):
        def feature(name, ring):
            geometry = {"type": "Polygon", "coordinates": [ring[0].tolist()]}
            return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}

        features = [feature("Tumor", box(1, 1, 2, 2)), feature("Ignore*", box(3, 3, 4, 4))]
        collection = {"type": "FeatureCollection", "features": features}
        (tmp_path / "a%2Fb.geojson").write_text(json.dumps(collection))
        found = read_annotation(tmp_path, "a/b", (200, 300))
        assert len(found.lesions) == len(found.ignored) == 1
        assert read_annotation(tmp_path, "other", (200, 300)) is None
        with pytest.raises(DataError, match="off the slide, which is 5 wide"):
            read_annotation(tmp_path, "a/b", (5, 5))

    def test_a_file_of_nothing_says_that_there_is_nothing(self, tmp_path):
        (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
        assert read_annotation(tmp_path, "a", (20, 20)) == Annotation([], [])

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "a.geojson").write_text("no")
        with pytest.raises(DataError, match=r"a\.geojson: is not JSON"):
            read_annotation(tmp_path, "a", (20, 20))
