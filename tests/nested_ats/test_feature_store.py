"""Features once: what a frozen encoder made of a patch is used again, and never that of something else."""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from nested_ats import (
    ArrayImage,
    DeepMILConfig,
    LevelConfig,
    ModelConfig,
    UniformConfig,
    build_model,
    feature_store,
    predict,
)

LEVELS = (LevelConfig(downsample=4, samples=4, stride=4), LevelConfig(downsample=2, size=16, samples=5, stride=4))
CONFIG = ModelConfig(levels=LEVELS, patch_size=24, features=8, trainable="none")
KEYS = torch.arange(2)


class DictStore:
    """All that was put, and how much of what was asked for was there."""

    def __init__(self):
        self.rows, self.found, self.asked = {}, 0, 0

    def get(self, name, places, width):
        rows = [self.rows.get((name, *place)) for place in places.tolist()]
        found = torch.tensor([row is not None for row in rows])
        self.asked, self.found = self.asked + len(rows), self.found + int(found.sum())
        return torch.stack([torch.full((width,), torch.nan) if row is None else row for row in rows]), found

    def put(self, name, places, rows):
        assert len(places.unique(dim=0)) == len(places)
        self.rows |= {(name, *place): row.clone() for place, row in zip(places.tolist(), rows, strict=True)}


class Known(ArrayImage):
    """An image with an identity, that counts the patches that are read of it."""

    def __init__(self, seed, identity="", side=160):
        super().__init__(torch.rand(3, side, side + 40, generator=torch.Generator().manual_seed(seed)), levels=3)
        self.identity, self.patches = identity or f"image {seed}", 0

    def read(self, level, boxes):
        self.patches += len(boxes) * (level == 0)
        return super().read(level, boxes)


@pytest.fixture
def images():
    return [Known(0), Known(1)]


def made(config=CONFIG, store=None):
    torch.manual_seed(0)
    model = build_model(config, in_channels=3, classes=2)
    model.store = store
    return model


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, location=True),
        replace(CONFIG, method="multinomial"),  # draws some patches twice
        UniformConfig(patch_size=24, features=8, samples=7, cell=16.0, trainable="none"),
        DeepMILConfig(patch_size=24, features=8, stride=20, chunk=7, trainable="none"),
        DeepMILConfig(patch_size=24, features=8, stride=20, recompute=True, trainable="none"),
    ],
)
def test_outputs_and_gradients_are_those_without_a_store(config, images):
    plain, store = made(config), DictStore()
    keeping = made(config, store)
    plain(images, KEYS).logits.sum().backward()
    expected, read = plain(images, KEYS), sum(image.patches for image in images) // 2
    for first in (True, False):
        for image in images:
            image.patches = 0
        found = keeping(images, KEYS)
        for name in ("logits", "entropy", "features"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=1e-5)
        assert (0 < sum(image.patches for image in images) <= read) is first  # the second time nothing is read
        keeping.zero_grad()
        found.logits.sum().backward()
        for (name, one), other in zip(keeping.named_parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert store.found == store.asked / 2


def test_exact_evaluation_shares_what_was_drawn(images):
    store = DictStore()
    model = made(store=store).eval()
    model(images, KEYS)
    drawn = len(store.rows)
    exact = predict(model, images, KEYS[:, None], exact=7)
    assert store.found > drawn / 2
    assert len(store.rows) > 2 * drawn
    plain = predict(made().eval(), images, KEYS[:, None], exact=7)
    torch.testing.assert_close(exact.probabilities, plain.probabilities, atol=1e-6, rtol=1e-5)


def test_what_was_found_and_what_was_not_come_in_order(images):
    store, centers = DictStore(), torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(0)).double() * 150
    model, plain = made(store=store), made()
    model.encode(images, centers[:, 3:5])
    model.encode(images[:1], centers[:1, 7:])
    torch.testing.assert_close(model.encode(images, centers), plain.encode(images, centers), atol=1e-6, rtol=1e-5)
    assert store.found == 6
    one = model.encode(images[1:], centers[1:].flip(1))[0]
    torch.testing.assert_close(one, plain.encode(images, centers)[1].flip(0), atol=1e-6, rtol=1e-5)


def test_an_observer_hears_of_every_patch_whether_found_or_not(images):
    model, heard = made(store=DictStore()), []
    model.observe = heard.append
    centers = torch.tensor([[[40.0, 40.0], [90.0, 70.0], [40.0, 40.0]]]).double()
    for _ in range(2):
        model.encode(images[:1], centers)
    assert torch.equal(*heard)
    model.store = None
    model.encode(images[:1], centers)
    torch.testing.assert_close(heard[2], heard[0])
    assert heard[0][0] == heard[0][2] != heard[0][1]


@pytest.mark.parametrize(
    "config",
    [replace(CONFIG, trainable="all"), replace(CONFIG, trainable=1)],
)
def test_an_encoder_that_learns_keeps_nothing(config, images):
    store = DictStore()
    made(config, store)(images, KEYS)
    assert not store.asked
    assert not store.rows


def test_other_types_of_weights_keep_nothing(images):
    store = DictStore()
    made(store=store).double()(images, KEYS)
    assert not store.asked


