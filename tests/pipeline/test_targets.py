"""What slides are labelled with: tables and their faults, and signals that were planted, found for every target."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as peer
from sksurv.metrics import concordance_index_censored
from sksurv.nonparametric import kaplan_meier_estimator

from cluster import LocalContext
from nested_ats import Classes, Cox, DiscreteSurvival, MultiLabel, Ordinal, Regression
from pipeline.config import Config, parse_config, plain
from pipeline.data.manifest import Entry, plain_entries, write_manifest
from pipeline.data.selection import select
from pipeline.data.targets import check_table, is_known, learn_target, strata, truth
from pipeline.errors import UsageError
from pipeline.results.evaluate import evaluate
from pipeline.results.intervals import jackknife_interval
from pipeline.results.measures import brier, concordance, correlation, kaplan_meier, measure, quadratic_kappa, ranking
from pipeline.results.predict import predict
from pipeline.results.predictions import in_short
from pipeline.results.report import report
from pipeline.results.table import write_table
from pipeline.training.risks import RiskMemory
from pipeline.training.train import train
from pipeline.training.trainer import train_worker
from storage import write_pyramid

from .conftest import SMALL

TARGETS = {
    "ordinal": {"kind": "ordinal", "column": "grade", "order": ["low", "middle", "high"]},
    "multilabel": {"kind": "multilabel", "columns": ["red", "blue"]},
    "regression": {"kind": "regression", "column": "level"},
    "cox": {"kind": "cox"},
    "survival": {"kind": "survival", "intervals": 3},
}


def target_of(raw):
    return parse_config({"target": raw}, "").target


def entries_of(*rows):
    return [
        Entry(slide_id=f"s{i}", path=f"/{i}", label=row.pop("label", ""), split="train", extra=row)
        for i, row in enumerate(map(dict, rows))
    ]


class TestTables:
    @pytest.mark.parametrize(
        ("raw", "row", "reason"),
        [
            ({"kind": "regression", "column": "age"}, {}, "target.regression: the manifest has no column age"),
            ({"kind": "regression", "column": "age"}, {"age": ""}, "slide s1: age is missing"),
            ({"kind": "regression", "column": "age"}, {"age": "NaN"}, "slide s1: age is missing"),
            ({"kind": "regression", "column": "age"}, {"age": "old"}, "slide s1: age is 'old', not a number"),
            ({"kind": "regression", "column": "age"}, {"age": "inf"}, "slide s1: age is 'inf', not a number"),
            ({"kind": "cox"}, {"time": "3", "event": "2"}, "slide s1: event is '2', not 0 or 1"),
            ({"kind": "cox"}, {"time": "0", "event": "1"}, "slide s1: time is 0; times must be above 0"),
            ({"kind": "survival"}, {"time": "-1", "event": "x"}, "times must be above 0; slide s1: event is 'x'"),
            ({"kind": "cox"}, {"time": "soon", "event": "1"}, "slide s1: time is 'soon', not a number"),
            ({"kind": "cox"}, {"time": "3"}, "no column event"),
            ({"kind": "multilabel", "columns": ["a", "b"]}, {"a": "1", "b": "maybe"}, "b is 'maybe', not 0 or 1"),
            ({"kind": "multilabel", "columns": ["a", "b"]}, {"a": "", "b": "na"}, "slide s1: a, b is missing"),
        ],
    )
    def test_a_fault_is_named(self, raw, row, reason):
        good = {"age": "3,5", "time": "2.5", "event": "True", "a": "1.0", "b": ""}
        there = {name: value for name, value in good.items() if name in row}
        check_table(target_of(raw), entries_of(good))
        with pytest.raises(UsageError, match=reason):
            check_table(target_of(raw), entries_of(there, row))

    def test_not_more_than_ten_are_named(self):
        with pytest.raises(UsageError, match="slide s9.*; and 20 more; mend the table"):
            check_table(target_of({"kind": "regression", "column": "age"}), entries_of(*[{"age": "x"}] * 30))

    @pytest.mark.parametrize(
        ("raw", "rows", "reason"),
        [
            ({"kind": "regression"}, [{"label": "2"}] * 3, r"label is 2 for all 3 training slides"),
            ({"kind": "cox"}, [{"time": "1", "event": "0"}] * 3, "event is 1 for 0 training slides; at least two"),
            (
                {"kind": "ordinal"},
                [{"label": "low"}, {"label": "high"}],
                r"name the grades .* \(high, low",
            ),
            ({"kind": "ordinal", "order": ["a"]}, [{"label": "a"}, {"label": "b"}], "without a place: b"),
            ({"kind": "ordinal", "order": ["a", "b"]}, [{"label": "a"}] * 2, "two different labels"),
            (
                {"kind": "multilabel", "columns": ["a"]},
                [{"a": "1"}, {"a": ""}],
                "of a .* have only one",
            ),
        ],
    )
    def test_slides_to_learn_nothing_from(self, raw, rows, reason):
        with pytest.raises(UsageError, match=reason):
            learn_target(target_of(raw), entries_of(*rows))

    def test_what_is_learned_of_a_table(self):
        numbers = entries_of(*({"label": str(value)} for value in (10, 2, 30)))
        assert learn_target(target_of({"kind": "ordinal"}), numbers) == Ordinal(("2", "10", "30"))
        assert learn_target(target_of({}), numbers) == Classes(("10", "2", "30"))
        found = learn_target(target_of({"kind": "regression"}), numbers)
        assert found.plain == {"kind": "regression", "mean": 14.0, "std": pytest.approx(np.std([10, 2, 30]))}
        times = entries_of(*({"time": str(i), "event": str(i % 2)} for i in range(1, 21)))
        assert learn_target(target_of({"kind": "cox"}), times) == Cox()
        halves = learn_target(target_of({"kind": "survival", "intervals": 2}), times)
        assert halves == DiscreteSurvival((10.0, 19.0))  # the events are at 1, 3, ..., 19
        given_times = learn_target(target_of({"kind": "survival", "times": [5, 12.5]}), times)
        assert given_times == DiscreteSurvival((5.0, 12.5))

    def test_truths(self):
        labels = entries_of({"a": "1", "b": "no"}, {"a": "", "b": "true"})
        config = target_of({"kind": "multilabel", "columns": ["a", "b"]})
        found = truth(MultiLabel(("a", "b")), config, [entry.extra for entry in labels])
        assert str(found.tolist()) == "[[1.0, 0.0], [nan, 1.0]]"
        assert is_known(config, {"a": "", "b": "0"})
        assert not is_known(config, {"a": "", "b": "n/a"})
        assert is_known(target_of({}), {"label": "none"})  # which is the name of a class
        config = target_of({"kind": "cox", "time": "months", "event": "dead"})
        found = truth(Cox(), config, [{"months": "12,5", "dead": "1"}])
        assert found.tolist() == [[12.5, 1.0]]

    def test_every_stratum_gets_its_share_of_a_number(self, config, pyramids):
        """Each value is another, and rounding the share of each would leave nothing to test on."""
        entries = entries_of(*({"label": str(i)} for i in range(40)))
        found = strata(target_of({"kind": "regression"}), entries)
        assert sorted(found.count(name) for name in set(found)) == [10, 10, 10, 10]
        assert strata(target_of({"kind": "cox"}), entries_of({"time": "1", "event": "1"})) == ["1"]

    @pytest.mark.parametrize("raw", [{"class_weights": "balanced"}, {"sampling": "balanced"}])
    def test_balancing_is_for_classes(self, raw):
        with pytest.raises(UsageError, match="balance classes, and the target is cox"):
            parse_config({"train": raw, "target": {"kind": "cox"}}, "")


class TestMeasures:
    @given(st.integers(0, 10**6), st.integers(5, 60))
    def test_concordance_is_that_of_scikit_survival(self, seed, size):
        rng = np.random.default_rng(seed)
        times, events = rng.integers(1, 12, size).astype(float), rng.random(size) < 0.6
        risk = rng.integers(0, 6, size).astype(float)
        if concordance(times, events.astype(float), risk) is not None:
            wanted = concordance_index_censored(events, times, risk)[0]
            assert concordance(times, events.astype(float), risk) == pytest.approx(wanted)

    @given(st.integers(0, 10**6), st.integers(1, 40))
    def test_survival_is_that_of_scikit_survival(self, seed, size):
        rng = np.random.default_rng(seed)
        times, events = rng.integers(1, 12, size).astype(float), rng.random(size) < 0.6
        wanted = kaplan_meier_estimator(events, times)
        found = kaplan_meier(times, events.astype(float))
        assert [part.tolist() for part in found] == [pytest.approx(part.tolist()) for part in wanted]

    @given(st.integers(0, 10**6))
    def test_those_of_grades_and_numbers_are_scikit_learns(self, seed):
        rng = np.random.default_rng(seed)
        labels = np.concatenate([np.arange(4), rng.integers(0, 4, 30)])
        guesses = np.concatenate([np.arange(4), rng.integers(0, 4, 30)])
        wanted = peer.cohen_kappa_score(labels, guesses, weights="quadratic")
        assert quadratic_kappa(labels, guesses, 4) == pytest.approx(wanted)
        values, answers = rng.normal(size=20), rng.normal(size=20)
        found = measure(Regression(0.0, 1.0), values, answers[:, None], np.arange(20))
        assert found["mae"]["value"] == pytest.approx(peer.mean_absolute_error(values, answers))
        assert found["r2"]["value"] == pytest.approx(peer.r2_score(values, answers))
        assert found["pearson"]["value"] == pytest.approx(np.corrcoef(values, answers)[0, 1])

    def test_labels_that_are_not_known_do_not_count(self):
        truths = np.array([[1, 0], [0, np.nan], [1, 1], [0, 0], [np.nan, 1]])
        answers = np.array([[0.9, 0.2], [0.4, 0.9], [0.6, 0.7], [0.5, 0.1], [0.1, 0.3]])
        found = measure(MultiLabel(("a", "b")), truths, answers, np.arange(5))
        assert found["auc_a"]["value"] == found["auc_b"]["value"] == 1.0
        assert found["auc"]["value"] == 1.0
        assert found["accuracy"]["value"] == pytest.approx(7 / 8)  # b of the last slide

    def test_intervals_hold_their_measure_in_19_of_20_samples(self):
        """Of the correlation of two normals of correlation 0.6, of which the truth is known."""
        rng, inside = np.random.default_rng(0), 0
        for _ in range(400):
            one = rng.normal(size=60)
            other = 0.6 * one + 0.8 * rng.normal(size=60)
            both = (lambda rows, a=one, b=other: correlation(a[rows], b[rows]), np.arange(60))
            low, high = jackknife_interval(*both, "fisher")
            inside += low <= 0.6 <= high
        assert 0.91 < inside / 400 < 0.98

    def test_slides_of_a_case_count_as_one(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=30)
        answers = values + rng.normal(size=30)
        alone = measure(Regression(0.0, 1.0), values, answers[:, None], np.arange(30))["pearson"]["interval_95"]
        four = measure(Regression(0.0, 1.0), values.repeat(4), answers.repeat(4)[:, None], np.arange(30).repeat(4))[
            "pearson"
        ]["interval_95"]
        assert four == pytest.approx(alone, abs=0.02)

    def test_nothing_that_differs_is_undefined(self):
        same = measure(Regression(0.0, 1.0), np.ones(4), np.zeros((4, 1)), np.arange(4))
        assert same["mae"]["value"] == 1.0
        assert same["spearman"] == {"value": None, "interval_95": None, "method": ""}
        lost = measure(Cox(), np.array([[1.0, 0.0], [2.0, 0.0]]), np.zeros((2, 1)), np.arange(2))
        assert lost["concordance"]["value"] is None
        assert measure(Cox(), np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([[1.0], [0.0]]), np.zeros(2, int)) == {
            "concordance": {"value": 1.0, "interval_95": None, "method": ""}
        }

    def test_brier_scores_without_censoring_are_mean_squares(self):
        target = DiscreteSurvival((1.0, 2.0, 9.0))
        outcomes = np.array([[0.5, 1], [1.5, 1], [2.5, 1], [3.5, 1]])
        answers = np.array([[0.4, 0.2, 0.1], [0.9, 0.3, 0.1], [0.8, 0.7, 0.1], [1.0, 0.9, 0.1]])
        found = brier(target, outcomes, answers)
        alive = outcomes[:, :1] > np.array([[1.0, 2.0]])
        assert found[:2] == pytest.approx(((alive - answers[:, :2]) ** 2).mean(0).tolist())
        assert np.isnan(found[2])  # no slide is seen until then

    @pytest.mark.parametrize(
        ("target", "answers", "words"),
        [
            (Classes(("a", "b")), [0.2, 0.8], "b"),
            (MultiLabel(("a", "b", "c")), [0.6, 0.2, 0.9], "a;c"),
            (MultiLabel(("a", "b")), [0.1, 0.2], "none"),
            (Regression(0.0, 1.0), [1.2345678], "1.23457"),
            (DiscreteSurvival((12.0, 24.0)), [0.7, 0.4], "24"),
            (DiscreteSurvival((12.0, 24.0)), [0.7, 0.6], "over 24"),
        ],
    )
    def test_in_short(self, target, answers, words):
        assert in_short(target, answers) == words


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """48 slides with a square whose brightness all tables tell of, and a second one of another colour in half."""
    folder, rng, entries = tmp_path_factory.mktemp("planted"), np.random.default_rng(0), []
    for i in range(48):
        level = (i * 19 % 48) / 47
        blue = i // 3 % 2
        pixels = rng.integers(0, 30, (3, 144, 144), dtype=np.uint8)
        y, x = rng.integers(8, 80, 2)
        pixels[0, y : y + 56, x : x + 56] = 80 + 170 * level
        if blue:
            y, x = rng.integers(8, 80, 2)
            pixels[2, y : y + 56, x : x + 56] = 240
        path = folder / f"slide {i}.ome.zarr"
        write_pyramid(path, pixels, mpp=0.5)
        extra = {
            "grade": ("low", "middle", "high")[min(int(level * 3), 2)],
            "level": f"{level * 10 + 5:.3f}",
            "red": str(int(level > 0.5)) if i % 5 else "",
            "blue": str(blue),
            "time": f"{1 + 30 * np.exp(-3 * level):.3f}",
            "event": str(int(i % 4 > 0)),
        }
        split = "test" if i % 3 == 0 else "train"
        entries.append(Entry(slide_id=f"slide {i}", path=str(path), split=split, extra=extra))
    write_manifest(folder / "manifest.csv", entries)
    return entries


def settings(raw, **course) -> Config:
    levels = [
        {"downsample": 4, "samples": 4, "stride": 4, "channels": [4]},
        {"downsample": 2, "samples": 6, "size": 16, "stride": 4, "channels": [4]},
    ]
    course = {"epochs": 20, "batch_size": 6, "learning_rate": 0.005, "early_samples": 2, **course}
    course["entropy_weight"] = 0
    model = {"levels": levels, "patch_size": 24, "features": 16}
    return parse_config({**SMALL, "model": model, "target": raw, "train": course}, "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_a_planted_signal_is_found_and_reported(kind, cohort, tmp_path):
    fitted, failures = train(cohort, settings(TARGETS[kind]), tmp_path / "run")
    assert failures == []
    rows = predict([entry for entry in cohort if entry.split == "test"], tmp_path / "run", tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"}
    found = evaluate(tmp_path / "out")
    by = ranking(learn_target(target_of(TARGETS[kind]), cohort))
    assert found[by.name]["value"] > by.chance + 0.3, found
    assert found["verdict"] == fitted["verdict"] == ""
    assert found["slides"] == 16
    text = report(tmp_path / "run", tmp_path / "out", tmp_path / "page.html").read_text()
    assert by.name.replace("_", " ") in text
    plot = {"ordinal": "calibration", "regression": "scatter", "cox": "survival", "survival": "survival"}.get(kind)
    assert plot is None or f'id="{plot}"' in text  # truth against answers
    assert 'id="curve-entropy-run"' in text
    if kind == "survival":
        assert "Brier score at " in text
        survival = [name for name in rows[0] if name.startswith("prob_survival_")]
        assert len(survival) == 3
        assert all(row[survival[0]] >= row[survival[1]] >= row[survival[2]] for row in rows)
    if kind == "regression":
        assert all(row["low_value"] <= row["value"] <= row["high_value"] for row in rows)
    if kind == "ordinal":
        assert found["quadratic_kappa"]["value"] > 0.5
        assert found["classes"] == ["low", "middle", "high"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["cox", "regression"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(kind, cohort, tmp_path):
    """The remembered risks are part of its state."""
    config = settings(TARGETS[kind], epochs=3)
    chosen = select(cohort, config, fail_fast=True)
    arguments = {
        "config": plain(config),
        "entries": plain_entries([entry for entry in cohort if entry.split == "train"]),
        "target": chosen.target.plain,
        "channels": 3,
    }

    def stop(done, total, words):
        if done == 8:  # of six steps in each epoch
            raise Stop

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, _ = train_worker(LocalContext(), {**arguments, "folder": str(tmp_path / "whole")})
    with pytest.raises(Stop):
        train_worker(LocalContext(), {**arguments, "folder": str(tmp_path / "cut")}, stop)
    mended, _ = train_worker(LocalContext(), {**arguments, "folder": str(tmp_path / "cut")})
    del whole["seconds"], mended["seconds"]
    assert mended == whole


def test_another_column_is_another_run(cohort, tmp_path):
    """What slides are labelled with decides a run, whatever column it stands in."""
    config = settings(TARGETS["regression"], epochs=1)
    train(cohort, config, tmp_path)
    changed = [replace(entry, extra={**entry.extra, "level": entry.extra["level"] + "1"}) for entry in cohort]
    with pytest.raises(UsageError, match="a run of another configuration or of other slides"):
        train(changed, config, tmp_path)
    other = [replace(entry, extra={**entry.extra, "grade": "high"}) for entry in cohort]
    train(other, config, tmp_path)  # that one does not count


def test_predictions_of_before_are_of_classes(cohort, tmp_path):
    """Their predict.json says nothing of a target."""
    (tmp_path / "predict.json").write_text(json.dumps({"class_shares": {"a": 0.5, "b": 0.5}}))
    rows = [
        {"slide_id": str(i), "case_id": "", "label": "ab"[i % 2], "split": "", "seen": "", "prediction": "a"}
        | {"prob_a": 0.6 + 0.1 * (i % 2 == 0), "prob_b": 0.4 - 0.1 * (i % 2 == 0), "status": "ok", "error": ""}
        for i in range(6)
    ]
    write_table(tmp_path, rows)
    found = evaluate(tmp_path)
    assert found["target"] == {"kind": "classes", "classes": ["a", "b"]}
    assert found["accuracy"]["value"] == 0.5


def test_all_workers_remember_the_same_risks():
    """What each of two workers kept is known to both."""
    entries = entries_of(*({"time": str(i + 1), "event": "1"} for i in range(4)))
    config = target_of({"kind": "cox"})
    memories = [RiskMemory(config, entries) for _ in range(2)]
    memories[0].keep(entries[:1], torch.tensor([0.5]))
    memories[1].keep(entries[3:], torch.tensor([-1.0]))

    class Both(LocalContext):
        def all_reduce(self, tensor):
            tensor.copy_(total)

    total = memories[0]._new + memories[1]._new
    for memory in memories:
        memory.gather(Both())
        assert memory.log_risks.tolist() == [0.5, 0.0, 0.0, -1.0]
    # By hand: at time 2 the events at 1 and 2 have happened.
    at_risk = [np.exp(0.5) + 2 + np.exp(-1), 2 + np.exp(-1)]
    hazard, event = memories[0].truth(torch.tensor([[2.0, 0.0]], dtype=torch.float64))[0].tolist()
    assert (hazard, event) == pytest.approx((1 / at_risk[0] + 1 / at_risk[1], 0.0))
