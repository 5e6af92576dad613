"""Predicting: each slide once, nothing of another model mixed in, and what finished is kept."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

import cluster
from nested_ats import ModelFileError, NestedATS, checkpoint, load_model, save_model
from nested_ats.networks.weights import read_tensors
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.data.splits import RunSplits
from pipeline.errors import UsageError
from pipeline.files import file_name
from pipeline.results import classifier as module
from pipeline.results.classifier import Classifier
from pipeline.results.evaluate import evaluate
from pipeline.results.parts import part_files
from pipeline.results.predict import predict
from pipeline.results.predictions import LOCK, read_predictions
from pipeline.results.report import report
from pipeline.results.settings import prediction_settings
from pipeline.results.table import write_table
from pipeline.runs import read_run
from pipeline.training.train import train
from storage import write_pyramid
from storage.place.locks import locked

COLUMNS = ["slide_id", "case_id", "label", "split", "seen", "prediction", "prob_bar", "prob_box", "se_bar", "se_box"]
COLUMNS += ["low_bar", "low_box", "high_bar", "high_box", "draws", "entropy", "uniform_entropy", "background"]
COLUMNS += ["requests", "bytes_read", "seconds"]
COLUMNS += ["model", "status", "error"]


@pytest.fixture(scope="module")
def entries(pyramids):
    return [entry for entry in read_manifest(pyramids) if entry.split == "test"]


@pytest.fixture(scope="module")
def rows(finished, entries, tmp_path_factory):
    return predict(entries, finished, tmp_path_factory.mktemp("rows"))


@pytest.fixture
def worked(monkeypatch):
    """Ids of the slides that are classified, in order."""
    ids = []
    original = Classifier.__call__

    def spy(self, entry):
        ids.append(entry.slide_id)
        return original(self, entry)

    monkeypatch.setattr(Classifier, "__call__", spy)
    return ids


def numbers(rows):
    """Columns that are computed, without those that were measured."""
    return [
        [row["prediction"], *(v for k, v in row.items() if k.startswith(("prob_", "se_", "low_", "high_")))]
        for row in rows
    ]


class TestTable:
    def test_columns_and_values(self, finished, entries, tmp_path):
        returned = predict(entries, finished, tmp_path)
        assert read_predictions(tmp_path) == returned
        assert parquet.read_table(tmp_path / "predictions.parquet").column_names == COLUMNS
        with (tmp_path / "predictions.csv").open(newline="") as file:
            text = list(csv.DictReader(file))
        assert list(text[0]) == COLUMNS
        for row, line, entry in zip(returned, text, entries, strict=True):
            assert (row["slide_id"], row["label"], row["split"]) == (entry.slide_id, entry.label, "test")
            assert row["prob_bar"] + row["prob_box"] == pytest.approx(1)
            assert row["prediction"] == max(("bar", "box"), key=lambda name: row[f"prob_{name}"])
            assert row["se_bar"] == pytest.approx(row["se_box"], abs=1e-6)
            assert row["se_bar"] >= 0
            assert 0 <= row["low_bar"] <= row["prob_bar"] <= row["high_bar"] <= 1
            assert row["low_bar"] + row["high_box"] == pytest.approx(1)
            assert row["requests"] > 0
            assert row["bytes_read"] > 0
            assert (row["status"], row["error"]) == ("ok", "")
            assert float(line["prob_bar"]) == row["prob_bar"]

    def test_a_single_draw_has_no_error_and_no_interval(self, finished, entries, tmp_path):
        returned = predict(entries, finished, tmp_path, draws=1)
        assert {row[f"{name}_bar"] for row in returned for name in ("se", "low", "high")} == {None}
        assert set(parquet.read_table(part_files(tmp_path / "parts")[0])["se_bar"].to_pylist()) == {None}
        assert read_predictions(tmp_path) == returned

    def test_failed_slides_are_rows_and_are_tried_again(self, finished, entries, tmp_path, worked):
        late = tmp_path / "late.ome.zarr"
        bad = [Entry(slide_id="late", path=str(late), label="bar"), *entries[:1]]
        first = predict(bad, finished, tmp_path / "out")
        assert [row["status"] for row in first] == ["failed", "ok"]
        assert str(late) in first[0]["error"]
        table = read_predictions(tmp_path / "out")
        assert table[0]["prob_bar"] is None
        assert list(table[0])[:5] == COLUMNS[:5]
        assert list(table[0])[-3:] == ["model", "status", "error"]
        shutil.copytree(entries[1].path, late)
        again = predict(bad, finished, tmp_path / "out")
        assert [row["status"] for row in again] == ["ok", "ok"]
        assert worked == ["late", entries[0].slide_id, "late"]

    def test_all_slides_failed(self, finished, tmp_path):
        returned = predict([Entry(slide_id="x", path=str(tmp_path / "x"))], finished, tmp_path / "out")
        assert returned[0]["status"] == "failed"
        assert read_predictions(tmp_path / "out")[0]["error"] == returned[0]["error"]

    @pytest.mark.parametrize("slide_id", ["../up", "a,b", 'say "hi"', "日本", "007"])
    def test_awkward_ids(self, finished, entries, tmp_path, slide_id):
        returned = predict([replace(entries[0], slide_id=slide_id)], finished, tmp_path / "out")
        assert returned[0]["slide_id"] == slide_id
        assert read_predictions(tmp_path / "out") == returned
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_damaged_table(self, finished, entries, tmp_path):
        with pytest.raises(UsageError, match="give the --out of nested-ats predict"):
            read_predictions(tmp_path)
        write_table(tmp_path, [{"slide_id": "a", "status": "ok", "error": ""}])
        path = tmp_path / "predictions.parquet"
        for damage in (b"", b"no table", path.read_bytes()[:100]):
            path.write_bytes(damage)
            with pytest.raises(UsageError, match="not a Parquet file.*run nested-ats predict again"):
                read_predictions(tmp_path)

    @pytest.mark.timeout(60)  # a pipe waits for its writer
    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
    def test_what_is_no_file_is_named(self, finished, entries, tmp_path, make):
        predict(entries[:1], finished, tmp_path)

        def again():
            predict(entries[:1], finished, tmp_path)

        readers = {
            "predict.json": again,
            "parts/part-000001.parquet": again,
            "predictions.parquet": lambda: evaluate(tmp_path),
            "metrics.json": lambda: report(finished, tmp_path, tmp_path / "page.html"),
        }
        for name, read in readers.items():
            path = tmp_path / name
            kept = path.read_bytes() if path.exists() else b"{}"
            path.unlink(missing_ok=True)
            make(path)
            with pytest.raises(UsageError, match=f"{path}: cannot be read"):
                read()
            path.unlink()
            path.write_bytes(kept)


@pytest.fixture(scope="module")
def drawn(config, pyramids, tmp_path_factory):
    """A run of slides without splits, in two to a case, and those slides."""
    entries = [replace(entry, split="", case_id=f"case {i % 7}") for i, entry in enumerate(read_manifest(pyramids))]
    values = plain(config)
    values["train"]["epochs"] = 1
    values["data"] |= {"test": 0.3, "validation": 0.3}
    folder = tmp_path_factory.mktemp("drawn") / "run"
    train(entries, parse_config(values, ""), folder)
    return folder, entries


class TestSplitsOfTheRun:
    def test_slides_without_splits_have_those_of_the_run(self, drawn, tmp_path):
        folder, entries = drawn
        known = {row["slide_id"]: row["split"] for row in read_run(folder)["entries"]}
        assert set(known.values()) == {"train", "val", "test"}
        returned = predict(entries, folder, tmp_path)
        for row in returned:
            assert row["split"] == known[row["slide_id"]]
            assert row["seen"] == row["split"].replace("test", "")

    def test_a_slide_is_known_by_its_id_or_its_path_or_its_case(self, drawn, tmp_path):
        folder, entries = drawn
        splits = RunSplits(read_run(folder)["entries"])
        trained = next(entry for entry in entries if splits.of(entry) == "train")
        moved = replace(trained, path="/elsewhere", case_id="")
        renamed = replace(trained, slide_id="new name", case_id="")
        sibling = Entry(slide_id="new", path="/new", case_id=trained.case_id)
        stranger = Entry(slide_id="new", path="/new", case_id="new")
        assert [splits.of(entry) for entry in (moved, renamed, sibling, stranger)] == ["train", "train", "", ""]
        assert [splits.seen(entry) for entry in (moved, renamed, sibling, stranger)] == [
            "train",
            "train",
            "train",
            "",
        ]
        copy = tmp_path / "copy.ome.zarr"
        shutil.copytree(trained.path, copy)
        assert splits.seen(replace(trained, path=str(copy), case_id="")) == "train"
        write_pyramid(tmp_path / "other.ome.zarr", np.zeros((3, 120, 150), np.uint8), mpp=0.5)
        other = replace(trained, path=str(tmp_path / "other.ome.zarr"), case_id="")  # of another cohort
        assert (splits.of(other), splits.seen(other)) == ("", "")
        tested = next(entry for entry in entries if splits.of(entry) == "test")
        assert splits.seen(tested) == ""

    def test_the_manifest_s_own_splits_stay_and_what_was_seen_is_marked(self, drawn, tmp_path):
        folder, entries = drawn
        splits = RunSplits(read_run(folder)["entries"])
        claimed = [replace(entry, split="test") for entry in entries if splits.of(entry) != "test"][:2]
        returned = predict(claimed, folder, tmp_path)
        assert {row["split"] for row in returned} == {"test"}
        assert all(row["seen"] in ("train", "val") for row in returned)
        with pytest.raises(UsageError, match="2 of them seen in training: --include-seen"):
            evaluate(tmp_path)
        assert evaluate(tmp_path, include_seen=True)["slides"] == 2

    def test_the_way_of_the_readme(self, drawn, tmp_path):
        """A manifest without splits, then ``predict --split test``; and without ``--split``, nothing silent."""
        folder, entries = drawn
        write_manifest(tmp_path / "m.csv", [replace(entry, case_id="") for entry in entries])

        def cli(*words):
            result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
            assert result.exit_code == 0, result.output
            return result

        cli("predict", folder, tmp_path / "m.csv", "--split", "test", "--out", tmp_path / "test")
        tested = [row["slide_id"] for row in read_run(folder)["entries"] if row["split"] == "test"]
        assert [row["slide_id"] for row in read_predictions(tmp_path / "test")] == tested
        shown = cli(
            "heatmap", folder, tmp_path / "m.csv", "--split", "test", "--out", tmp_path / "maps", "--limit", 1
        )
        assert file_name(tested[0]) in shown.stdout
        seen = len(entries) - len(tested)
        told = cli("predict", folder, tmp_path / "m.csv", "--out", tmp_path / "all").stderr
        assert f"{seen} of {len(entries)} slides were seen in training" in told
        assert f"seen, left out     {seen}" in cli("evaluate", tmp_path / "all").stdout
        assert json.loads((tmp_path / "all" / "metrics.json").read_text())["slides"] == len(tested)
        cli("report", folder, tmp_path / "all", "--out", tmp_path / "page.html")
        assert f"{seen} of {len(entries)} slides were seen in training" in (tmp_path / "page.html").read_text()
        assert f"seen, counted      {seen}" in cli("evaluate", tmp_path / "all", "--include-seen").stdout

    def test_slides_in_no_split_of_the_run_are_told_of(self, drawn, tmp_path):
        folder, entries = drawn
        rows = [replace(entry, case_id="") for entry in entries]
        write_manifest(tmp_path / "m.csv", [*rows, Entry(slide_id="new", path="/new", label="bar")])
        words = ["predict", folder, tmp_path / "m.csv", "--split", "test", "--out", tmp_path / "out"]
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert "1 of 15 slides are in no split of" in result.stderr
        words[4] = "tset"
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2
        assert "no slide in split 'tset' (1 in none, " in result.stderr


class TestSigns:
    def test_entropies_and_background(self, finished, tmp_path):
        """A blank slide is background wherever it is looked at; one of noise nowhere."""
        rng = np.random.default_rng(0)
        entries = []
        for name, pixels in {
            "blank": np.full((3, 130, 90), 240, np.uint8),
            "noise": rng.integers(0, 255, (3, 130, 90), dtype=np.uint8),
        }.items():
            write_pyramid(tmp_path / f"{name}.ome.zarr", pixels)
            entries.append(Entry(slide_id=name, path=str(tmp_path / f"{name}.ome.zarr")))
        classifier = Classifier(replace(prediction_settings(finished), background=240 / 255))
        blank, noise = (classifier(entry) for entry in entries)
        assert (blank["background"], noise["background"]) == (1.0, 0.0)
        assert blank["entropy"] == pytest.approx(blank["uniform_entropy"], abs=1e-3)
        assert 0 < noise["entropy"] <= noise["uniform_entropy"] + 1e-6
        assert noise["uniform_entropy"] == pytest.approx(blank["uniform_entropy"], rel=0.05)

    def test_an_exact_evaluation_chooses_no_patches(self, finished, entries):
        row = Classifier(replace(prediction_settings(finished), exact=True))(entries[0])
        assert row["background"] is None


class TestSameAgain:
    def test_equal_seeds_give_equal_results_in_any_order(self, finished, entries, rows, tmp_path):
        again = predict(entries[::-1], finished, tmp_path)
        assert numbers(again[::-1]) == numbers(rows)

    def test_draws_are_averaged_and_more_change_the_result(self, finished, entries, rows, tmp_path):
        assert numbers(predict(entries, finished, tmp_path, draws=3)) != numbers(rows)

    def test_another_seed_draws_otherwise(self, finished, entries, rows):
        classifier = Classifier(replace(prediction_settings(finished), seed=99))
        assert [classifier(entry)["prob_bar"] for entry in entries] != [row["prob_bar"] for row in rows]

    def test_the_slides_name_decides_the_draw_and_not_its_path(self, finished, entries, rows, tmp_path):
        shutil.copytree(entries[0].path, tmp_path / "moved.ome.zarr")
        moved = replace(entries[0], path=str(tmp_path / "moved.ome.zarr"))
        assert numbers(predict([moved], finished, tmp_path / "out")) == numbers(rows[:1])


class TestResume:
    def test_only_what_is_missing_is_classified(self, finished, entries, rows, tmp_path, worked):
        predict(entries, finished, tmp_path)
        assert worked == [entry.slide_id for entry in entries]
        (tmp_path / "parts" / "part-000003.parquet").unlink()
        again = predict(entries, finished, tmp_path)
        assert worked[len(entries) :] == [entries[2].slide_id]
        assert numbers(again) == numbers(rows)
        table = (tmp_path / "predictions.parquet").read_bytes()
        predict(entries, finished, tmp_path)
        assert len(worked) == len(entries) + 1
        assert (tmp_path / "predictions.parquet").read_bytes() == table

    def test_a_model_is_loaded_once(self, finished, entries, tmp_path, monkeypatch):
        loads = []

        def counted(path, **options):
            loads.append(path)
            return read_tensors(path, **options)

        monkeypatch.setattr(checkpoint, "read_tensors", counted)
        predict(entries, finished, tmp_path, samples=(2, 2))
        assert loads == [finished / "model" / "model.safetensors"]
        predict(entries, finished, tmp_path, samples=(2, 2))  # nothing is left to do
        assert len(loads) == 1

    def test_predictions_of_another_model_are_refused(self, finished, entries, tmp_path):
        """One weight is enough, or one word of its description."""
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        predict(entries[:1], run, tmp_path / "out")
        model, classes = load_model(run / "model")
        with torch.no_grad():
            model.head.bias[0] += 1e-3
        save_model(run / "model", model, classes=classes)
        with pytest.raises(UsageError, match="of another model"):
            predict(entries[:1], run, tmp_path / "out")
        predict(entries[:1], run, tmp_path / "out", overwrite=True)
        model.config = replace(model.config, mean=0.25)
        save_model(run / "model", model, classes=classes)
        with pytest.raises(UsageError, match="of another model"):
            predict(entries[:1], run, tmp_path / "out")

    def test_an_interrupt_keeps_what_has_finished(self, finished, entries, rows, tmp_path, monkeypatch, worked):
        spied = Classifier.__call__

        def dies(self, entry):
            if entry.slide_id == entries[2].slide_id:
                raise KeyboardInterrupt
            return spied(self, entry)

        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "__call__", dies)
            with pytest.raises(KeyboardInterrupt):
                predict(entries, finished, tmp_path)
        assert not (tmp_path / "predictions.csv").exists()
        assert numbers(predict(entries, finished, tmp_path)) == numbers(rows)
        assert worked == [entry.slide_id for entry in entries]

    @pytest.mark.parametrize("damage", ["none", "half", "other columns"])
    def test_a_damaged_result_is_made_again(self, finished, entries, rows, tmp_path, damage):
        predict(entries, finished, tmp_path)
        part = tmp_path / "parts" / "part-000001.parquet"
        if damage == "other columns":
            parquet.write_table(parquet.read_table(part).drop_columns(["draws"]), part)
        else:
            part.write_bytes(part.read_bytes()[:-100] if damage == "half" else b"")
        assert numbers(predict(entries, finished, tmp_path)) == numbers(rows)

    @pytest.mark.parametrize("damage", ["", "[]", None])
    def test_results_of_unknown_settings_are_refused(self, finished, entries, tmp_path, damage):
        predict(entries, finished, tmp_path)
        if damage is None:
            (tmp_path / "predict.json").unlink()
        else:
            (tmp_path / "predict.json").write_text(damage)
        with pytest.raises(UsageError, match="--overwrite"):
            predict(entries, finished, tmp_path)

    def test_results_of_slides_no_longer_asked_for_are_left_out(self, finished, entries, tmp_path, worked):
        predict(entries, finished, tmp_path)
        assert [row["slide_id"] for row in predict(entries[1:2], finished, tmp_path)] == [entries[1].slide_id]
        assert [row["slide_id"] for row in read_predictions(tmp_path)] == [entries[1].slide_id]
        assert len(predict(entries, finished, tmp_path)) == len(entries)
        assert len(worked) == len(entries)

    def test_another_file_under_an_old_name_is_classified(self, finished, entries, tmp_path):
        """Two cohorts may both have a slide 1."""
        first = predict(entries[:1], finished, tmp_path)
        second = predict([replace(entries[1], slide_id=entries[0].slide_id)], finished, tmp_path)
        assert first[0]["prob_bar"] != second[0]["prob_bar"]

    def test_labels_are_those_of_the_manifest_now(self, finished, entries, tmp_path, worked):
        predict(entries[:1], finished, tmp_path)
        again = predict([replace(entries[0], label="ring", case_id="p")], finished, tmp_path)
        assert (again[0]["label"], again[0]["case_id"]) == ("ring", "p")
        assert len(worked) == 1


class TestOtherSettings:
    @pytest.mark.parametrize("other", [{"draws": 3}, {"samples": [2, 2]}])
    def test_are_refused_and_overwrite_starts_again(self, finished, entries, tmp_path, other, worked):
        first = predict(entries, finished, tmp_path)
        with pytest.raises(UsageError, match="another model or other settings.*--overwrite"):
            predict(entries, finished, tmp_path, **other)
        assert read_predictions(tmp_path) == first
        again = predict(entries, finished, tmp_path, overwrite=True, **other)
        assert numbers(again) != numbers(first)
        assert len(worked) == 2 * len(entries)

    def test_another_model_is_refused(self, config, pyramids, finished, entries, tmp_path):
        predict(entries, finished, tmp_path / "out")
        short = {**plain(config), "train": {**plain(config)["train"], "epochs": 1}}
        train(read_manifest(pyramids), parse_config(short, ""), tmp_path / "run")
        with pytest.raises(UsageError, match="another model"):
            predict(entries, tmp_path / "run", tmp_path / "out")

    def test_the_same_model_elsewhere_is_the_same(self, finished, entries, tmp_path, worked):
        predict(entries, finished, tmp_path / "out")
        shutil.copytree(finished, tmp_path / "moved")
        predict(entries, tmp_path / "moved", tmp_path / "out", device="cpu")
        assert len(worked) == len(entries)

    def test_overwriting_interrupted_leaves_no_table_of_the_old_settings(
        self, finished, entries, tmp_path, monkeypatch
    ):
        predict(entries, finished, tmp_path)

        def dies(self, entry):
            raise KeyboardInterrupt

        monkeypatch.setattr(Classifier, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            predict(entries, finished, tmp_path, draws=3, overwrite=True)
        with pytest.raises(UsageError, match="no predictions"):
            read_predictions(tmp_path)

    def test_the_budget_decides_what_is_read(self, finished, entries, rows, tmp_path, monkeypatch):
        seen = []
        encoding = NestedATS.encoding

        def spy(self, images, centers):
            seen.append(centers.shape[1])
            return encoding(self, images, centers)

        monkeypatch.setattr(NestedATS, "encoding", spy)
        predict(entries[:1], finished, tmp_path, samples=[2, 7], draws=2)
        assert seen == [7, 7]

    @pytest.mark.parametrize("samples", [[4], [4, 4, 4], [0, 3], [3, -1]])
    def test_budgets_that_do_not_fit(self, finished, entries, tmp_path, samples):
        with pytest.raises(UsageError, match="2 levels; give that many positive numbers"):
            predict(entries, finished, tmp_path / "out", samples=samples)
        assert not (tmp_path / "out").exists()

    def test_a_budget_of_more_than_there_is_takes_all(self, finished, entries, tmp_path):
        one, other = (
            predict(entries[:1], finished, tmp_path / str(n), samples=[10_000, 10_000], draws=n)[0] for n in (1, 2)
        )
        assert one["prob_bar"] == pytest.approx(other["prob_bar"], abs=1e-5)
        assert other["se_bar"] == pytest.approx(0, abs=1e-5)


class TestSlidesThatDoNotFit:
    def one(self, finished, tmp_path, pixels):
        write_pyramid(tmp_path / "x.ome.zarr", pixels)
        entry = Entry(slide_id="x", path=str(tmp_path / "x.ome.zarr"))
        return predict([entry], finished, tmp_path / "out")[0]

    def test_other_channels(self, finished, tmp_path):
        row = self.one(finished, tmp_path, np.zeros((1, 100, 100), np.uint8))
        assert "1 channels where the model has 3" in row["error"]

    def test_a_missing_level(self, finished, tmp_path):
        row = self.one(finished, tmp_path, np.zeros((3, 20, 20), np.uint8))
        assert "no level at downsample 4" in row["error"]

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    def test_every_type_of_pixel_and_blank_slides(self, finished, tmp_path, dtype):
        row = self.one(finished, tmp_path, np.zeros((3, 130, 90), dtype))
        assert row["status"] == "ok", row["error"]

    def test_a_pixel_that_holds_no_data_is_background(self, finished, tmp_path):
        pixels = np.full((3, 130, 90), 0.2, np.float32)
        pixels[:, 40:, :50] = math.nan
        row = self.one(finished, tmp_path, pixels)
        assert row["status"] == "ok", row["error"]

    @pytest.mark.parametrize("where", [(0, 0), (65, 77)])
    def test_an_infinite_pixel_fails_the_slide(self, finished, tmp_path, where):
        pixels = np.full((3, 130, 90), 0.2, np.float32)
        pixels[:, where[0], where[1]] = math.inf
        row = self.one(finished, tmp_path, pixels)
        assert row["status"] == "failed"
        assert "x.ome.zarr: what the model computes is not finite" in row["error"]

    def test_probabilities_that_are_no_numbers_fail_the_slide(self, finished, entries, tmp_path, monkeypatch):
        original = module.estimate  # type: ignore[attr-defined]

        def broken(*arguments, **settings):
            prediction = original(*arguments, **settings)
            return prediction._replace(answers=prediction.answers * math.nan)

        monkeypatch.setattr(module, "estimate", broken)
        [row] = predict(entries[:1], finished, tmp_path)
        assert "not finite" in row["error"]

    def test_a_file_that_is_no_image(self, finished, pyramids, tmp_path):
        [row] = predict([Entry(slide_id="x", path=str(pyramids))], finished, tmp_path)
        assert "manifest.csv: not an image of a kind that is read; give a TIFF" in row["error"]

    def test_a_damaged_chunk(self, finished, entries, tmp_path):
        shutil.copytree(entries[0].path, tmp_path / "x.ome.zarr")
        shard = tmp_path / "x.ome.zarr" / "2" / "c" / "0" / "0" / "0"
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
        [row] = predict([replace(entries[0], path=str(tmp_path / "x.ome.zarr"))], finished, tmp_path / "out")
        assert row["status"] == "failed"
        assert "x.ome.zarr" in row["error"]


class TestRuns:
    def test_no_run(self, entries, tmp_path):
        with pytest.raises(UsageError, match="no training run here"):
            predict(entries, tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_unfinished_run(self, finished, entries, tmp_path):
        shutil.copytree(finished, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "model")
        with pytest.raises(UsageError, match="training has not finished"):
            predict(entries, tmp_path / "run", tmp_path / "out")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    @pytest.mark.parametrize("damage", [None, b"", b"garbage", b"\x80\x04K\x01."])
    def test_a_damaged_model(self, finished, entries, tmp_path, name, damage):
        shutil.copytree(finished, tmp_path / "run")
        path = tmp_path / "run" / "model" / name
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(ModelFileError, match=name):
            predict(entries, tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_place_that_cannot_be_written(self, finished, entries, pyramids):
        with pytest.raises(UsageError, match="choose another --out"):
            predict(entries, finished, pyramids / "out")


def test_a_gpu_that_is_insisted_on_must_be_there(finished, monkeypatch):
    """On a cluster the worker alone can tell: Ray may count a GPU that its PyTorch was not built for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: PyTorch sees no GPU on .*CUDA build"):
        Classifier(prediction_settings(finished, device="cuda"))