def test_images_without_an_identity_keep_nothing(images):
    store, anonymous = DictStore(), ArrayImage(torch.rand(3, 160, 200), levels=3)
    one, other = made(store=store)([images[0], anonymous], KEYS), made()([images[0], anonymous], KEYS)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-6, rtol=1e-5)
    assert 0 < len(store.rows) <= 5
    assert {name for name, *_ in store.rows} == {next(iter(store.rows))[0]}


def change_weights(model):
    with torch.no_grad():
        next(model.encoder.parameters())[0, 0, 0, 0] += 1e-6


def change_memory(model):
    weight = next(model.encoder.parameters())
    weight.data = weight.data * 1.01


def load_weights(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["encoder.layers.0.bias"][0] += 1e-6
    model.load_state_dict(state)


def assign_weights(model):
    state = {name: value * 1.01 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.encoder.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("change", [change_weights, change_memory, load_weights, assign_weights])
def test_changed_weights_find_nothing_of_the_old_ones(change, images):
    store = DictStore()
    model = made(store=store)
    centers = torch.tensor([[[50.0, 60.0]]]).double()
    model.encode(images[:1], centers)
    change(model)
    model.encode(images[:1], centers)
    assert store.found == 0
    made(store=store).encode(images[:1], centers)  # of the same weights as the first
    assert store.found == 1


def test_tensors_are_hashed_once_and_those_that_changed_again(images, monkeypatch):
    hashed = []
    hash_tensor = feature_store._hash_tensor
    monkeypatch.setattr(feature_store, "_hash_tensor", lambda tensor: hashed.append(tensor) or hash_tensor(tensor))
    store = DictStore()
    model = made(store=store)
    centers = torch.tensor([[[50.0, 60.0]]]).double()
    for _ in range(3):
        model.encode(images[:1], centers)
    assert len(hashed) == len(list(model.encoder.parameters()))
    weight = next(model.encoder.parameters())
    for factor in (1.01, 1.0, 1 / 1.01):  # the second changes nothing
        with torch.no_grad():
            weight.mul_(factor)
        found = store.found
        model.encode(images[:1], centers)
        assert hashed[-1] is weight
        assert store.found - found == (factor == 1.0)
    assert len(hashed) == len(list(model.encoder.parameters())) + 3


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"patch_size": 25}, False),
        ({"patch_downsample": 2.0, "patch_size": 24}, False),
        ({"mean": 0.51}, False),
        ({"mean": (0.5, 0.5, 0.51)}, False),
        ({"std": 0.26}, False),
        ({"encoder": "resnet"}, False),
        ({"encoder": "mobilenet_v2", "patch_size": 32}, False),
        ({"scale": 1.0}, True),
        ({"location": True}, True),
        ({"prior": "tissue"}, True),
        ({"attention": "independent"}, True),
        ({"levels": (replace(LEVELS[0], samples=9), LEVELS[1])}, True),
    ],
)
def test_all_that_decides_a_feature_is_told_apart_and_nothing_else(changes, shared, images):
    store = DictStore()
    first = made(store=store)
    centers = torch.tensor([[[50.0, 60.0]]]).double()
    first.encode(images[:1], centers)
    other = made(replace(CONFIG, **changes), store)
    same = first.encoder.state_dict()
    if same.keys() == other.encoder.state_dict().keys():
        other.encoder.load_state_dict(same)  # its first weights depend on what is made before it
    other.encode(images[:1], centers)
    assert store.found == int(shared)


def test_other_pixels_are_told_apart(images):
    store = DictStore()
    model = made(store=store)
    centers = torch.tensor([[[50.0, 60.0]]]).double()
    model.encode(images[:1], centers)
    model.encode(images[1:], centers)
    model.encode([Known(0, "moved")], centers)
    assert store.found == 0
    model.encode([Known(7, images[0].identity)], centers)  # the identity is believed
    assert store.found == 1


def test_precisions_are_told_apart(images):
    store = DictStore()
    model, plain = made(store=store), made()
    centers = torch.tensor([[[50.0, 60.0], [20.0, 90.0]]]).double()
    single = model.encode(images[:1], centers)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        half, again = model.encode(images[:1], centers), model.encode(images[:1], centers)
        assert store.found == 2
        torch.testing.assert_close(half, plain.encode(images[:1], centers), atol=1e-3, rtol=1e-2)
    assert torch.equal(half, again)
    assert not torch.equal(half, single)
    assert half.dtype == torch.float32


CODE = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, patches):
        return self.factor * patches.mean((-2, -1)) * {factor}

def build(in_channels):
    return Mean()
"""


def test_changed_code_of_an_encoder_is_told_apart(images, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    store, config = DictStore(), replace(CONFIG, encoder="some_encoder:build")
    centers = torch.tensor([[[50.0, 60.0]]]).double()
    for number, factor in enumerate((1.0, 1.0, 3.25)):
        (tmp_path / "some_encoder.py").write_text(CODE.format(factor=factor))
        sys.modules.pop("some_encoder", None)
        importlib.invalidate_caches()
        made(config, store).encode(images[:1], centers)
        assert store.found == min(number, 1)
    del sys.modules["some_encoder"]


def test_an_encoder_whose_code_cannot_be_seen_keeps_nothing(images):
    store = DictStore()
    model = made(store=store)
    example = torch.rand(2, 3, 24, 24)
    with warnings.catch_warnings(action="ignore"):  # newer versions say that tracing goes away
        model.encoder = torch.jit.trace(model.encoder, example)
    model.encode(images[:1], torch.tensor([[[50.0, 60.0]]]).double())
    assert not store.asked
