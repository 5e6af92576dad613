"""A cross-validation from end to end: a run for each fold, and what several models say of a slide together."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from nested_ats.targets import Classes
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.folds import assign_folds, take_fold
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.data.splits import assign_splits
from pipeline.errors import UsageError
from pipeline.results.ensemble import MEMBERS, combine, predict_ensemble
from pipeline.results.evaluate import evaluate
from pipeline.results.intervals import area
from pipeline.results.predict import predict
from pipeline.results.predictions import read_predictions
from pipeline.runs import read_metrics, read_run
from pipeline.training import folds as module
from pipeline.training.folds import train_folds
from pipeline.training.train import train

FOLDS = 3


def weights(run, name="model"):
    return load_file(run / name / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_fold(entries, fold_count=FOLDS, **options):
    """The slides of each fold's training."""
    return {
        str(fold): take_fold(entries, str(fold), **{"validation": 0.0, "seed": 0, **options})
        for fold in range(fold_count)
    }


@pytest.fixture(scope="module")
def brief(config):
    return parse_config({**plain(config), "train": {**plain(config)["train"], "epochs": 2}}, "test")


@pytest.fixture(scope="module")
def entries(pyramids):
    """Fourteen slides in three folds, without a held-out test."""
    bare = [replace(entry, split="") for entry in read_manifest(pyramids)]
    return assign_folds(assign_splits(bare, validation=0, test=0, seed=0), FOLDS, seed=0)


@pytest.fixture(scope="module")
def study(brief, entries, tmp_path_factory):
    """Folder of the runs of all folds; nothing may change it."""
    folder = tmp_path_factory.mktemp("study") / "cv"
    assert [done.error for done in train_folds(by_fold(entries), brief, folder)] == [""] * FOLDS
    return folder


@pytest.fixture(scope="module")
def runs(study):
    return [study / f"fold-{fold}" for fold in range(FOLDS)]


