"""Metrics, against scikit-learn and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from pipeline.errors import UsageError
from pipeline.results.evaluate import METRICS, evaluate
from pipeline.results.intervals import area_interval
from pipeline.results.predictions import ABOUT
from pipeline.results.table import write_table


def row(label, probabilities, *, slide_id="", case_id="", split="test", classes="abc"):
    best = classes[int(np.argmax(probabilities))]
    numbers = {f"prob_{name}": p for name, p in zip(classes, probabilities, strict=True)}
    identity = {"slide_id": slide_id or f"{label}{probabilities}", "case_id": case_id, "label": label, "split": split}
    return {**identity, "prediction": best, **numbers, "status": "ok", "error": ""}


FAILED = {"slide_id": "f", "case_id": "", "label": "a", "split": "test", "status": "failed", "error": "gone"}


@pytest.fixture
def measure(tmp_path):
    """Write rows as `predict` does and evaluate them."""

    def run(rows, **settings):
        write_table(tmp_path, rows)
        found = evaluate(tmp_path, **settings)
        text = (tmp_path / METRICS).read_text()
        assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(found))
        return found

    return run


def random_rows(n, seed=0, classes="abc", decimals=1):
    rng = np.random.default_rng(seed)
    labels = rng.choice(list(classes), n, p=np.arange(1, len(classes) + 1) / sum(range(len(classes) + 1)))
    rows = []
    for i, label in enumerate(labels):
        p = rng.dirichlet(np.ones(len(classes)) + (np.array(list(classes)) == label))
        p = np.round(p, decimals)  # many ties
        rows.append(row(str(label), p.tolist(), slide_id=str(i), classes=classes))
    return rows


@pytest.mark.parametrize("classes", ["ab", "abc", "abcdefg"])
@pytest.mark.parametrize("decimals", [1, 12])
def test_against_scikit_learn(measure, classes, decimals):
    rows = random_rows(150, classes=classes, decimals=decimals)
    found = measure(rows)
    labels = [r["label"] for r in rows]
    predictions = [r["prediction"] for r in rows]
    scores = np.array([[r[f"prob_{name}"] for name in classes] for r in rows])
    one_hot = np.array(labels)[:, None] == np.array(list(classes))
    assert found["accuracy"]["value"] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert found["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(labels, predictions))
    assert found["auc"]["value"] == pytest.approx(sk.roc_auc_score(one_hot, scores, average="macro"))
    assert found["confusion"] == sk.confusion_matrix(labels, predictions, labels=list(classes)).tolist()
    if decimals == 12:
        assert found["cross_entropy"] == pytest.approx(sk.log_loss(labels, scores, labels=list(classes)))


def test_by_hand(measure):
    rows = [row("a", [0.9, 0.1], classes="ab", slide_id="1"), row("a", [0.4, 0.6], classes="ab", slide_id="2")]
    rows += [row("b", [0.4, 0.6], classes="ab", slide_id="3"), row("b", [0.2, 0.8], classes="ab", slide_id="4")]
    rows += [row("b", [0.1, 0.9], classes="ab", slide_id="5")]
    found = measure(rows)
    assert found["accuracy"]["value"] == pytest.approx(4 / 5)
    assert found["balanced_accuracy"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["auc"]["value"] == pytest.approx(5.5 / 6)  # one tie
    assert found["cross_entropy"] == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.6, 0.8, 0.9))) / 5)
    assert found["confusion"] == [[1, 1], [0, 3]]
    assert (found["slides"], found["cases"], found["failed"], found["unlabelled"]) == (5, 5, 0, 0)


def test_a_certain_mistake_has_a_finite_cross_entropy(measure):
    assert measure([row("a", [0.0, 1.0], classes="ab")])["cross_entropy"] == pytest.approx(-math.log(1e-12))


def delong_error(positive, scores):
    """Standard error of the area by equations 3 to 7 of DeLong et al., pair by pair."""
    wins = (scores[positive][:, None] > scores[~positive]) + 0.5 * (scores[positive][:, None] == scores[~positive])
    return math.sqrt(sum(wins.mean(axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1)))


class TestIntervals:
    @pytest.mark.parametrize(("right", "slides"), [(140, 200), (4, 4), (0, 3), (1, 2)])
    def test_accuracy_is_wilson_s(self, measure, right, slides):
        rows = [row("a" if i < right else "b", [1.0, 0.0], classes="ab", slide_id=str(i)) for i in range(slides)]
        expected = binomtest(right, slides).proportion_ci(method="wilson")
        found = measure(rows)["accuracy"]
        assert found["interval_95"] == pytest.approx((expected.low, expected.high))
        assert "Wilson" in found["method"]

    @pytest.mark.parametrize("n", [1, 2, 5, 50])
    def test_none_is_a_point(self, measure, n):
        """All right, and ranked without a mistake: that says little at few slides, and never everything."""
        rows = [row("ab"[i % 2], [1 - i % 2, i % 2], classes="ab", slide_id=str(i)) for i in range(2 * n)]
        found = measure(rows)
        for name in ("accuracy", "balanced_accuracy", "auc"):
            low, high = found[name]["interval_95"]
            assert high == 1
            assert low < {1: 0.45, 2: 0.55, 5: 0.76, 50: 0.98}[n], name
            assert low > (0.2 if n == 1 else 0.35), name

    def test_auc_is_delong_s_on_the_logit_scale(self, measure):
        rows = random_rows(60, classes="ab")
        found = measure(rows)["auc"]
        positive = np.array([r["label"] == "b" for r in rows])
        error = delong_error(positive, np.array([r["prob_b"] for r in rows]))
        value = found["value"]
        half = 1.959964 * error / (value * (1 - value))
        expected = [1 / (1 + math.exp(-math.log(value / (1 - value)) - side * half)) for side in (-1, 1)]
        assert found["interval_95"] == pytest.approx(expected, rel=1e-5)
        assert "DeLong" in found["method"]

    def test_a_constant_answer_ranks_nothing(self, measure):
        found = measure([row("ab"[i % 2], [0.5, 0.5], classes="ab", slide_id=str(i)) for i in range(10)])["auc"]
        assert found["value"] == 0.5
        assert found["interval_95"] == pytest.approx((0.5 - 0.33, 0.5 + 0.33), abs=0.05)
        assert "Newcombe" in found["method"]

    @pytest.mark.parametrize("classes", ["ab", "abc"])
    def test_the_auc_s_interval_holds_the_truth_as_often_as_it_says(self, classes):
        """200 draws of a few cases of 1 to 4 slides that share most of their score."""
        rng, held = np.random.default_rng(0), 0
        many = rng.normal(size=(len(classes), 4000)) + 1.0
        noise = rng.normal(size=(len(classes), len(classes), 4000))
        truth = np.mean([
            [np.searchsorted(np.sort(noise[i, j]), many[i]).mean() / 4000 for j in range(len(classes)) if j != i]
            for i in range(len(classes))
        ])  # fmt: skip
        for _ in range(200):
            cases = np.repeat(np.arange(16), rng.integers(1, 5, 16))
            labels = (np.arange(16) % len(classes))[cases]
            scores = rng.normal(size=(16, len(classes)))[cases] * 0.9**0.5
            scores += rng.normal(size=scores.shape) * 0.1**0.5 + (labels[:, None] == np.arange(len(classes)))
            (low, high), _ = area_interval(labels, scores, cases)
            held += low <= truth <= high
        assert held >= 180  # of 190

    def test_cases_count_whole(self, measure):
        """Twenty equal slides of a case say no more than one of them."""
        single = [row("a", [float(i % 2), float(1 - i % 2)], classes="ab", slide_id=f"{i}") for i in range(20)]
        many = [
            {**r, "slide_id": f"{r['slide_id']}-{j}", "case_id": r["slide_id"]} for r in single for j in range(20)
        ]
        one, other = measure(single)["accuracy"], measure(many)["accuracy"]
        assert one["interval_95"] == pytest.approx(other["interval_95"])
        assert measure(many)["cases"] == 20
        alone = measure([{**r, "case_id": ""} for r in many])["accuracy"]["interval_95"]
        assert alone[1] - alone[0] < 0.4 * (one["interval_95"][1] - one["interval_95"][0])
        right = [{**r, "label": r["prediction"]} for r in many]
        assert measure(right)["accuracy"]["interval_95"][0] == pytest.approx(20 / (20 + 1.959964**2))

    def test_a_slide_without_a_case_is_no_slide_of_a_case_of_that_name(self, measure):
        rows = [row("a", [1.0, 0.0], classes="ab", slide_id="x")]
        rows += [row("a", [1.0, 0.0], classes="ab", slide_id="y", case_id="slide x")]
        assert (measure(rows)["slides"], measure(rows)["cases"]) == (2, 2)

    def test_a_single_case_has_none(self, measure):
        found = measure([row("a", [0.8, 0.1, 0.1], case_id="p"), row("b", [0.1, 0.8, 0.1], case_id="p")])
        assert found["accuracy"] == {"value": 1.0, "interval_95": None, "method": ""}
        assert found["auc"]["interval_95"] is None

    def test_value_lies_within(self, measure):
        found = measure(random_rows(80))
        for name in ("accuracy", "balanced_accuracy", "auc"):
            low, high = found[name]["interval_95"]
            assert 0 <= low < found[name]["value"] < high <= 1


class TestClasses:
    def test_one_class_has_no_auc(self, measure):
        found = measure([row("a", [0.9, 0.1], classes="ab", slide_id=str(i)) for i in range(5)])
        assert found["auc"] == {"value": None, "interval_95": None, "method": ""}
        assert found["balanced_accuracy"]["value"] == 1.0

    def test_two_slides_of_two_classes(self, measure):
        found = measure([row("a", [0.9, 0.1], classes="ab"), row("b", [0.1, 0.9], classes="ab")])["auc"]
        assert (found["value"], *found["interval_95"]) == pytest.approx((1.0, 1 / (1 + 1.959964**2), 1.0))

    def test_a_class_without_slides_is_left_out_of_the_means(self, measure):
        rows = [r for r in random_rows(60) if r["label"] != "c"]
        found = measure(rows)
        labels = np.array([r["label"] for r in rows])
        aucs = [sk.roc_auc_score(labels == name, [r[f"prob_{name}"] for r in rows]) for name in "ab"]
        assert found["auc"]["value"] == pytest.approx(np.mean(aucs))
        assert found["classes"] == ["a", "b", "c"]
        assert found["confusion"][2] == [0, 0, 0]

    def test_labels_that_the_model_does_not_know(self, measure):
        with pytest.raises(UsageError, match="labels the model does not know: ring, x"):
            measure([row("ring", [1.0, 0.0, 0.0]), row("x", [1.0, 0.0, 0.0]), row("a", [1.0, 0.0, 0.0])])


class TestRows:
    def test_failed_and_unlabelled_slides_are_counted_and_left_out(self, measure):
        good = [row("a", [1.0, 0.0, 0.0]), row("b", [0.0, 1.0, 0.0])]
        found = measure([FAILED, *good, row("", [1.0, 0.0, 0.0])])
        assert (found["slides"], found["failed"], found["unlabelled"]) == (2, 1, 1)
        assert found["accuracy"]["value"] == 1.0

    def test_splits(self, measure):
        rows = [row("a", [1.0, 0.0, 0.0], split="test"), row("b", [1.0, 0.0, 0.0], split="train")]
        assert measure(rows[:1])["split"] == "test"
        assert measure([row("a", [1.0, 0.0, 0.0], split="")])["split"] == "none given"
        assert measure(rows, split="test")["accuracy"]["value"] == 1.0
        assert measure(rows, split="train")["accuracy"]["value"] == 0.0
        assert measure(rows)["accuracy"]["value"] == 0.5
        assert (measure(rows)["split"], measure(rows, split="train")["split"]) == ("1 of train, 1 of test", "train")
        with pytest.raises(UsageError, match="split val: no predicted slide has a label; 0 slides"):
            measure(rows, split="val")

    def test_slides_that_were_seen_are_left_out_and_counted_unless_asked_for(self, measure):
        rows = [row("a", [1.0, 0.0, 0.0], split="test") | {"seen": ""}]
        rows += [
            row("b", [1.0, 0.0, 0.0], split="train") | {"seen": "train"},
            row("b", [0.9, 0.1, 0.0]) | {"seen": "val"},
        ]
        found = measure(rows)
        assert (found["slides"], found["accuracy"]["value"], found["split"]) == (1, 1.0, "test")
        assert (found["seen"], found["seen_included"]) == ({"train": 1, "val": 1}, False)
        found = measure(rows, include_seen=True)
        assert (found["slides"], found["seen"], found["seen_included"]) == (3, {"train": 1, "val": 1}, True)
        assert measure(rows, split="train")["seen_included"]  # asked for by name
        with pytest.raises(UsageError, match=r"2 of them seen in training: --include-seen"):
            measure(rows[1:])

    def test_predictions_of_several_models_are_refused(self, measure, tmp_path):
        rows = [row("a", [1.0, 0.0, 0.0]) | {"model": "one"}, row("b", [1.0, 0.0, 0.0]) | {"model": "other"}]
        with pytest.raises(UsageError, match=r"several models \(one, other\)"):
            measure(rows)
        assert measure(rows[:1])["model"] == "one"
        (tmp_path / ABOUT).write_text('{"model": "other"}')
        with pytest.raises(UsageError, match="several models"):
            measure(rows[:1])

    @pytest.mark.parametrize("rows", [[FAILED], [row("", [1.0, 0.0, 0.0])]])
    def test_nothing_to_evaluate(self, measure, rows):
        with pytest.raises(UsageError, match="no predicted slide has a label; 1 slides are there"):
            measure(rows)


class TestVerdict:
    def test_an_answer_that_is_the_class_frequency(self, measure, tmp_path):
        (tmp_path / ABOUT).write_text('{"class_shares": {"a": 0.7, "b": 0.3}}')
        rows = [row("ab"[i % 2], [0.7, 0.3], classes="ab", slide_id=str(i)) for i in range(10)]
        found = measure([{**r, "entropy": 8.2, "uniform_entropy": 8.25, "background": 0.96} for r in rows])
        assert found["guess_cross_entropy"] == pytest.approx(found["cross_entropy"]) == pytest.approx(0.780, abs=1e-3)
        assert found["verdict"].startswith(
            "has learned nothing yet: cross-entropy 0.780 is that of guessing by class "
        )
        assert "AUC 0.50 [0.21, 0.79] contains 0.5" in found["verdict"]
        assert found["verdict"].endswith(
            "; attention is uniform (entropy 8.20 of 8.25); 96% of the drawn patches are background"
        )

    def test_slides_of_one_class_are_no_judge(self, measure, tmp_path):
        """A model that has learned to tell them is worse there than one that always answers the frequent class."""
        (tmp_path / ABOUT).write_text('{"class_shares": {"a": 0.9, "b": 0.1}}')
        rows = [row("a", [0.8, 0.2], classes="ab", slide_id=str(i)) for i in range(9)]
        assert measure(rows)["verdict"] == ""

    def test_good_answers_need_no_words(self, measure):
        found = measure(
            [
                row("ab"[i % 2], [0.9 - 0.8 * (i % 2), 0.1 + 0.8 * (i % 2)], classes="ab", slide_id=str(i))
                for i in range(20)
            ]
        )
        assert found["verdict"] == ""
