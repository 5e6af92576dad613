"""Models on disk: a folder that is not whole, or not what it says, is refused by name, and nothing is unpickled."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from math import isfinite
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_ats import (
    ArrayImage,
    CNNConfig,
    DeepMILConfig,
    ImageModel,
    LevelConfig,
    ModelConfig,
    ModelFileError,
    NestedATS,
    NestedATSError,
    UniformConfig,
    build_model,
    load_model,
    save_model,
)

CONFIGS = {
    "ats": ModelConfig(
        levels=(LevelConfig(downsample=4.0, samples=3, stride=4), LevelConfig(downsample=2.0, size=16, samples=3)),
        patch_size=28,
    ),
    "deepmil": DeepMILConfig(patch_size=28, stride=20),
    "uniform": UniformConfig(patch_size=28, samples=3, cell=16.0),
    "cnn": CNNConfig(downsample=2.0, features=8),
}


@pytest.fixture
def model() -> NestedATS:
    torch.manual_seed(0)
    network = build_model(CONFIGS["ats"], in_channels=3, classes=4)
    assert isinstance(network, NestedATS)
    return network


@pytest.fixture
def folder(model, tmp_path):
    save_model(tmp_path / "m", model, classes=list("abcd"))
    return tmp_path / "m"


def change(folder, **entries) -> None:
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | entries))


def test_round_trip(model, folder):
    loaded, classes = load_model(folder)
    assert classes == list("abcd")
    assert loaded.config == model.config
    assert loaded.training  # the mode is the caller's
    picture = ArrayImage(torch.rand(3, 60, 80), levels=3)
    keys = torch.tensor([3])
    assert torch.equal(loaded([picture], keys).logits, model([picture], keys).logits)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_the_model(model, folder):
    save_model(folder, model, classes=list("wxyz"))
    assert load_model(folder)[1] == list("wxyz")
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_a_reader_always_finds_a_model_while_another_takes_its_place(model, folder):
    saver = Thread(target=lambda: [save_model(folder, model, classes=list("wxyz")) for _ in range(20)])
    saver.start()
    found = [True]
    while saver.is_alive():
        found.append((folder / "config.json").exists())
    saver.join()
    assert all(found)


def test_a_system_that_cannot_exchange_folders(model, folder, monkeypatch):
    monkeypatch.setattr("nested_ats.checkpoint._exchange", lambda *_: False)
    test_saving_again_replaces_the_model(model, folder)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_have_the_mode_that_the_umask_gives(model, tmp_path, mask):
    before = os.umask(mask)
    try:
        save_model(tmp_path / "m", model, classes=list("abcd"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=f"{name}: no such file"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "null", '{"format": "other"}', "\x80\x04K\x01.", "[" * 100_000, '{"format": "nested-ats/1"}'],
)
def test_not_a_description(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        load_model(folder)


class TestWeights:
    def test_of_other_shapes(self, folder):
        change(folder, classes=["a", "b"])
        with pytest.raises(ModelFileError, match=r"model\.safetensors: weights do not fit config\.json: .*head"):
            load_model(folder)

    @pytest.mark.parametrize("name", ["head.weight", "attention.1.layers.0.bias"])
    def test_one_missing(self, folder, name):
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(ModelFileError, match=name):
            load_model(folder)

    def test_one_too_many(self, folder):
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, "attention.2.layers.0.bias": torch.zeros(8)}, folder / "model.safetensors")
        with pytest.raises(ModelFileError, match=r"attention\.2"):
            load_model(folder)

    def test_one_flipped_bit(self, folder):
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match=r"model\.safetensors: damaged"):
            load_model(folder)

    def test_truncated_or_pickled(self, model, folder):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        for length in (0, 7, 100, len(whole) - 100):
            path.write_bytes(whole[:length])
            with pytest.raises(ModelFileError, match="safetensors"):
                load_model(folder)
        torch.save(model.state_dict(), path)
        with pytest.raises(ModelFileError, match="safetensors"):
            load_model(folder)

    def test_nothing_is_unpickled(self, folder, monkeypatch):
        """Whatever lies in the folder: the readers of pickles are not so much as called."""
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(f"pickle.{name}", lambda *_, **__: pytest.fail("unpickled"))
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
        (folder / "model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        load_model(folder)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every entry of a JSON value."""
    entries = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


WRONG = [None, "x", "", -1, 0, 1.5, True, [], [1], {}, float("nan"), float("inf"), -float("inf"), 10**15, 10**400]


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_values_at_every_place_are_refused_or_of_the_right_type(kind, tmp_path):
    """No other error escapes, and no value of another type gets into a model."""
    save_model(tmp_path, build_model(CONFIGS[kind], in_channels=1, classes=2), classes=["a", "b"])
    description = json.loads((tmp_path / "config.json").read_text())
    refused = 0
    for *way, last in places(description):
        for wrong in WRONG:
            changed = node = copy.deepcopy(description)
            for key in way:
                node = node[key]
            right, node[last] = node[last], wrong
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                load_model(tmp_path, expect=ImageModel)
            except NestedATSError:
                refused += 1
            else:
                number = isinstance(right, float) and type(wrong) is int
                assert type(wrong) is type(right) or number, (way, last, wrong)
                assert not isinstance(wrong, float) or isfinite(wrong)
    assert refused > 100


def test_unknown_entries_are_refused(folder):
    description = json.loads((folder / "config.json").read_text())["model"]
    for model in (description | {"depth": 3}, description | {"kind": "other"}):
        change(folder, model=model)
        with pytest.raises(ModelFileError, match=r"config\.json"):
            load_model(folder)