def cli(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


class TestTraining:
    def test_each_fold_is_what_it_is_alone(self, brief, entries, study, tmp_path):
        train(by_fold(entries)["1"], brief, tmp_path / "alone")
        assert same(weights(tmp_path / "alone"), weights(study / "fold-1"))
        tested = [e["slide_id"] for run in study.iterdir() for e in read_run(run)["entries"] if e["split"] == "test"]
        assert sorted(tested) == sorted(entry.slide_id for entry in entries)

    def test_the_command(self, brief, entries, study, tmp_path):
        write_manifest(tmp_path / "study.csv", entries)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain(brief)))
        words = ["train", "--manifest", tmp_path / "study.csv", "--config", tmp_path / "c.yaml", "--out"]
        result = cli(*words, tmp_path / "cv", "--folds", "0,2")
        assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["fold 0", "fold 2"]
        assert sorted(path.name for path in (tmp_path / "cv").iterdir()) == ["fold-0", "fold-2"]
        assert same(weights(tmp_path / "cv/fold-2"), weights(study / "fold-2"))
        cli(*words, tmp_path / "one", "--fold", 2)
        assert same(weights(tmp_path / "one"), weights(study / "fold-2"))
        refused = cli(*words, tmp_path / "one", "--fold", "all", code=2)
        assert "one: holds a run; give the folds another --out" in refused.stderr
        assert "no fold 3; there are 0, 1, 2, or all" in cli(*words, tmp_path / "x", "--fold", 3, code=2).stderr
        look = cli(*words, tmp_path / "x", "--fold", "all", "--dry-run")
        assert "3 folds: what follows is of fold 0" in look.stderr
        assert not (tmp_path / "x").exists()

    def test_a_fold_without_a_class_fails_alone_and_is_named(self, brief, entries, tmp_path):
        """The only slide of its class is tested on in fold 1, and learned in the others."""
        rare = next(i for i, entry in enumerate(entries) if entry.fold == "1")
        entries = [replace(entry, label="rare") if i == rare else entry for i, entry in enumerate(entries)]
        write_manifest(tmp_path / "study.csv", entries)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain(brief)))
        words = ["train", "--manifest", tmp_path / "study.csv", "--config", tmp_path / "c.yaml", "--out"]
        result = cli(*words, tmp_path / "cv", "--folds", "all", "--set", "train.epochs=1", code=3)
        assert "fold 1: failed; the others go on" in result.stderr
        assert "1 of 3 failed" in result.stderr
        assert "labels of validation or test slides that no training slide has: rare" in result.stderr
        assert [(tmp_path / f"cv/fold-{fold}/model").exists() for fold in range(3)] == [True, False, True]

    def test_what_was_stopped_goes_on_and_what_is_finished_stays(self, brief, entries, study, tmp_path, monkeypatch):
        def stopped(slides, brief, place, **options):
            if place.name == "fold-1":
                raise KeyboardInterrupt
            return train(slides, brief, place, **options)

        monkeypatch.setattr(module, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            list(train_folds(by_fold(entries), brief, tmp_path / "cv"))
        assert sorted(path.name for path in (tmp_path / "cv").iterdir()) == ["fold-0"]
        lines = read_metrics(tmp_path / "cv/fold-0")
        monkeypatch.setattr(module, "train", train)
        done = list(train_folds(by_fold(entries), brief, tmp_path / "cv"))
        assert [result.fold for result in done] == ["0", "1", "2"]
        assert read_metrics(tmp_path / "cv/fold-0") == lines  # with its seconds: it was not trained again
        for fold in range(FOLDS):
            assert same(weights(tmp_path / f"cv/fold-{fold}"), weights(study / f"fold-{fold}"))

    @pytest.mark.ray
    @pytest.mark.slow
    def test_folds_side_by_side(self, brief, entries, study, tmp_path, ray_head):
        done = list(train_folds(by_fold(entries), brief, tmp_path / "cv", address="local", workers=2))
        assert [result.error for result in done] == [""] * FOLDS
        for fold in range(FOLDS):
            for name, tensor in weights(tmp_path / f"cv/fold-{fold}").items():
                torch.testing.assert_close(tensor, weights(study / f"fold-{fold}")[name], rtol=1e-3, atol=1e-5)


class TestBestEpoch:
    @pytest.mark.parametrize("figure", ["loss", "auc", "accuracy", "balanced_accuracy"])
    def test_it_is_kept_by_the_figure_beside_the_last(self, brief, entries, tmp_path, figure):
        """A run that ends with the best epoch has the same model."""
        chosen = plain(brief)["train"] | {"epochs": 4, "best_by": figure, "schedule": "constant", "entropy_fade": 0}
        chosen |= {"early_share": 1.0, "warmup": 0.0, "learning_rate": 0.02}
        slides = by_fold(entries, validation=0.4)["0"]
        train(slides, parse_config({**plain(brief), "train": chosen}, ""), tmp_path / "long")
        name = "val_cross_entropy" if figure == "loss" else f"val_{figure}"
        values = [line[name] for line in read_metrics(tmp_path / "long")]
        best = values.index((min if figure == "loss" else max)(values)) + 1
        train(slides, parse_config({**plain(brief), "train": chosen | {"epochs": best}}, ""), tmp_path / "short")
        assert same(weights(tmp_path / "long"), weights(tmp_path / "short", "last"))
        assert same(weights(tmp_path / "long"), weights(tmp_path / "long", "last")) == (best == 4)

    def test_without_validation_there_is_one_model(self, runs):
        assert not (runs[0] / "last").exists()

    @pytest.mark.parametrize(
        ("some", "message"), [(False, "there are none; set data.validation"), (True, "two classes")]
    )
    def test_a_figure_that_cannot_be_had(self, brief, entries, tmp_path, some, message):
        values = {**plain(brief), "train": {**plain(brief)["train"], "best_by": "auc"}}
        slides = [
            replace(entry, split="val") if some and entry.label == "bar" and i < 4 else entry
            for i, entry in enumerate(by_fold(entries)["0"])
        ]
        with pytest.raises(UsageError, match=f"train.best_by: auc needs validation slides.*{message}"):
            train(slides, parse_config(values, ""), tmp_path / "run")


class TestTogether:
    def test_the_mean_and_its_spread(self, entries, runs, tmp_path):
        rows = predict_ensemble(entries[:4], runs, tmp_path)
        assert read_predictions(tmp_path) == rows
        own = [read_predictions(tmp_path / MEMBERS / run.name) for run in runs]
        for i, row in enumerate(rows):
            each = np.array([[table[i][f"prob_{name}"] for name in ("bar", "box")] for table in own])
            assert [row["prob_bar"], row["prob_box"]] == pytest.approx(each.mean(0))
            assert [row["spread_bar"], row["spread_box"]] == pytest.approx(each.std(0, ddof=1))
            errors = [table[i]["se_bar"] for table in own]
            assert row["se_bar"] == pytest.approx(np.sqrt(np.square(errors).sum()) / 3)
            assert 0 <= row["low_bar"] <= row["prob_bar"] <= row["high_bar"] <= 1
            assert row["low_bar"] + row["high_box"] == pytest.approx(1)
            assert (row["models"], row["draws"], row["seen"]) == (3, 6, "train")
        assert len({row["model"] for row in rows}) == 1
        assert rows[0]["model"] not in {table[0]["model"] for table in own}

    def test_out_of_fold_each_slide_is_answered_by_the_model_that_has_not_seen_it(self, entries, runs, tmp_path):
        rows = predict_ensemble(entries, runs, tmp_path, out_of_fold=True)
        assert [row["slide_id"] for row in rows] == [entry.slide_id for entry in entries]
        assert {(row["seen"], row["models"], row["split"]) for row in rows} == {("", 1, "test")}
        for entry, row in zip(entries, rows, strict=True):
            own = {r["slide_id"]: r for r in read_predictions(tmp_path / MEMBERS / f"fold-{entry.fold}")}
            assert row["prob_bar"] == own[entry.slide_id]["prob_bar"]
            assert row["spread_bar"] is None
        metrics = evaluate(tmp_path)
        assert metrics["slides"] == len(entries)
        labels = np.array([["bar", "box"].index(entry.label) for entry in entries])
        assert metrics["auc"]["value"] == area(labels, np.array([[r["prob_bar"], r["prob_box"]] for r in rows]))

    def test_a_copy_of_a_training_slide_is_seen_under_any_name(self, entries, runs, tmp_path):
        """Its id, path and case are new; its pixels are those of a slide of fold 0."""
        entry = next(entry for entry in entries if entry.fold == "0")
        shutil.copytree(entry.path, tmp_path / "copy.ome.zarr")
        copy = Entry(slide_id="other", path=str(tmp_path / "copy.ome.zarr"), label=entry.label, case_id="new")
        seen = [predict([copy], run, tmp_path / run.name)[0]["seen"] for run in runs]
        assert seen == ["", "train", "train"]
        [row] = predict_ensemble([copy], runs, tmp_path / "oof", out_of_fold=True)
        assert (row["seen"], row["models"]) == ("", 1)
        assert "identity" not in row
        again = predict([copy], runs[1], tmp_path / runs[1].name)
        assert again[0]["seen"] == "train"

    def test_a_held_out_test_is_answered_by_all_and_folds_that_validated_are_seen(self, brief, entries, tmp_path):
        """Nested: every fold's slides were validated on by one model and trained on by the others."""
        held = [replace(entry, split="test", fold="") if i < 4 else entry for i, entry in enumerate(entries)]
        runs = [done.folder for done in train_folds(by_fold(held), brief, tmp_path / "cv")]
        rows = predict_ensemble(held, runs, tmp_path / "oof", out_of_fold=True)
        assert [(row["models"], row["seen"]) for row in rows[:4]] == [(3, "")] * 4
        assert [(row["models"], row["seen"]) for row in rows[4:]] == [(1, "val")] * 10
        assert evaluate(tmp_path / "oof")["slides"] == 4
        bare = [replace(entry, split="", label="") for entry in held]
        tested = predict_ensemble(bare, runs, tmp_path / "test", split="test")
        assert [(row["slide_id"], row["label"]) for row in tested] == [(e.slide_id, e.label) for e in held[:4]]

    def test_what_all_have_trained_on_is_not_answered_out_of_fold(self, brief, entries, finished, runs, tmp_path):
        slide = next(Entry(**row) for row in read_run(finished)["entries"] if row["split"] == "train")
        rows = predict_ensemble([slide], [finished], tmp_path, out_of_fold=True)
        assert rows[0]["status"] == "failed"
        assert rows[0]["error"] == "all models have trained on it; leave out --out-of-fold"

    def test_it_goes_on_where_it_was(self, entries, runs, tmp_path):
        rows = predict_ensemble(entries[:3], runs, tmp_path)
        results = sorted((tmp_path / MEMBERS).glob("*/parts/*.parquet"))
        assert len(results) == 9
        results[4].unlink()
        times = {path: path.stat().st_mtime_ns for path in results if path.exists()}
        again = predict_ensemble(entries[:3], runs, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert [row["prob_bar"] for row in again] == [row["prob_bar"] for row in rows]
        with pytest.raises(UsageError, match="holds predictions of other models or settings"):
            predict_ensemble(entries[:3], runs[:2], tmp_path)
        assert predict_ensemble(entries[:3], runs[:2], tmp_path, overwrite=True)[0]["models"] == 2

    def test_models_draw_apart(self, entries, runs, tmp_path):
        """The same model as two runs: equal seeds would give a spread of nothing, and an error too small."""
        shutil.copytree(runs[0], tmp_path / "a")
        run = json.loads((tmp_path / "a/run.json").read_text())
        (tmp_path / "a/run.json").write_text(json.dumps(run | {"config": run["config"] | {"seed": 99}}))
        [row] = predict_ensemble(entries[:1], [runs[0], tmp_path / "a"], tmp_path / "out")
        assert row["spread_bar"] > 0

    def test_a_failed_slide_names_the_model(self, entries, runs, tmp_path):
        [row] = predict_ensemble([Entry(slide_id="x", path=str(tmp_path / "gone.tif"))], runs, tmp_path / "out")
        assert row["status"] == "failed"
        assert row["error"].startswith("fold-0: ")

    def test_mistakes(self, brief, entries, runs, tmp_path):
        with pytest.raises(UsageError, match="a run is given twice"):
            predict_ensemble(entries, [runs[0], runs[0]], tmp_path)
        changed = [replace(entry, label=entry.label.upper()) for entry in by_fold(entries)["0"]]
        train(changed, brief, tmp_path / "other")
        with pytest.raises(UsageError, match=r"models of other answers \(classes bar, box and classes BAR, BOX\)"):
            predict_ensemble(entries, [runs[0], tmp_path / "other"], tmp_path / "out")
        named = [replace(entries[0], extra={"spread_bar": "1"})]
        with pytest.raises(UsageError, match="column spread_bar would be lost"):
            predict_ensemble(named, runs, tmp_path / "out")
        with pytest.raises(UsageError, match="--split val: no slide is in it"):
            predict_ensemble(entries, runs, tmp_path / "out", split="val")

    def test_the_command(self, entries, study, runs, tmp_path):
        bare = [replace(entry, split="", fold="", label="") for entry in entries]
        write_manifest(tmp_path / "slides.csv", bare)
        result = cli("predict", study, tmp_path / "slides.csv", "--out", tmp_path / "oof", "--out-of-fold")
        assert f"3 models: {runs[0]}, {runs[1]}, {runs[2]}" in result.stderr
        shown = cli("evaluate", tmp_path / "oof").stdout
        assert Counter(shown.split())["14"] == 1
        cli("predict", *runs[:2], tmp_path / "slides.csv", "--out", tmp_path / "two", "--draws", 1)
        assert {row["models"] for row in read_predictions(tmp_path / "two")} == {2}
        assert {row["se_bar"] for row in read_predictions(tmp_path / "two")} == {None}
        assert "give the slides behind the runs" in cli("predict", *runs, "--out", tmp_path / "x", code=2).stderr


def test_numbers_have_a_mean_too(brief, entries, tmp_path):
    """Folds learn other scales from their training slides, which are no other answers."""
    values = {**plain(brief), "target": {"kind": "regression", "column": "size"}}
    values["train"] = values["train"] | {"best_by": "mae"}
    sized = [replace(entry, label="", extra={"size": str(i * 1.5)}) for i, entry in enumerate(entries)]
    done = list(train_folds(by_fold(sized, validation=0.3), parse_config(values, ""), tmp_path / "cv"))
    assert [each.error for each in done] == [""] * FOLDS
    rows = predict_ensemble(sized[:3], [each.folder for each in done], tmp_path / "all")
    own = [read_predictions(tmp_path / "all" / MEMBERS / each.folder.name) for each in done]
    for i, row in enumerate(rows):
        answers = [table[i]["value"] for table in own]
        assert row["value"] == pytest.approx(np.mean(answers))
        assert row["spread_value"] == pytest.approx(np.std(answers, ddof=1))
        assert row["low_value"] <= row["value"] <= row["high_value"]
        assert row["prediction"] == f"{row['value']:.6g}"
    predict_ensemble(sized, [each.folder for each in done], tmp_path / "oof", out_of_fold=True)
    assert evaluate(tmp_path / "oof")["mae"]["value"] > 0


def test_cases_are_answered_out_of_fold_as_wholes(brief, entries, tmp_path):
    """Two slides of a case are one sample; a copy of one of them under another name and case is known."""
    paired = [replace(entry, case_id=f"p{i // 4}{i % 2}") for i, entry in enumerate(entries)]
    paired = assign_folds(paired, FOLDS, seed=0)
    values = {**plain(brief), "data": plain(brief)["data"] | {"unit": "case"}}
    values["model"] = values["model"] | {"prior": "valid"}
    done = list(train_folds(by_fold(paired), parse_config(values, ""), tmp_path / "cv"))
    assert [each.error for each in done] == [""] * FOLDS
    runs = [each.folder for each in done]
    rows = predict_ensemble(paired, runs, tmp_path / "oof", out_of_fold=True)
    assert sorted(row["slide_id"] for row in rows) == sorted({entry.case_id for entry in paired})
    assert {(row["seen"], row["models"], row["split"]) for row in rows} == {("", 1, "test")}
    copied = next(entry for entry in paired if entry.fold == "0")
    shutil.copytree(copied.path, tmp_path / "copy.ome.zarr")
    copy = Entry(slide_id="other", path=str(tmp_path / "copy.ome.zarr"), case_id="new")
    assert [predict([copy], run, tmp_path / run.name)[0]["seen"] for run in runs] == ["", "train", "train"]


def test_a_mean_of_one_is_that_one():
    row = {"prob_a": 0.2, "prob_b": 0.8, "se_a": 0.1, "se_b": 0.1, "low_a": 0.1, "low_b": 0.5, "high_a": 0.5}
    row |= {"high_b": 0.9, "draws": 4, "requests": 1, "bytes_read": 2, "seconds": 3.0, "entropy": 1.0}
    row |= {"uniform_entropy": 2.0, "background": None}
    found = combine([row], Classes(("a", "b")))
    assert {name: found[name] for name in row} == pytest.approx(row)
    assert found["prediction"] == "b"
    assert found["spread_a"] is None


def test_the_report_of_a_study(study, entries, tmp_path):
    """It has the training of every fold, and the models of all of them must have answered."""
    write_manifest(tmp_path / "study.csv", entries)
    cli("predict", study, tmp_path / "study.csv", "--out-of-fold", "--out", tmp_path / "oof")
    cli("evaluate", tmp_path / "oof")
    cli("report", study, tmp_path / "oof", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert [f'id="curve-cross_entropy-fold-{fold}"' in text for fold in range(FOLDS)] == [True] * FOLDS
    assert "<th scope=col>fold-0</th><th scope=col>fold-1</th><th scope=col>fold-2</th></tr>" in text
    assert "14 slides" in text
    refused = cli("report", study / "fold-0", tmp_path / "oof", "--out", tmp_path / "other.html", code=2)
    assert "predictions of another model than" in refused.output
    assert not (tmp_path / "other.html").exists()
