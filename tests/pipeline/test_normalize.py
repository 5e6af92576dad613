"""``data.normalize: auto`` is the statistics of the training split, measured once and carried by run and model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nested_ats import load_model
from pipeline.config import load_config, parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.data.selection import select
from pipeline.errors import DataError, UsageError
from pipeline.results.predict import predict
from pipeline.runs import CONFIG, model_folder, read_run
from pipeline.stats import measure
from pipeline.training import normalize
from pipeline.training.dry_run import dry_run
from pipeline.training.folds import fold_folder, train_folds
from pipeline.training.train import train, worker_arguments
from storage import write_pyramid


def auto(config, **train_settings):
    raw = plain(config)
    raw["data"]["normalize"] = "auto"
    raw["train"] |= {"epochs": 1} | train_settings
    return parse_config(raw, "test")


@pytest.fixture
def entries(pyramids):
    return read_manifest(pyramids)


def test_the_model_has_what_stats_measures_of_the_training_split(config, entries, tmp_path, capsys):
    train(entries, auto(config), tmp_path / "run")
    expected = measure(entries)
    assert len(expected.downsamples) == 10
    for kept in (read_run(tmp_path / "run")["config"], plain(load_config(tmp_path / "run" / CONFIG))):
        assert kept["model"]["mean"] == pytest.approx(expected.means)
        assert kept["model"]["std"] == pytest.approx(expected.spreads)
        assert kept["data"]["normalize"] is None
    model, _ = load_model(model_folder(tmp_path / "run"))
    assert model.config.mean == pytest.approx(expected.means)
    assert "data.normalize: measured over 10 training slides: mean: [0.12" in capsys.readouterr().err
    rows = predict(entries[10:], tmp_path / "run", tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"}


def test_a_run_that_goes_on_keeps_what_it_began_with(config, entries, tmp_path, monkeypatch):
    train(entries, auto(config), tmp_path / "run")
    before = read_run(tmp_path / "run")["config"]["model"]
    monkeypatch.setattr(normalize, "measure", lambda *_, **__: pytest.fail("measured again"))
    metrics, _ = train(entries, auto(config, epochs=2), tmp_path / "run")
    assert metrics["epoch"] == 2
    assert read_run(tmp_path / "run")["config"]["model"] == before
    with pytest.raises(UsageError, match="holds a run of another configuration"):
        train(entries, replace_normalize(auto(config)), tmp_path / "run")
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(normalize, "measure", lambda *a, **k: seen.append(1) or measure(*a, **k))
    train(entries, auto(config), tmp_path / "run", overwrite=True)
    assert seen


def replace_normalize(config):
    raw = plain(config)
    raw["data"]["normalize"] = None
    return parse_config(raw, "test")


def test_every_fold_has_its_own(config, entries, tmp_path):
    folds = {
        str(fold): [replace(entry, split="val" if i // 2 % 2 == fold else "train") for i, entry in enumerate(entries)]
        for fold in range(2)
    }
    done = list(train_folds(folds, auto(config), tmp_path / "cv"))
    assert [result.error for result in done] == ["", ""]
    means = []
    for fold, own in folds.items():
        means.append(read_run(fold_folder(tmp_path / "cv", fold))["config"]["model"]["mean"])
        assert means[-1] == pytest.approx(measure(own).means)
    assert means[0] != means[1]


def test_it_is_measured_alike_wherever_it_is(config, entries, tmp_path):
    """Also where the folder of a run was lost and its copy is gone on with."""
    chosen = select(entries, auto(config), fail_fast=True)
    first, second = (
        worker_arguments(chosen, auto(config), tmp_path / name, mirror=None, fail_fast=True) for name in "ab"
    )
    assert first["config"] == second["config"]
    assert first["fingerprint"] == second["fingerprint"]
    plainly = worker_arguments(chosen, config, tmp_path / "a", mirror=None, fail_fast=True)
    assert plainly["fingerprint"] != first["fingerprint"]


def test_pixels_without_data_and_channels_that_are_not_seen_do_not_count(config, entries, tmp_path):
    rng = np.random.default_rng(0)
    scenes = []
    for entry in entries:
        pixels = rng.normal(5, 2, (3, 120, 150)).astype(np.float32)
        pixels[:, :60] = np.nan
        pixels[1] = 7.0
        write_pyramid(tmp_path / entry.slide_id, pixels, channels=("a", "b", "c"))
        scenes.append(replace(entry, path=str(tmp_path / entry.slide_id)))
    raw = plain(auto(config))
    raw["data"]["channels"] = ["c", "b"]
    train(scenes, parse_config(raw, "test"), tmp_path / "run")
    model = read_run(tmp_path / "run")["config"]["model"]
    assert model["mean"] == pytest.approx([5, 7], abs=0.05)
    assert model["std"] == pytest.approx([2, 1], abs=0.05)  # that of a constant is 1


def test_cases_are_measured_by_their_slides(config, entries, tmp_path):
    cases = [replace(entry, case_id=f"{entry.label}-{entry.split}-{i // 4}") for i, entry in enumerate(entries)]
    raw = plain(auto(config))
    raw["data"]["unit"], raw["model"]["prior"] = "case", "valid"
    train(cases, parse_config(raw, "test"), tmp_path / "run")
    assert read_run(tmp_path / "run")["config"]["model"]["mean"] == pytest.approx(measure(entries).means)


def test_a_dry_run_writes_nothing(config, entries, tmp_path):
    lines, failures = dry_run(entries, auto(config), tmp_path / "run")
    assert lines
    assert not failures
    assert not (tmp_path / "run").exists()


def test_what_is_given_besides_is_refused(config):
    raw = plain(auto(config))
    raw["model"]["mean"] = [0.1, 0.2, 0.3]
    with pytest.raises(UsageError, match="normalize: auto measures model.mean and model.std; leave these out"):
        parse_config(raw, "test")


def test_no_slide_that_can_be_measured_is_an_error(config, entries, tmp_path, monkeypatch):
    def unreadable(*_, **__):
        raise DataError("no slide can be used; the first: damaged")

    monkeypatch.setattr(normalize, "measure", unreadable)
    with pytest.raises(DataError, match="no slide can be used"):
        train(entries, auto(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
