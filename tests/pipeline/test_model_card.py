"""A model is given away with what one should know of it, and without whom it was made from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from nested_ats import ImageModel, load_model
from nested_ats.networks.encoders import read_choice
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.results.card import export_model, model_card
from pipeline.results.evaluate import evaluate
from pipeline.results.predict import predict
from pipeline.training.train import train


@pytest.fixture(scope="module")
def predicted(finished, pyramids, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicted")
    predict([entry for entry in read_manifest(pyramids) if entry.split == "test"], finished, folder)
    evaluate(folder)
    return folder


def cli(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def section(text, title):
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


class TestCard:
    def test_the_hub_reads_its_front_matter(self, finished, predicted):
        metrics = json.loads((predicted / "metrics.json").read_text())
        data: Any = ModelCard(model_card(finished, [predicted], name="shapes")).data
        assert data.library_name == "nested-ats"
        assert data.pipeline_tag == "image-classification"
        results = {each.metric_type: each.metric_value for each in data.eval_results}
        assert results == {name: pytest.approx(metrics[name]["value"], abs=1e-4) for name in metrics["measures"]}
        assert {each.dataset_name for each in data.eval_results} == {"4 cases of split test"}
        assert data.model_name == "shapes"

    def test_it_counts_the_data(self, finished):
        data = section(model_card(finished), "Data")
        assert "| split | slides | cases | bar | box |" in data
        assert "| train | 10 | 10 | 5 | 5 |" in data
        assert "| test | 4 | 4 | 2 | 2 |" in data

    def test_figures_have_intervals_and_few_cases_are_named(self, finished, predicted):
        metrics = json.loads((predicted / "metrics.json").read_text())
        text = model_card(finished, [predicted])
        low, high = metrics["accuracy"]["interval_95"]
        assert f"{metrics['accuracy']['value']:.3f} [{low:.3f}, {high:.3f}]" in section(text, "Figures")
        assert "rest on 4 cases" in section(text, "Limits")

    def test_without_figures_it_says_so(self, finished):
        text = model_card(finished)
        assert "**None.**" in section(text, "Figures")
        assert "How good its answers are" in section(text, "Limits")
        assert "model-index" not in text

    def test_classes_that_were_not_tested_are_named(self, finished, pyramids, tmp_path):
        boxes = [entry for entry in read_manifest(pyramids) if entry.split == "test" and entry.label == "box"]
        predict(boxes, finished, tmp_path)
        evaluate(tmp_path)
        assert "No image of split test is of bar" in section(model_card(finished, [tmp_path]), "Limits")

    def test_another_target(self, config, pyramids, tmp_path):
        values = plain(config) | {"target": {"kind": "regression", "column": "size"}}
        values["train"] |= {"epochs": 1}
        entries = [replace(entry, extra={"size": str(i)}) for i, entry in enumerate(read_manifest(pyramids))]
        train(entries, parse_config(values, "test"), tmp_path / "run")
        card = ModelCard(model_card(tmp_path / "run"))
        assert card.data.to_dict().get("pipeline_tag") is None
        assert "(regression)" in card.text
        assert "| train | 10 | 10 |" in card.text

    def test_the_licence_of_a_published_encoder_is_named(self, finished, monkeypatch):
        monkeypatch.setattr("pipeline.results.card.read_choice", lambda encoder: read_choice("uni"))
        text = model_card(finished)
        assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "MahmoodLab/UNI"
        assert "https://huggingface.co/MahmoodLab/UNI" in section(text, "Limits")


class TestExport:
    def test_the_same_model_comes_back(self, finished, predicted, tmp_path):
        folder = export_model(finished, tmp_path / "given", [predicted])
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        model, names = load_model(folder, expect=ImageModel)
        own, own_names = load_model(finished / "model", expect=ImageModel)
        assert names == own_names == ["bar", "box"]
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
        export_model(finished, tmp_path / "given")  # replaces it
        assert "**None.**" in (folder / "README.md").read_text()

    def test_no_path_slide_or_case_is_named(self, config, pyramids, tmp_path):
        values = plain(config)
        values["train"] |= {"epochs": 1}
        entries = [
            replace(entry, case_id=f"patient {i}", slide_id=f"specimen {i}")
            for i, entry in enumerate(read_manifest(pyramids))
        ]
        train(entries, parse_config(values, "test"), tmp_path / "run")
        given = export_model(tmp_path / "run", tmp_path / "given")
        for path in given.iterdir():
            text = path.read_bytes().decode("latin-1")
            for secret in ("patient", "specimen", str(Path(entries[0].path).parent), str(tmp_path), "slide "):
                assert secret not in text, path

    def test_the_path_of_the_encoders_weights_stays_here(self, finished, tmp_path):
        from pipeline.results.card import _without_paths

        config = load_model(finished / "model", expect=ImageModel)[0].config
        secret = replace(config, encoder={"name": "lenet", "weights": "/home/jane/lenet.safetensors"})
        assert _without_paths(secret).encoder == {"name": "lenet", "weights": "lenet.safetensors"}
        random = replace(config, encoder={"name": "lenet", "weights": "random"})
        assert _without_paths(random) == random

    def test_a_folder_with_other_files_is_left_alone(self, finished, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        result = cli("model", "export", finished, "--out", tmp_path, code=2)
        assert "mine.txt" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class TestCommands:
    def test_card(self, finished, predicted, tmp_path):
        printed = cli("model", "card", finished, "--predictions", predicted).stdout
        cli("model", "card", finished, "--predictions", predicted, "--out", tmp_path / "card.md")
        assert (tmp_path / "card.md").read_text() == printed

    def test_predictions_that_are_not_evaluated(self, finished, pyramids, tmp_path):
        predict(read_manifest(pyramids)[-1:], finished, tmp_path)
        result = cli("model", "card", finished, "--predictions", tmp_path, code=2)
        assert "not evaluated yet" in result.stderr

    def test_a_run_that_has_not_finished(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
        assert "training has not finished" in cli("model", "card", tmp_path / "run", code=2).stderr
