"""One process, one Ray worker and two Ray workers train the same model and predict the same classes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pipeline.manifest import read_manifest
from pipeline.predict import predict
from pipeline.runs import read_metrics
from pipeline.train import train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(ray_head, config, pyramids, tmp_path_factory):
    """Folders of the same run on no, one and two Ray workers."""
    folders = {}
    for name, address, workers in (("none", "none", 1), ("one", "local", 1), ("two", "local", 2)):
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        train(read_manifest(pyramids), config, folders[name], address=address, workers=workers, device="cpu")
    return folders


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_weights_agree(runs, name):
    alone = load_file(runs["none"] / "model" / "model.safetensors")
    other = load_file(runs[name] / "model" / "model.safetensors")
    for key, value in alone.items():
        torch.testing.assert_close(other[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_metrics_agree(runs, name):
    for one, other in zip(read_metrics(runs["none"]), read_metrics(runs[name]), strict=True):
        for key in ("epoch", "loss", "cross_entropy", "accuracy", "entropy"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


def test_predictions_agree(runs, pyramids, tmp_path):
    entries = read_manifest(pyramids)
    here = predict(entries, runs["none"], tmp_path / "here", device="cpu")
    there = predict(entries, runs["none"], tmp_path / "there", address="local", workers=2, device="cpu")
    for one, other in zip(here, there, strict=True):
        assert one["status"] == "ok"
        for key in one.keys() - {"seconds"}:
            number = isinstance(one[key], float)
            assert other[key] == (pytest.approx(one[key], rel=1e-4, abs=1e-6) if number else one[key]), key
