"""Runs side by side: what differs is listed, and two models are compared on the same slides by paired figures."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from nested_ats.targets import Regression
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.results.compare import compare
from pipeline.results.ensemble import predict_ensemble
from pipeline.results.evaluate import evaluate
from pipeline.results.listing import list_runs
from pipeline.results.predict import predict
from pipeline.results.predictions import ABOUT
from pipeline.results.table import write_table
from pipeline.training.train import train

FIGURES = ("auc", "accuracy", "balanced_accuracy", "cross_entropy")


def write(folder, labels, scores, cases=None, seen=None, classes="ab"):
    """Predictions of two classes whose second has these probabilities."""
    folder.mkdir(parents=True)
    rows = []
    for i, (label, score) in enumerate(zip(labels, scores, strict=True)):
        row = {"slide_id": f"s{i}", "case_id": cases[i] if cases else "", "label": label, "split": "test"}
        row |= {"seen": seen[i] if seen else "", f"prob_{classes[0]}": 1 - score, f"prob_{classes[1]}": score}
        rows.append(row | {"status": "ok", "error": ""})
    write_table(folder, rows)
    return folder


def write_numbers(folder, true, answers):
    """Predictions of a number."""
    folder.mkdir()
    rows = [
        {"slide_id": f"s{i}", "case_id": "", "label": repr(float(t)), "split": "test", "seen": "", "value": float(a)}
        for i, (t, a) in enumerate(zip(true, answers, strict=True))
    ]
    write_table(folder, [row | {"status": "ok", "error": ""} for row in rows])
    about = {"target": Regression(0.0, 1.0).plain, "told_by": {"kind": "regression"}}
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def two_models(rng, count, better=0.0):
    """Labels, and probabilities of two models whose errors go together."""
    labels = rng.integers(0, 2, count)
    shared = rng.normal(0, 1, count) + 1.2 * labels
    scores = [1 / (1 + np.exp(-(shared + gain * labels + rng.normal(0, 0.7, count)))) for gain in (0.0, better)]
    return ["ab"[label] for label in labels], scores


def delong(labels, one, other):
    """The variance of a difference of areas as in the paper: covariances of placement values, slide by slide."""
    positive = np.array([label == "b" for label in labels])
    placed = []
    for scores in (one, other):
        wins = (scores[positive][:, None] > scores[~positive]) + 0.5 * (
            scores[positive][:, None] == scores[~positive]
        )
        placed.append((wins.mean(1), wins.mean(0)))
    covariance = sum(np.cov(placed[0][side], placed[1][side]) / len(placed[0][side]) for side in (0, 1))
    return covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]


class TestCompare:
    def test_the_area_has_delongs_variance(self, tmp_path):
        labels, (one, other) = two_models(np.random.default_rng(0), 80, better=0.6)
        found = compare(write(tmp_path / "a", labels, one), write(tmp_path / "b", labels, other))
        error = math.sqrt(delong(labels, one, other))
        low, high = found["auc"]["interval_95"]
        assert high - low == pytest.approx(2 * 1.959964 * error, rel=1e-6)
        z = found["auc"]["difference"] / error
        assert found["auc"]["p"] == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-9)
        assert found["slides"] == found["cases"] == 80

    def test_it_is_as_sure_as_it_says(self, tmp_path):
        """Of equal models about one pair in twenty has an interval that leaves out 0; of unequal ones most do."""
        rng, misses, found = np.random.default_rng(1), dict.fromkeys(FIGURES, 0), dict.fromkeys(FIGURES, 0)
        for trial in range(60):
            for better, counts in ((0.0, misses), (1.2, found)):
                labels, scores = two_models(rng, 100, better)
                a, b = (write(tmp_path / f"{trial} {better} {i}", labels, each) for i, each in enumerate(scores))
                result = compare(a, b)
                for name in FIGURES:
                    low, high = result[name]["interval_95"]
                    counts[name] += not low <= 0 <= high
        assert all(count <= 9 for count in misses.values()), misses  # P(> 9) is 0.1 % at the nominal 5 %
        assert found["auc"] >= 40

    def test_slides_of_a_case_count_as_they_agree(self, tmp_path):
        """Each slide four times in one case says no more than once."""
        labels, (one, other) = two_models(np.random.default_rng(2), 60, better=0.5)
        once = compare(write(tmp_path / "a", labels, one), write(tmp_path / "b", labels, other))
        cases = [f"p{i}" for i in range(60)] * 4
        many = compare(
            write(tmp_path / "c", labels * 4, np.tile(one, 4), cases),
            write(tmp_path / "d", labels * 4, np.tile(other, 4), cases),
        )
        assert (many["slides"], many["cases"]) == (240, 60)
        for name in FIGURES:
            assert many[name]["values"] == pytest.approx(once[name]["values"])
            assert many[name]["interval_95"] == pytest.approx(once[name]["interval_95"], abs=0.02)

    def test_equal_models_do_not_differ(self, tmp_path):
        labels, (one, _) = two_models(np.random.default_rng(3), 40)
        found = compare(write(tmp_path / "a", labels, one), write(tmp_path / "b", labels, one))
        for name in FIGURES:
            assert found[name]["difference"] == 0
            assert found[name]["interval_95"] == [0, 0]
            assert found[name]["p"] == 1

    def test_what_both_have_not_seen_counts(self, tmp_path):
        labels, (one, other) = two_models(np.random.default_rng(4), 30)
        a = write(tmp_path / "a", labels, one, seen=["train"] * 5 + [""] * 25)
        b = write(tmp_path / "b", labels[:20], other[:20], seen=[""] * 18 + ["val"] * 2)
        assert compare(a, b)["slides"] == 13
        assert compare(a, b, include_seen=True)["slides"] == 20

    def test_slides_of_one_class_have_no_area(self, tmp_path):
        a, b = (write(tmp_path / name, ["a"] * 9, np.linspace(0.1, 0.9, 9)) for name in "ab")
        assert compare(a, b)["auc"] is None

    def test_numbers_are_compared_by_their_ranks(self, tmp_path):
        """Of two models that are equally good few pairs differ; one that hardly follows the truth is found out."""
        rng, outside = np.random.default_rng(6), 0
        for trial in range(40):
            true = rng.normal(0, 1, 60)
            numbers = [true + rng.normal(0, spread, 60) for spread in (1.0, 1.0, 6.0)]
            folders = [write_numbers(tmp_path / f"{trial} {i}", true, each) for i, each in enumerate(numbers)]
            found = compare(folders[0], folders[1])
            assert found["figures"] == ["spearman"]
            low, high = found["spearman"]["interval_95"]
            outside += not low <= 0 <= high
            assert found["spearman"]["values"][0] == pytest.approx(spearmanr(true, numbers[0]).statistic)
            worse = compare(folders[0], folders[2])["spearman"]
            assert worse["interval_95"][1] < 0
            assert worse["p"] < 0.05
        assert outside <= 7  # P(> 7) is 0.1 % at the nominal 5 %

    def test_mistakes(self, tmp_path):
        labels, (one, other) = two_models(np.random.default_rng(5), 10)
        a = write(tmp_path / "a", labels, one)
        with pytest.raises(UsageError, match="predictions of other classes"):
            compare(a, write(tmp_path / "b", ["c"] * 10, other, classes="cd"))
        flipped = ["ab"[name == "a"] for name in labels]
        with pytest.raises(UsageError, match="10 slides have two labels: s0, s1"):
            compare(a, write(tmp_path / "c", flipped, other))
        numbers = write_numbers(tmp_path / "n", np.arange(10.0), np.arange(10.0))
        with pytest.raises(UsageError, match="another target cannot be compared"):
            compare(a, numbers)
        with pytest.raises(UsageError, match="no slide is in both"):
            compare(a, write(tmp_path / "d", labels, other, seen=["train"] * 10))
        strange = [write(tmp_path / name, ["x"] * 10, one) for name in "ef"]
        with pytest.raises(UsageError, match="labels the model does not know: x"):
            compare(*strange)


@pytest.fixture(scope="module")
def folder(config, pyramids, finished, tmp_path_factory):
    """Two runs with their tests, one of both together, and a run that is not finished."""
    place = tmp_path_factory.mktemp("runs")
    slides = read_manifest(pyramids)
    shutil.copytree(finished, place / "first")
    values = plain(config)
    values |= {"seed": 7, "train": values["train"] | {"epochs": 2, "learning_rate": 0.01}}
    train(slides, parse_config(values, ""), place / "deeper/second")
    shutil.copytree(place / "deeper/second", place / "third")
    shutil.rmtree(place / "third/model")
    tested = [entry for entry in slides if entry.split == "test"]
    for run in ("first", "deeper/second"):
        predict(tested, place / run, place / run / "test")
        evaluate(place / run / "test")
    predict_ensemble(tested, [place / "first", place / "deeper/second"], place / "both")
    evaluate(place / "both")
    (place / "metrics.json").write_text("[]")
    return place


class TestListing:
    def test_runs_and_what_differs(self, folder):
        listed = list_runs(folder)
        second, first, third = listed["runs"]
        assert first["settings"] == {"seed": 3, "train.epochs": 3, "train.learning_rate": 1e-3}
        assert second["settings"] == {"seed": 7, "train.epochs": 2, "train.learning_rate": 1e-2}
        assert (first["epochs"], first["planned"], first["finished"]) == (3, 3, True)
        assert not third["finished"]
        assert first["slides"] == {"train": 10, "test": 4}
        [test] = first["tests"]
        assert test["predictions"] == str(folder / "first/test")
        own = evaluate(folder / "first/test")["auc"]
        assert test["figures"]["auc"] == {"value": own["value"], "interval_95": list(own["interval_95"])}
        assert [other["predictions"] for other in listed["others"]] == [str(folder / "both")]

    def test_the_command(self, folder):
        def run(*words):
            result = CliRunner().invoke(app, ["runs", *map(str, words)], catch_exceptions=False)
            return result.stdout if not result.exit_code else result.stderr

        shown = run(folder)
        assert f"{folder}/first: finished, 3 of 3 epochs; 10 train, 4 test" in shown
        assert "seed 7, train.epochs 2, train.learning_rate 0.01" in shown
        assert "third: not finished" in shown
        assert f"of several models, or of others: {folder}/both: 4 slides, split test: accuracy" in shown
        assert json.loads(run(folder, "--json")) == list_runs(folder)
        compared = run(folder, "--compare", "first/test", folder / "both")
        assert compared.startswith(f"4 slides of 4 cases: {folder}/first/test, {folder}/both")
        assert "DeLong's variance over cases" in compared
        assert json.loads(run(folder, "--compare", "first/test", "both", "--json"))["slides"] == 4
        assert "no training run here or below" in run(folder / "both")

    def test_the_best_epoch_is_shown(self, config, pyramids, tmp_path):
        slides = read_manifest(pyramids)
        values = {**plain(config), "data": plain(config)["data"] | {"validation": 0.3, "test": 0.0}}
        values["train"] = values["train"] | {"best_by": "accuracy"}
        train([replace(entry, split="") for entry in slides], parse_config(values, ""), tmp_path / "run")
        [run] = list_runs(tmp_path)["runs"]
        assert 1 <= run["validation"]["epoch"] <= 3
        assert run["validation"]["val_accuracy"] >= 0
