"""Thresholds are chosen on validation slides, kept with the model, and decide what is answered and counted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from nested_ats import Classes, DiscreteSurvival, MultiLabel, Regression
from pipeline.cli.app import app
from pipeline.errors import DataError, UsageError
from pipeline.results.ensemble import _resampled, common_target
from pipeline.results.evaluate import evaluate
from pipeline.results.measures import measure
from pipeline.results.predictions import in_short, read_predictions
from pipeline.results.thresholds import choose_thresholds, decisive

TWO, LABELS = Classes(("no", "yes")), MultiLabel(("a", "b"))


def both(yes):
    return np.stack([1 - np.asarray(yes), np.asarray(yes)], 1)


class TestChoice:
    def test_youden_is_the_best_of_all(self):
        rng = np.random.default_rng(0)
        truth = rng.integers(0, 2, 60).astype(float)
        yes = np.clip(0.25 * truth + rng.uniform(0, 0.5, 60), 0, 1)
        [(name, found)] = choose_thresholds(TWO, truth, both(yes), ["youden"]).items()
        assert name == "yes"

        def gain(at):
            return (yes[truth > 0] > at).mean() - (yes[truth == 0] > at).mean()

        assert gain(found) == max(gain(at) for at in np.linspace(0, 1, 4001))

    def test_labels_have_one_each_and_unknown_ones_do_not_count(self):
        truth = np.array([[0, 1], [1, np.nan], [0, 0], [1, 1]], float)
        answers = np.array([[0.1, 0.3], [0.3, 0.01], [0.2, 0.1], [0.9, 0.2]])
        found = choose_thresholds(LABELS, truth, answers, ["youden", "b=0.7"])
        assert found == {"a": pytest.approx(0.25), "b": 0.7}

    @pytest.mark.parametrize(("wanted", "threshold"), [("yes=0.3", 0.3), ("no=0.3", 0.7)])
    def test_one_that_is_given_is_of_either_class(self, wanted, threshold):
        assert choose_thresholds(TWO, np.zeros(0), np.zeros((0, 2)), [wanted]) == {"yes": pytest.approx(threshold)}

    @pytest.mark.parametrize("wanted", ["0.3", "maybe=0.3", "yes=1", "yes=much", "yes=nan"])
    def test_one_that_means_nothing_is_refused(self, wanted):
        with pytest.raises(UsageError, match="give youden, or a label"):
            choose_thresholds(TWO, np.zeros(0), np.zeros((0, 2)), [wanted])

    @pytest.mark.parametrize("target", [Regression(0, 1), Classes(("a", "b", "c"))])
    def test_targets_without_a_yes_or_no_are_refused(self, target):
        with pytest.raises(UsageError, match="two classes or several labels"):
            choose_thresholds(target, np.zeros(2), np.zeros((2, 3)), ["youden"])

    def test_slides_of_one_class_tell_none(self):
        with pytest.raises(DataError, match="all yes"):
            choose_thresholds(TWO, np.ones(3), both([0.1, 0.2, 0.3]), ["youden"])


def test_what_is_answered_changes_at_the_threshold_and_the_ranking_does_not():
    yes = np.linspace(0.01, 0.99, 99)
    changed = decisive(TWO, both(yes), {"yes": 0.2})
    assert ((changed[:, 1] > 0.5) == (yes > 0.2 + 1e-9)).all()
    assert (np.diff(changed[:, 1]) > 0).all()
    assert np.allclose(changed.sum(1), 1)
    assert [in_short(TWO, [1 - p, p], {"yes": 0.2}) for p in (0.1, 0.3)] == ["no", "yes"]
    assert in_short(LABELS, [0.3, 0.6], {"a": 0.2, "b": 0.7}) == "a"
    labels, cases = (yes > 0.4).astype(float), np.arange(99)
    plain, moved = (measure(TWO, labels, each, cases) for each in (both(yes), changed))
    assert plain["auc"] == moved["auc"]
    assert moved["accuracy"]["value"] == pytest.approx(np.mean((yes > 0.2 + 1e-9) == (yes > 0.4)))


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_it_is_kept_with_the_model_and_used_by_all_commands(finished, pyramids, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    about = json.loads((place / "run.json").read_text())
    for row in about["entries"]:
        row["split"] = "val" if row["split"] == "test" else row["split"]
    (place / "run.json").write_text(json.dumps(about))
    told = json.loads(run("calibrate", place, "--threshold", "box=0.999", "--json").stdout)
    assert told["runs"][0]["thresholds"] == {"box": 0.999}
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    run("predict", place, pyramids, "--split", "test", "--out", plain, "--no-calibration")
    run("predict", place, pyramids, "--split", "test", "--out", moved)
    assert {row["prediction"] for row in read_predictions(moved)} == {"bar"}
    shown = run("evaluate", moved, "--include-seen").stdout
    assert "answered from" in shown
    assert "box 0.999" in shown
    assert json.loads((moved / "metrics.json").read_text())["confusion"] == [[2, 0], [2, 0]]
    assert evaluate(plain, include_seen=True)["thresholds"] == {}
    assert "box from a probability of 0.999 on" in run("model", "card", place).stdout


def test_figures_by_a_column_are_those_of_its_slides_alone(finished, pyramids, tmp_path):
    lines = pyramids.read_text().splitlines()
    rows = [
        f"{line},{('site', 'A', 'B')[min(number, 1) + (number % 3 == 0 < number)]}"
        for number, line in enumerate(lines)
    ]
    table = tmp_path / "sites.csv"
    table.write_text("\n".join(rows).replace(",slide ", f",{pyramids.parent}/slide ") + "\n")
    run("predict", finished, table, "--out", tmp_path / "all")
    found = json.loads(run("evaluate", tmp_path / "all", "--include-seen", "--by", "site", "--json").stdout)
    groups = found["by"]["groups"]
    assert sum(group["slides"] for group in groups.values()) == found["slides"] == 14
    answered = read_predictions(tmp_path / "all")
    for site, group in groups.items():
        own = [row["prediction"] == row["label"] for row in answered if row["site"] == site]
        assert group["accuracy"]["value"] == pytest.approx(np.mean(own))
        assert len(group["accuracy"]["interval_95"]) == 2
    assert "site A" in run("evaluate", tmp_path / "all", "--include-seen", "--by", "site").stdout
    run("evaluate", tmp_path / "all", "--include-seen", "--by", "ward", code=2)


class TestFoldsOfSurvival:
    def test_the_common_times_lie_within_what_every_model_knows(self):
        one, other = DiscreteSurvival((2.0, 5.0, 9.0)), DiscreteSurvival((3.0, 4.0))
        assert common_target([one, other]) == DiscreteSurvival((2.0, 4.0))
        assert common_target([one, one]) is one
        assert common_target([one, TWO]) is None

    def test_between_its_times_a_curve_is_straight(self):
        own, common = DiscreteSurvival((2.0, 6.0)), DiscreteSurvival((1.0, 4.0))
        cells = {"prob": (0.8, 0.4), "se": (0.1, 0.2), "low": (0.7, 0.2), "high": (0.9, 0.6)}
        row = {f"{name}_{time}": p for name, both in cells.items() for time, p in zip(own.names, both, strict=True)}
        found = _resampled({"draws": 4, **row}, own, common)
        assert found == pytest.approx(
            {
                "draws": 4,
                "prob_survival_1": 0.9,
                "prob_survival_4": 0.6,
                "se_survival_1": 0.05,
                "se_survival_4": 0.15,
                "low_survival_1": 0.85,
                "low_survival_4": 0.45,
                "high_survival_1": 0.95,
                "high_survival_4": 0.75,
            }
        )
