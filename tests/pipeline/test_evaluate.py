"""Metrics, against scikit-learn and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from pipeline.errors import UsageError
from pipeline.evaluate import METRICS, evaluate
from pipeline.predict import write_table


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


class TestIntervals:
    def test_close_to_the_binomial_one(self, measure):
        rows = [row("a" if i < 140 else "b", [1.0, 0.0], classes="ab", slide_id=str(i)) for i in range(200)]
        low, high = measure(rows)["accuracy"]["interval_95"]
        half = 1.96 * math.sqrt(0.7 * 0.3 / 200)
        assert low == pytest.approx(0.7 - half, abs=0.015)
        assert high == pytest.approx(0.7 + half, abs=0.015)

    def test_cases_are_resampled_whole(self, measure):
        """Twenty equal slides of a case say no more than one of them."""
        single = [row("a", [float(i % 2), float(1 - i % 2)], classes="ab", slide_id=f"{i}") for i in range(20)]
        many = [
            {**r, "slide_id": f"{r['slide_id']}-{j}", "case_id": r["slide_id"]} for r in single for j in range(20)
        ]
        one, other = measure(single)["accuracy"], measure(many)["accuracy"]
        assert one == other
        assert measure(many)["cases"] == 20
        alone = measure([{**r, "case_id": ""} for r in many])["accuracy"]["interval_95"]
        assert alone[1] - alone[0] < 0.4 * (one["interval_95"][1] - one["interval_95"][0])

    def test_a_slide_without_a_case_is_no_slide_of_a_case_of_that_name(self, measure):
        rows = [row("a", [1.0, 0.0], classes="ab", slide_id="x")]
        rows += [row("a", [1.0, 0.0], classes="ab", slide_id="y", case_id="slide x")]
        assert measure(rows)["slides"] == 2

    def test_a_single_case_has_none(self, measure):
        found = measure([row("a", [0.8, 0.1, 0.1], case_id="p"), row("b", [0.1, 0.8, 0.1], case_id="p")])
        assert found["accuracy"] == {"value": 1.0, "interval_95": None}
        assert found["auc"]["interval_95"] is None

    def test_the_seed_decides(self, measure):
        rows = random_rows(60)
        assert measure(rows, seed=1) == measure(rows, seed=1)
        assert measure(rows, seed=1)["auc"]["interval_95"] != measure(rows, seed=2)["auc"]["interval_95"]

    def test_value_lies_within(self, measure):
        found = measure(random_rows(80))
        for name in ("accuracy", "balanced_accuracy", "auc"):
            low, high = found[name]["interval_95"]
            assert 0 <= low < found[name]["value"] < high <= 1


class TestClasses:
    def test_one_class_has_no_auc(self, measure):
        found = measure([row("a", [0.9, 0.1], classes="ab", slide_id=str(i)) for i in range(5)])
        assert found["auc"] == {"value": None, "interval_95": None}
        assert found["balanced_accuracy"]["value"] == 1.0

    def test_two_slides_of_two_classes(self, measure):
        """Half of the resamples have one class only; they say nothing of the AUC."""
        found = measure([row("a", [0.9, 0.1], classes="ab"), row("b", [0.1, 0.9], classes="ab")])
        assert found["auc"] == {"value": 1.0, "interval_95": (1.0, 1.0)}

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
        assert measure(rows, split="test")["accuracy"]["value"] == 1.0
        assert measure(rows, split="train")["accuracy"]["value"] == 0.0
        assert measure(rows)["accuracy"]["value"] == 0.5
        assert (measure(rows)["split"], measure(rows, split="train")["split"]) == ("all", "train")
        with pytest.raises(UsageError, match="split val: no predicted slide has a label; 0 slides"):
            measure(rows, split="val")

    @pytest.mark.parametrize("rows", [[FAILED], [row("", [1.0, 0.0, 0.0])]])
    def test_nothing_to_evaluate(self, measure, rows):
        with pytest.raises(UsageError, match="no predicted slide has a label; 1 slides are there"):
            measure(rows)