def test_workers_begin_with_the_largest_slide_and_have_the_time_that_was_given(
    finished, entries, pyramids, tmp_path, monkeypatch
):
    """Slides that are not in a folder, whose size would take a request or a decoding to tell, come last."""
    entries = [*entries, Entry(slide_id="far", path="s3://bucket/a.zarr"), Entry(slide_id="gone", path="/gone")]
    asked = []

    def record(make_worker, items, *, cost, timeout_s, **_):
        asked.extend([[cost(item) for item in items], timeout_s])
        return (cluster.Outcome(item, None, "not run", 1) for item in items)

    monkeypatch.setattr("pipeline.results.predict.cluster.run_tasks", record)
    predict(entries, finished, tmp_path / "out", address="local", timeout_s=7)
    sizes = [(120 + 8 * (i % 3)) * 150 for i in range(10, 14)]
    assert asked == [[*sizes, 0, 0], 7]
    words = ["predict", finished, pyramids, "--out", tmp_path / "cli", "--slide-timeout", "9"]
    CliRunner().invoke(app, [str(word) for word in words])
    assert asked[3] == 9


def test_a_folder_that_another_process_predicts_into_is_left_alone(finished, entries, tmp_path):
    predict(entries[:1], finished, tmp_path)
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    with locked(tmp_path / LOCK):
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="another prediction is being written there; wait"):
                predict(entries, finished, tmp_path, draws=1, overwrite=overwrite)
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before


def test_other_columns_of_a_manifest_are_in_the_table(finished, pyramids, tmp_path):
    entries = [
        replace(entry, extra={"site": "Bern", "age": "061", "low_grade": "1"})
        for entry in read_manifest(pyramids)[:2]
    ]
    predict(entries, finished, tmp_path / "out")
    found = [
        [row[name] for name in ("site", "age", "low_grade", "status")] for row in read_predictions(tmp_path / "out")
    ]
    assert found == [["Bern", "061", "1", "ok"]] * 2
    for name in ("status", "prob_bar", "prob_grade", "low_bar", "high_box"):
        with pytest.raises(UsageError, match=f"column {name} would be lost"):
            predict([replace(entries[0], extra={name: "x"})], finished, tmp_path / "other")
