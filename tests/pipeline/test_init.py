"""``train --init``: trainings that begin with a trained model."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from nested_ats import ModelFileError
from pipeline.cli.app import app
from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest, write_manifest
from pipeline.errors import UsageError
from pipeline.results.predict import predict
from pipeline.runs import MODEL, read_run
from pipeline.training.dry_run import dry_run
from pipeline.training.train import train


def weights(run):
    return load_file(run / MODEL / "model.safetensors")


@pytest.fixture(scope="module")
def entries(pyramids):
    return read_manifest(pyramids)


@pytest.fixture(scope="module")
def still(config):
    """One epoch whose steps are too small to change a weight."""
    return changed(config, train={"epochs": 1, "learning_rate": 1e-12})


def changed(config, **sections):
    values = plain(config)
    for name, section in sections.items():
        values[name] |= section
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def begun(entries, still, finished, tmp_path_factory):
    """A run that began with another and has trained on two of the slides that this had for tests."""
    split = {entry.slide_id: "test" for entry in entries} | {"slide 10": "train", "slide 11": "train"}
    folder = tmp_path_factory.mktemp("begun") / "run"
    train([replace(entry, split=split[entry.slide_id]) for entry in entries], still, folder, init=finished)
    return folder


class TestWeights:
    def test_are_those_of_the_run(self, begun, finished):
        for name, value in weights(finished).items():
            torch.testing.assert_close(weights(begun)[name], value, atol=1e-6, rtol=0, msg=name)

    def test_are_others_without(self, entries, still, finished, tmp_path):
        train(entries, still, tmp_path / "run")
        assert not torch.equal(weights(tmp_path / "run")["head.weight"], weights(finished)["head.weight"])

    def test_of_a_model_s_own_folder(self, entries, still, finished, tmp_path, capsys):
        shutil.copytree(finished / MODEL, tmp_path / "model")
        train(entries, still, tmp_path / "run", init=tmp_path / "model")
        torch.testing.assert_close(
            weights(tmp_path / "run")["head.weight"], weights(finished)["head.weight"], atol=1e-6, rtol=0
        )
        assert "does not tell which slides it has seen" in capsys.readouterr().err

    def test_keep_how_features_are_standardised(self, entries, config, still, tmp_path):
        standard = {"standardise": True}
        train(entries, changed(config, model=standard), tmp_path / "first")
        train(entries[:6] + entries[10:], changed(still, model=standard), tmp_path / "run", init=tmp_path / "first")
        first, run = weights(tmp_path / "first"), weights(tmp_path / "run")
        moved = [name for name in first if not torch.allclose(first[name], run[name], atol=1e-6)]
        assert moved == []

    def test_of_the_networks_alone_where_the_target_is_another(self, entries, still, finished, tmp_path, capsys):
        renamed = [replace(entry, label=entry.label.upper()) for entry in entries]
        train(renamed, still, tmp_path / "run", init=finished)
        assert "the last layer begins anew" in capsys.readouterr().err
        before, after = weights(finished), weights(tmp_path / "run")
        apart = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
        assert apart == {"head.weight", "head.bias"}

    def test_of_fewer_samples_and_other_levels(self, entries, still, finished, tmp_path):
        levels = plain(still)["model"]["levels"]
        levels[0] |= {"samples": 2}
        levels[1] |= {"samples": 5, "downsample": 1, "size": 32}
        train(entries, changed(still, model={"levels": levels}), tmp_path / "run", init=finished)
        torch.testing.assert_close(
            weights(tmp_path / "run")["head.weight"], weights(finished)["head.weight"], atol=1e-6, rtol=0
        )


class TestSlidesThatWereSeen:
    def test_count_as_seen_by_the_new_model(self, begun, entries, tmp_path):
        seen = {row["slide_id"]: row["seen"] for row in predict(entries, begun, tmp_path)}
        assert [slide for slide, split in seen.items() if split == ""] == ["slide 12", "slide 13"]

    def test_of_a_chain_of_runs(self, begun, entries, still, tmp_path):
        split = {entry.slide_id: "test" for entry in entries} | {"slide 12": "train", "slide 1": "train"}
        mine = [replace(entry, split=split[entry.slide_id]) for entry in entries]
        train(mine, still, tmp_path / "run", init=begun)
        seen = {row["slide_id"]: row["seen"] for row in predict(entries, tmp_path / "run", tmp_path / "answers")}
        assert [slide for slide, split in seen.items() if split == ""] == ["slide 13"]


class TestGoingOn:
    def test_a_run_goes_on_with_the_same_and_is_refused_with_another(self, entries, still, finished, begun, tmp_path):
        train(entries, still, tmp_path / "run", init=finished)
        longer = changed(still, train={"epochs": 2})
        train(entries, longer, tmp_path / "run", init=finished)
        assert read_run(tmp_path / "run")["init"]["folder"] == str((finished / MODEL).absolute())
        for other in (begun, None):
            with pytest.raises(UsageError, match="another configuration"):
                train(entries, longer, tmp_path / "run", init=other)

    def test_a_worker_that_finds_another_model_says_so(self, entries, still, finished, begun, tmp_path, monkeypatch):
        shutil.copytree(finished, tmp_path / "first")

        def exchange(*_, **__):
            shutil.rmtree(tmp_path / "first" / MODEL)
            shutil.copytree(begun / MODEL, tmp_path / "first" / MODEL)

        monkeypatch.setattr("pipeline.training.train._prepare", exchange)
        with pytest.raises(UsageError, match=r"first/model: holds model \w{16}, and this training begins with"):
            train(entries, still, tmp_path / "run", init=tmp_path / "first")

    def test_on_ray_workers(self, entries, still, finished, tmp_path, ray_head):
        train(entries, still, tmp_path / "run", init=finished, address="local", workers=2)
        torch.testing.assert_close(
            weights(tmp_path / "run")["head.weight"], weights(finished)["head.weight"], atol=1e-6, rtol=0
        )


class TestMistakes:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ({"features": 4}, r"of their tensors differ, such as encoder\S+, \(4,\) there and \(2,\) here"),
            ({"mean": 0.3}, r"normalised by mean \[0.5, 0.5, 0.5\], not \[0.3, 0.3, 0.3\]; set model.mean"),
            ({"std": (0.25, 0.25, 0.5)}, "set model.std"),
        ],
    )
    def test_other_networks(self, entries, still, finished, tmp_path, model, message):
        with pytest.raises(ModelFileError, match=message):
            train(entries, changed(still, model=model), tmp_path / "run", init=finished)

    def test_no_model(self, entries, still, tmp_path):
        with pytest.raises(UsageError, match="gone: neither a run nor a model"):
            train(entries, still, tmp_path / "run", init=tmp_path / "gone")

    def test_a_run_that_has_not_finished(self, entries, still, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "first")
        shutil.rmtree(tmp_path / "first" / MODEL)
        with pytest.raises(UsageError, match="training has not finished"):
            train(entries, still, tmp_path / "run", init=tmp_path / "first")

    def test_a_damaged_model(self, entries, still, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "first")
        path = tmp_path / "first" / MODEL / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        with pytest.raises(ModelFileError, match="damaged"):
            train(entries, still, tmp_path / "run", init=tmp_path / "first")


def test_a_dry_run_begins_with_it_too(entries, still, finished, tmp_path):
    assert dry_run(entries, still, tmp_path / "run", init=finished)[1] == []
    with pytest.raises(ModelFileError, match="tensors differ"):
        dry_run(entries, changed(still, model={"features": 4}), tmp_path / "run", init=finished)


def test_the_option(entries, still, finished, tmp_path):
    write_manifest(tmp_path / "manifest.csv", entries)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(still)))
    command = ["train", "--manifest", tmp_path / "manifest.csv", "--config", tmp_path / "config.yaml"]
    command += ["--out", tmp_path / "run", "--init", finished]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(
        weights(tmp_path / "run")["head.weight"], weights(finished)["head.weight"], atol=1e-6, rtol=0
    )
