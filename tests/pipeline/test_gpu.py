"""A GPU computes what a processor does: in training, in prediction, and in both on Ray's workers that share it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster import LocalContext
from nested_ats import ArrayImage, Classes, ModelConfig, NestedATS
from pipeline.config import parse_config, plain
from pipeline.data.manifest import Entry, read_manifest
from pipeline.results.predict import predict
from pipeline.runs import read_metrics
from pipeline.training.train import train
from pipeline.training.trainer import Trainer
from storage import write_pyramid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU on this machine")


@pytest.fixture(autouse=True)
def _whole_float32():
    """Convolutions on a GPU have ten bits by default; here they have all."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


def gradients(context, config, entries, folder):
    folder.mkdir()
    trainer = Trainer(context, config, entries, Classes(("bar", "box")), 3, folder)
    trainer.run(lambda *_: None)
    return {name: parameter.grad.cpu() for name, parameter in trainer.model.named_parameters()}


def test_the_gradient_of_a_step_is_the_processors(config, pyramids, tmp_path):
    entries = [entry for entry in read_manifest(pyramids) if entry.split == "train"][:5]
    once = parse_config({**plain(config), "train": {"epochs": 1, "batch_size": 5}}, "")
    here = gradients(LocalContext(), once, entries, tmp_path / "cpu")
    there = gradients(LocalContext("cuda:0"), once, entries, tmp_path / "gpu")
    assert sum(float(each.abs().sum()) for each in here.values()) > 0.1
    for name, each in here.items():
        torch.testing.assert_close(there[name], each, atol=2e-5, rtol=1e-3, msg=name)


def test_pixels_go_through_pinned_memory(monkeypatch):
    pinned = []
    plain_pin = torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.shape) or plain_pin(self))
    levels = [{"downsample": 2, "samples": 3, "stride": 8, "channels": (4,)}]
    config = parse_config({"model": {"levels": levels, "patch_size": 24, "features": 8}}, "").model
    assert isinstance(config, ModelConfig)
    model = NestedATS(config, in_channels=3, classes=2).cuda().eval()
    image = ArrayImage(torch.rand(3, 64, 64), levels=2)
    keys = torch.tensor([1])
    found = model([image], keys).logits
    assert len(pinned) >= 2, "the view and the patches"
    torch.testing.assert_close(found.cpu(), model.cpu()([image], keys).logits, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Slides whose class is their colour, which is learned in seconds; the shapes of `pyramids` are not."""
    folder = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(14):
        pixels = rng.integers(0, 60, (3, 120 + 8 * (i % 3), 150), dtype=np.uint8)
        pixels[i % 2] += 150
        path = folder / f"slide {i}.ome.zarr"
        write_pyramid(path, pixels, mpp=0.5)
        split = "train" if i < 10 else "test"
        entries.append(Entry(slide_id=f"slide {i}", path=str(path), label=("bar", "box")[i % 2], split=split))
    return entries


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_and_predicts_in_either_precision(config, coloured, tmp_path, precision):
    course = {"epochs": 20, "batch_size": 5, "learning_rate": 5e-3, "precision": precision}
    train(coloured, parse_config({**plain(config), "train": course}, ""), tmp_path / "run", device="cuda")
    losses = [each["cross_entropy"] for each in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] / 2
    there = predict(coloured, tmp_path / "run", tmp_path / "cuda", device="cuda")
    here = predict(coloured, tmp_path / "run", tmp_path / "cpu", device="cpu")
    for one, other in zip(here, there, strict=True):
        assert one["status"] == other["status"] == "ok"
        assert other["prob_bar"] == pytest.approx(one["prob_bar"], abs=1e-5), "other draws move it by up to 1e-4"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_on_a_gpu_agree_with_none(gpu_head, config, pyramids, tmp_path):
    """One worker trains by NCCL; two actors predict on one GPU."""
    entries = read_manifest(pyramids)
    train(entries, config, tmp_path / "none", device="cuda")
    train(entries, config, tmp_path / "ray", address="local", workers=1, device="cuda")
    alone, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("none", "ray"))
    for key, value in alone.items():
        torch.testing.assert_close(other[key], value, atol=5e-3, rtol=1e-2, msg=key)
    here = predict(entries, tmp_path / "none", tmp_path / "here", device="cuda")
    there = predict(entries, tmp_path / "none", tmp_path / "there", address="local", workers=2, device="cuda")
    for one, two in zip(here, there, strict=True):
        assert one["status"] == two["status"] == "ok"
        assert two["prob_bar"] == pytest.approx(one["prob_bar"], abs=1e-3)
