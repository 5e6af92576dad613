"""One answer of the answers to the slides of a case."""

import json

import pytest
from typer.testing import CliRunner

from nested_ats import Classes, Cox, MultiLabel, Regression
from pipeline.cli.app import app
from pipeline.config import parse_config
from pipeline.errors import UsageError
from pipeline.results.by_case import answer_cases, choose_how
from pipeline.results.evaluate import evaluate
from pipeline.results.table import write_table

TWO = Classes(("no", "yes"))
SIGN = {"entropy": 1.0, "uniform_entropy": 2.0, "background": None}


def config_of(raw=None):
    return parse_config({"target": raw or {}}, "").target


def slide(case, name, p, label="yes", **more):
    about = {
        "slide_id": name,
        "case_id": case,
        "label": label,
        "split": "test",
        "seen": "",
        "status": "ok",
        "error": "",
    }
    return {**about, "prediction": "", "prob_no": 1 - p, "prob_yes": p, **SIGN, **more}


ROWS = [slide("a", "a1", 0.2), slide("", "alone", 0.7, "no"), slide("a", "a2", 0.9), slide("a", "a3", 0.4)]


@pytest.mark.parametrize(("how", "wanted"), [("mean", 0.5), ("max", 0.9), ("noisy-or", 1 - 0.8 * 0.1 * 0.6)])
def test_two_classes(how, wanted):
    case, alone = answer_cases(ROWS, TWO, config_of(), how, "yes")
    assert (case["slide_id"], case["case_id"], case["label"]) == ("a", "a", "yes")
    assert (case["prob_yes"], case["prob_no"]) == pytest.approx((wanted, 1 - wanted))
    assert case["prediction"] == ("yes" if wanted > 0.5 else "no")
    assert alone == ROWS[1]
    other, _ = answer_cases(ROWS, TWO, config_of(), "max", "no")
    assert (other["prob_yes"], other["prob_no"]) == pytest.approx((0.2, 0.8))


def test_a_case_is_positive_if_a_slide_is():
    rows = [
        slide("a", "1", 0.2, "no"),
        slide("a", "2", 0.9, "yes"),
        slide("b", "3", 0.1, "no"),
        slide("b", "4", 0.2, "no"),
    ]
    found = answer_cases(rows, TWO, config_of(), "max", "yes")
    assert [row["label"] for row in found] == ["yes", "no"]
    with pytest.raises(UsageError, match="case a: .* in column label .no, yes.; take --by-case max"):
        answer_cases(rows, TWO, config_of(), "mean")


def test_labels_and_numbers():
    target, config = MultiLabel(("er", "pr")), config_of({"kind": "multilabel", "columns": ["er", "pr"]})
    rows = [
        {**slide("a", "1", 0), "er": "0", "pr": "", "prob_er": 0.1, "prob_pr": 0.5},
        {**slide("a", "2", 0), "er": "yes", "pr": "0", "prob_er": 0.7, "prob_pr": 0.5},
    ]
    [case] = answer_cases(rows, target, config, "noisy-or")
    assert (case["er"], case["pr"]) == ("yes", "0")
    assert (case["prob_er"], case["prob_pr"]) == pytest.approx((1 - 0.9 * 0.3, 0.75))
    numbers = [{**slide("a", str(i), 0), "label": "3", "value": float(i)} for i in range(3)]
    [case] = answer_cases(numbers, Regression(0.0, 1.0), config_of({"kind": "regression"}), "mean")
    assert case["value"] == 1.0


@pytest.mark.parametrize(
    ("target", "how", "positive", "reason"),
    [
        (TWO, "max", "", "give --positive, one of two classes .the model has no, yes"),
        (TWO, "noisy-or", "maybe", "give --positive"),
        (Classes(("a", "b", "c")), "max", "a", "give --positive, one of two"),
        (Cox(), "max", "", "the model answers no classes .cox.; take --by-case mean"),
    ],
)
def test_ways_that_are_not_for_a_target(target, how, positive, reason):
    with pytest.raises(UsageError, match=reason):
        answer_cases(ROWS, target, config_of(), how, positive)


def test_evaluate_counts_cases(tmp_path):
    sure = {(i, j): 0.9 if i % 2 and not j else 0.2 for i in range(12) for j in range(3)}
    rows = [slide(f"c{i}", f"{i}-{j}", p, ("no", "yes")[i % 2]) for (i, j), p in sure.items()]
    write_table(tmp_path, rows)
    assert evaluate(tmp_path)["accuracy"]["value"] == pytest.approx(24 / 36)
    assert evaluate(tmp_path)["slides"] == 36
    found = evaluate(tmp_path, by_case="max", positive="yes")
    assert (found["slides"], found["cases"], found["accuracy"]["value"]) == (12, 12, 1.0)
    said = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--by-case", "max", "--positive", "yes", "--json"])
    assert json.loads(said.output)["by_case"] == {"how": "max", "positive": "yes"}
    assert choose_how(None) is None
    with pytest.raises(UsageError, match="--by-case median: choose mean, max, noisy-or"):
        choose_how("median")
