"""One process and any number of workers compute the same gradients, train the same model and predict the same."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from cluster import LocalContext
from nested_ats import Classes
from pipeline.config import parse_config, plain
from pipeline.data.manifest import read_manifest
from pipeline.results.predict import predict
from pipeline.runs import read_metrics
from pipeline.training.train import train
from pipeline.training.trainer import Trainer

TARGET = Classes(("bar", "box"))


def on_ray(test):
    for mark in (pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)):
        test = mark(test)
    return test


class Peers:
    """A group of workers in the threads of this process."""

    def __init__(self, size):
        self.barrier, self.tensors = threading.Barrier(size, timeout=60), [None] * size
        self.contexts = [self.Context(self, rank, size) for rank in range(size)]

    class Context(LocalContext):
        def __init__(self, peers, rank, size):
            super().__init__()
            self.peers, self.rank, self.world_size = peers, rank, size

        def all_reduce(self, tensor):
            self.peers.tensors[self.rank] = tensor.clone()
            self.peers.barrier.wait()
            tensor.copy_(sum(self.peers.tensors))
            self.peers.barrier.wait()


@pytest.mark.parametrize(("workers", "standardise"), [(2, False), (3, True), (7, False)])
def test_the_gradient_of_a_step_is_that_of_one_worker(config, pyramids, tmp_path, workers, standardise):
    """Five slides: uneven over two and three workers, and too few for seven."""
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"][:5]
    model = {**plain(config)["model"], "standardise": standardise}
    course = {"epochs": 1, "batch_size": 5, "class_weights": "balanced"}
    once = parse_config({**plain(config), "model": model, "train": course}, "")

    def gradients(size):
        folder = tmp_path / str(size)
        folder.mkdir()
        # Made one after the other: their first weights come from torch's global generator.
        trainers = [Trainer(context, once, entries, TARGET, 3, folder) for context in Peers(size).contexts]
        with ThreadPoolExecutor(size) as pool:
            list(pool.map(lambda trainer: trainer.run(lambda *_: None), trainers))
        return [{name: p.grad for name, p in trainer.model.named_parameters()} for trainer in trainers]

    [alone] = gradients(1)
    assert sum(float(gradient.abs().sum()) for gradient in alone.values()) > 0.1
    for one in gradients(workers):
        for name, gradient in alone.items():
            torch.testing.assert_close(one[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def runs(ray_head, config, pyramids, tmp_path_factory):
    """Folders of the same run on no, one and two Ray workers."""
    folders = {}
    for name, address, workers in (("none", "none", 1), ("one", "local", 1), ("two", "local", 2)):
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        train(read_manifest(pyramids), config, folders[name], address=address, workers=workers, device="cpu")
    return folders


@on_ray
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_weights_agree(runs, name):
    alone = load_file(runs["none"] / "model" / "model.safetensors")
    other = load_file(runs[name] / "model" / "model.safetensors")
    for key, value in alone.items():
        torch.testing.assert_close(other[key], value, atol=5e-4, rtol=1e-3)


@on_ray
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_metrics_agree(runs, name):
    for one, other in zip(read_metrics(runs["none"]), read_metrics(runs[name]), strict=True):
        for key in ("epoch", "loss", "cross_entropy", "accuracy", "entropy"):
            assert other[key] == pytest.approx(one[key], rel=1e-3), key


@on_ray
def test_predictions_agree(runs, pyramids, tmp_path):
    entries = read_manifest(pyramids)
    here = predict(entries, runs["none"], tmp_path / "here", device="cpu")
    there = predict(entries, runs["none"], tmp_path / "there", address="local", workers=2, device="cpu")
    for one, other in zip(here, there, strict=True):
        assert one["status"] == "ok"
        # Two threads that want one index of chunks at the same moment may both read it.
        for key in one.keys() - {"seconds", "requests", "bytes_read"}:
            number = isinstance(one[key], float)
            assert other[key] == (pytest.approx(one[key], rel=1e-4, abs=1e-6) if number else one[key]), key
