"""Temperatures: the best one is found, kept with its model, applied to every probability, or left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError, UsageError
from pipeline.results.calibrate import calibrate, fit_temperature
from pipeline.results.measures import calibration_error
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.runs import CALIBRATION
from pipeline.training.train import train


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def sampled(rng, count, classes=3):
    """Logits, and labels that come as often as these say."""
    logits = rng.normal(0, 2, (count, classes))
    return logits, np.array([rng.choice(classes, p=row) for row in softmax(logits)])


class TestTemperature:
    @pytest.mark.parametrize("planted", [0.4, 1.0, 3.0])
    def test_a_planted_one_is_found(self, planted):
        logits, labels = sampled(np.random.default_rng(0), 4000)
        found = fit_temperature(logits * planted, labels)
        assert found == pytest.approx(planted, rel=0.08)
        before, after = (calibration_error(softmax(logits * scale), labels) for scale in (planted, planted / found))
        assert after < 0.03
        assert planted == 1.0 or after < before / 3

    def test_it_is_the_best(self):
        logits, labels = sampled(np.random.default_rng(1), 30)

        def cross_entropy(log_temperature):
            return -np.log(softmax(logits / np.exp(log_temperature))[np.arange(30), labels]).mean()

        best = minimize_scalar(cross_entropy, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        assert fit_temperature(logits, labels) == pytest.approx(np.exp(best.x), rel=1e-4)
        assert fit_temperature(logits + 7.0, labels) == pytest.approx(np.exp(best.x), rel=1e-4)

    def test_where_all_is_right_there_is_none(self):
        logits, _ = sampled(np.random.default_rng(2), 20)
        assert fit_temperature(logits, logits.argmax(1)) is None

    def test_answers_worse_than_guessing_are_flattened_within_bounds(self):
        logits, _ = sampled(np.random.default_rng(3), 20)
        assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(100)


def test_the_calibration_error_by_hand():
    """Three answers at 0.9, one of them wrong, and two at 0.6, both right: (3 |0.9 - 2/3| + 2 |0.6 - 1|) / 5."""
    sure = np.array([0.9, 0.9, 0.9, 0.6, 0.6])
    labels = np.array([0, 0, 1, 0, 0])
    assert calibration_error(np.stack([sure, 1 - sure], 1), labels) == pytest.approx((0.7 + 0.8) / 5)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


@pytest.fixture(scope="module")
def run(config, pyramids, tmp_path_factory):
    """A run with validation slides, some of which it answers wrongly."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    slides = [replace(e, split="val" if i < 6 else "train") for i, e in enumerate(read_manifest(pyramids))]
    values = {**plain(config), "train": plain(config)["train"] | {"epochs": 1}}
    train(slides, parse_config(values, ""), folder)
    return folder


class TestRun:
    @pytest.fixture
    def calibrated(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / CALIBRATION).unlink(missing_ok=True)
        return tmp_path / "run", calibrate(tmp_path / "run")

    def test_probabilities_are_those_of_divided_logits(self, calibrated, pyramids, tmp_path):
        run, found = calibrated
        slides = read_manifest(pyramids)[:3]
        after = predict(slides, run, tmp_path / "after")
        before = predict(slides, run, tmp_path / "before", uncalibrated=True)
        for old, new in zip(before, after, strict=True):
            odds = np.log([row["prob_bar"] / row["prob_box"] for row in (old, new)])
            assert odds[1] == pytest.approx(odds[0] / found["temperature"], abs=1e-4)
            assert new["low_bar"] <= new["prob_bar"] <= new["high_bar"]
            assert new["prediction"] == old["prediction"]

    def test_it_helps_on_its_slides(self, calibrated):
        _, found = calibrated
        assert found["slides"] == 6
        assert found["after"]["cross_entropy"] <= found["before"]["cross_entropy"]

    def test_it_is_fitted_to_what_is_not_calibrated(self, calibrated):
        run, found = calibrated
        assert calibrate(run) == found

    def test_earlier_predictions_are_not_mixed_with_it(self, run, pyramids, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        slides = read_manifest(pyramids)[:1]
        predict(slides, tmp_path / "run", tmp_path / "out")
        calibrate(tmp_path / "run")
        with pytest.raises(UsageError, match="holds predictions of another model or other settings"):
            predict(slides, tmp_path / "run", tmp_path / "out")
        predict(slides, tmp_path / "run", tmp_path / "out", uncalibrated=True)

    def test_a_model_that_was_trained_further_needs_another(self, calibrated):
        run, found = calibrated
        (run / CALIBRATION).write_text(json.dumps(found | {"model": "other"}))
        with pytest.raises(UsageError, match="before it was trained further; run nested-ats calibrate again"):
            prediction_settings(run)
        (run / CALIBRATION).write_text("[]")
        with pytest.raises(UsageError, match="damaged"):
            prediction_settings(run)
        assert prediction_settings(run, uncalibrated=True).temperature is None

    def test_what_cannot_be_calibrated(self, finished, run, monkeypatch):
        with pytest.raises(UsageError, match="no validation slides to calibrate by"):
            calibrate(finished)
        monkeypatch.setattr("pipeline.results.calibrate.fit_temperature", lambda *args: None)
        with pytest.raises(DataError, match="all 6 validation slides are answered rightly"):
            calibrate(run)

    def test_the_command(self, run, pyramids, tmp_path):
        for fold in (0, 1):
            shutil.copytree(run, tmp_path / f"cv/fold-{fold}")
        result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "cv")], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("by 6 slides; on these cross-entropy") == 2
        assert "6 validation slides hardly tell a temperature" in result.stderr
        assert (tmp_path / "cv/fold-1" / CALIBRATION).exists()
        refused = CliRunner().invoke(app, ["calibrate", str(tmp_path)], catch_exceptions=False)
        assert refused.exit_code == 2
