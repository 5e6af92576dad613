"""Every kind of model trains, is classified with and explained by the same commands."""

import pytest

from pipeline.config import load_config, parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.results.heatmap import heatmaps
from pipeline.results.map_files import OBJECTS
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.training.train import train

KINDS = {
    "deepmil": {"kind": "deepmil", "patch_size": 24, "stride": 24, "features": 8, "attention": "gated"},
    "uniform": {"kind": "uniform", "patch_size": 24, "samples": 4, "cell": 16, "features": 8},
    "cnn": {"kind": "cnn", "encoder": "resnet8", "downsample": 2, "features": 8},
    "located": {
        "levels": [{"downsample": 4, "samples": 3, "stride": 4, "channels": [4]}],
        "patch_size": 24,
        "features": 8,
        "location": True,
        "method": "desraj",
    },
    "frozen": {"kind": "uniform", "patch_size": 24, "samples": 2, "cell": 16, "features": 8, "trainable": "none"},
}


@pytest.fixture(scope="module")
def runs(pyramids, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def get(kind):
        if not (folder / kind / "model").exists():
            config = parse_config({"model": KINDS[kind], "train": {"epochs": 2, "batch_size": 4}}, "test")
            _, failures = train(read_manifest(pyramids), config, folder / kind)
            assert failures == []
        return folder / kind

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_trains_resumes_and_classifies(runs, pyramids, tmp_path, kind):
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "test"]
    rows = predict(entries, runs(kind), tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 4
    drawn = kind in ("uniform", "located", "frozen")
    assert {row["draws"] for row in rows} == {4 if drawn else 1}
    assert all((row["se_bar"] > 0) == drawn for row in rows)
    again = train(
        read_manifest(pyramids),
        parse_config({"model": KINDS[kind], "train": {"epochs": 2, "batch_size": 4}}, ""),
        runs(kind),
    )
    assert again[1] == []


@pytest.mark.parametrize("kind", ["deepmil", "uniform", "located"])
def test_is_explained(runs, pyramids, tmp_path, kind):
    done = heatmaps(read_manifest(pyramids)[:1], prediction_settings(runs(kind)), tmp_path)
    assert [one.error for one in done] == [""]
    assert (done[0].folder / OBJECTS).read_text().count("sampled patch") > 0


def test_a_cnn_has_nothing_to_draw(runs, pyramids, tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        heatmaps(read_manifest(pyramids)[:1], prediction_settings(runs("cnn")), tmp_path)


def test_budgets_are_those_of_the_kind(runs):
    assert prediction_settings(runs("uniform"), samples=(9,)).samples == (9,)
    for kind, samples, levels in (("uniform", (1, 2), 1), ("cnn", (4,), 0), ("located", (1, 2), 1)):
        with pytest.raises(UsageError, match=f"draws at {levels} levels"):
            prediction_settings(runs(kind), samples=samples)


def test_drawing_stops_at_an_error_or_encodes_every_patch(runs, finished, pyramids, tmp_path):
    entries = read_manifest(pyramids)[:2]
    easy = predict(entries, finished, tmp_path / "easy", draws=40, target_error=0.5)
    assert {row["draws"] for row in easy} == {4}
    hard = predict(entries, finished, tmp_path / "hard", draws=12, target_error=1e-9)
    assert {row["draws"] for row in hard} == {12}
    exact = predict(entries, finished, tmp_path / "exact", exact=True)
    assert all(row["draws"] == 2 and row["se_bar"] > 0 for row in exact)  # of the regions
    every = predict(entries, runs("located"), tmp_path / "every", exact=True)
    assert all(row["draws"] == 1 and row["se_bar"] == 0 for row in every)  # one level: nothing is drawn
    assert all(row["low_bar"] == row["prob_bar"] == row["high_bar"] for row in every)


def test_keys_of_another_kind_are_refused_and_kinds_named():
    with pytest.raises(UsageError, match=r"unknown key model\.levels"):
        parse_config({"model": {"kind": "deepmil", "levels": []}}, "c.yaml")
    with pytest.raises(UsageError, match="ats.*deepmil.*uniform.*cnn"):
        parse_config({"model": {"kind": "resnet"}}, "c.yaml")
    assert load_config(None, ["model.kind=uniform", "model.samples=7"]).model.samples == 7
    assert load_config(None, ["model.levels.0.samples=16"]).model.levels[0].samples == 16
    config = parse_config({"model": KINDS["deepmil"]}, "")
    assert parse_config(plain(config), "") == config


def test_an_encoder_of_ones_own_is_trusted_only_if_asked(pyramids, tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(
        "from torch import nn\n"
        "def small(*, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 6, 5, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = {"kind": "uniform", "patch_size": 24, "samples": 2, "cell": 16, "encoder": "my_encoders:small"}
    config = parse_config({"model": model, "train": {"epochs": 1, "batch_size": 4}}, "test")
    entries = read_manifest(pyramids)
    train(entries, config, tmp_path / "run")
    with pytest.raises(UsageError, match=r"code to import, my_encoders:small; if you trust it, give --trust-encoder"):
        predict(entries[:1], tmp_path / "run", tmp_path / "out")
    [row] = predict(entries[:1], tmp_path / "run", tmp_path / "out", trust_encoder=True)
    assert row["status"] == "ok"
