"""Models on disk: a folder that is not whole, or not what it says, is refused by name, and nothing is unpickled."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from math import isfinite
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nested_ats import (
    ArrayImage,
    Classes,
    CNNConfig,
    Cox,
    DeepMILConfig,
    DiscreteSurvival,
    ImageModel,
    LevelConfig,
    ModelConfig,
    ModelFileError,
    MultiLabel,
    NestedATS,
    NestedATSError,
    Ordinal,
    Regression,
    UniformConfig,
    build_model,
    checkpoint,
    inspect_model,
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


def write(folder, description) -> None:
    """Write a description with the checksum that belongs to it, as somebody else's program could."""
    (folder / "config.json").write_text(json.dumps(description | {"sha256": checkpoint._checksum(description)}))


def change(folder, **entries) -> None:
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    write(folder, json.loads((folder / "config.json").read_text()) | {"weights_sha256": weights} | entries)


def earlier(folder):
    """Put down the classes as formats that know no other target do; return the description."""
    said = json.loads((folder / "config.json").read_text())
    said["classes"] = said.pop("target")["classes"]
    (folder / "config.json").write_text(json.dumps(said))
    return said


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
        change(folder, target={"kind": "classes", "classes": ["a", "b"]})
        with pytest.raises(ModelFileError, match=r"model\.safetensors: weights do not fit config\.json: .*head"):
            load_model(folder)

    @pytest.mark.parametrize("name", ["head.weight", "attention.1.layers.0.bias"])
    def test_one_missing(self, folder, name):
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors")
        change(folder)
        with pytest.raises(ModelFileError, match=name):
            load_model(folder)

    def test_one_too_many(self, folder):
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, "attention.2.layers.0.bias": torch.zeros(8)}, folder / "model.safetensors")
        change(folder)
        with pytest.raises(ModelFileError, match=r"attention\.2"):
            load_model(folder)

    def test_truncated_or_pickled(self, model, folder):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        for length in (0, 7, 100, len(whole) - 100):
            path.write_bytes(whole[:length])
            with pytest.raises(ModelFileError, match=r"model\.safetensors: damaged"):
                load_model(folder)
            change(folder)
            with pytest.raises(ModelFileError, match="not a whole safetensors file"):
                load_model(folder)
        torch.save(model.state_dict(), path)
        change(folder)
        with pytest.raises(ModelFileError, match=r"model\.safetensors: not a whole safetensors file"):
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
    del description["sha256"]  # always that of what is written
    refused = 0
    for *way, last in places(description):
        for wrong in WRONG:
            changed = node = copy.deepcopy(description)
            for key in way:
                node = node[key]
            right, node[last] = node[last], wrong
            write(tmp_path, changed)
            try:
                load_model(tmp_path, expect=ImageModel)
            except NestedATSError:
                refused += 1
            else:
                number = isinstance(right, float) and type(wrong) is int
                number |= last in ("mean", "std") and wrong == [1]  # of each channel, of which there is one
                number |= last == "mpp" and type(wrong) in (int, float) and wrong > 0  # none here
                number |= last == "nodata" and type(wrong) in (int, float) and -1 <= wrong <= 1  # likewise
                assert type(wrong) is type(right) or number, (way, last, wrong)
                assert not isinstance(wrong, float) or isfinite(wrong)
    assert refused > 100


def flipped(data: bytes, draws: random.Random) -> bytes:
    """The same with one bit changed."""
    changed = bytearray(data)
    changed[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_is_refused_or_changes_nothing(folder, name):
    whole, right = (folder / name).read_bytes(), inspect_model(folder)
    draws, refused = random.Random(0), 0
    for _ in range(1000):
        (folder / name).write_bytes(flipped(whole, draws))
        try:
            assert inspect_model(folder) == right
        except ModelFileError as error:
            assert str(folder / name) in str(error)  # noqa: PT017 - most are refused, some change nothing
            refused += 1
    assert refused > 990
    (folder / name).write_bytes(whole)
    load_model(folder)


def test_models_of_the_first_format_load_and_those_with_gaps_keep_them(folder, model):
    """They have no checksum of the description, and nothing to say that their gaps are meant."""
    description = json.loads((folder / "config.json").read_text())
    del description["sha256"], description["model"]["allow_gaps"]
    description["classes"] = description.pop("target")["classes"]
    level = dataclasses.asdict(LevelConfig(downsample=4.0, samples=3, stride=4)) | {"channels": [8, 8]}
    for first in ({}, {"weights_sha256": None}):
        kept = {key: value for key, value in description.items() if key not in first}
        (folder / "config.json").write_text(json.dumps(kept | {"format": "nested-ats/1"}))
        loaded, classes = load_model(folder)
        assert classes == list("abcd")
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    wide = {
        **description,
        "format": "nested-ats/1",
        "model": description["model"] | {"levels": [level | {"stride": 16}]},
    }
    (folder / "config.json").write_text(json.dumps(wide))
    assert inspect_model(folder).config.allow_gaps
    (folder / "config.json").write_text(json.dumps(wide | {"format": "nested-ats/4"}))
    with pytest.raises(ModelFileError, match="damaged, or edited by hand"):
        inspect_model(folder)


def test_models_of_the_second_format_load(folder, model):
    """Their encoder's options stood beside its name; see test_backbones for what those were."""
    said = earlier(folder)
    said["model"]["encoder_options"] = {}
    change(folder, format="nested-ats/2", model=said["model"])
    loaded, _ = load_model(folder)
    assert loaded.config == model.config
    change(folder, model=said["model"] | {"encoder_options": 3})
    with pytest.raises(ModelFileError, match="encoder_options: must be a mapping"):
        load_model(folder)
    change(folder, format="nested-ats/5", model=model.config.__dict__ | {"levels": said["model"]["levels"]})
    with pytest.raises(ModelFileError, match="format is 'nested-ats/5'"):
        load_model(folder)


def test_models_of_the_fourth_format_load(folder, model):
    """They know classes only."""
    earlier(folder)
    change(folder, format="nested-ats/4")
    loaded, classes = load_model(folder)
    assert classes == list("abcd")
    assert loaded.config == model.config
    change(folder, classes="abcd")
    with pytest.raises(ModelFileError, match="classes is 'abcd', not a list of names"):
        load_model(folder)


def test_pixels_normalised_channel_by_channel(tmp_path):
    config = dataclasses.replace(CONFIGS["uniform"], mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_model(tmp_path / "m", build_model(config, in_channels=3, classes=2), classes=["a", "b"])
    assert load_model(tmp_path / "m", expect=ImageModel)[0].config == config
    left_open = json.loads((tmp_path / "m" / "config.json").read_text())["model"] | {"mean": None}
    change(tmp_path / "m", model=left_open)
    with pytest.raises(ModelFileError, match="mean and std are missing"):
        load_model(tmp_path / "m", expect=ImageModel)


def test_two_classes_of_one_name_are_refused(folder):
    change(folder, target={"kind": "classes", "classes": ["a", "b", "a", "c"]})
    with pytest.raises(ModelFileError, match="must be different names"):
        load_model(folder)


TARGETS = [
    Classes(("a", "b")),
    Ordinal(("low", "middle", "high")),
    MultiLabel(("er", "pr")),
    Regression(3.5, 0.25),
    Cox(),
    DiscreteSurvival((1.5, 3.0)),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_every_target_is_kept(tmp_path, target):
    network = build_model(CONFIGS["ats"], in_channels=3, classes=target)
    save_model(tmp_path / "m", network)
    loaded, names = load_model(tmp_path / "m")
    assert loaded.target == inspect_model(tmp_path / "m").target == target
    assert tuple(names) == target.names
    picture, keys = ArrayImage(torch.rand(3, 60, 80), levels=3), torch.tensor([3])
    assert torch.equal(loaded([picture], keys).logits, network([picture], keys).logits)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (None, "NoneType"),
        ({"kind": "other"}, "other"),
        ({"kind": "regression", "mean": 0.0}, "std"),
        ({"kind": "regression", "mean": "0", "std": 1.0}, "mean is '0'"),
        ({"kind": "regression", "mean": 0.0, "std": -1.0}, "std: must be positive"),
        ({"kind": "survival", "times": [2.0, 1.0]}, "times: must increase"),
        ({"kind": "survival", "times": []}, "times: must increase"),
        ({"kind": "cox", "times": [1.0]}, "times"),
        ({"kind": "multilabel", "labels": []}, "must be different names"),
    ],
)
def test_what_is_no_target_is_refused(folder, target, reason):
    change(folder, target=target)
    with pytest.raises(ModelFileError, match=f"not a model description: .*{reason}"):
        load_model(folder)


def test_names_for_what_has_no_classes(tmp_path):
    network = build_model(CONFIGS["ats"], in_channels=3, classes=Regression(0.0, 1.0))
    with pytest.raises(ValueError, match="classes: 1 names for a target of kind regression"):
        save_model(tmp_path / "m", network, classes=["a"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
class TestWhatIsNoFile:
    """Refused at once: none of them may be waited for, or read without end."""

    def test_a_pipe(self, folder, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ModelFileError, match=f"{name}: .*a pipe, a device or a folder"):
            load_model(folder)

    def test_a_folder(self, folder, name):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(ModelFileError, match=f"{name}: .*a pipe, a device or a folder"):
            load_model(folder)

    @pytest.mark.parametrize("target", ["/dev/zero", "../out", "self"])
    def test_a_link_that_leads_out(self, folder, name, target):
        (folder / name).rename(folder.parent / "out")
        (folder / name).symlink_to(name if target == "self" else target)
        with pytest.raises(ModelFileError, match=f"{name}: .*(leads out of its folder|symbolic links)"):
            load_model(folder)

    def test_links_to_the_folder_and_within_it_are_followed(self, folder, name):
        (folder / name).rename(folder / "other")
        (folder / name).symlink_to("other")
        (folder.parent / "link").symlink_to(folder)
        load_model(folder.parent / "link")


def test_an_endless_description_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(ModelFileError, match=r"config\.json: .*longer than 67108864 bytes"):
        load_model(folder)


def test_looking_at_a_model_takes_no_memory_for_its_weights(tmp_path):
    model = build_model(DeepMILConfig(encoder="ilse", patch_size=64), in_channels=3, classes=2)
    save_model(tmp_path / "m", model, classes=["a", "b"])
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size > 20e6
    tracemalloc.start()
    try:
        inspect_model(tmp_path / "m")
        assert tracemalloc.get_traced_memory()[1] < size / 10
    finally:
        tracemalloc.stop()


def test_unknown_entries_are_refused(folder):
    description = json.loads((folder / "config.json").read_text())["model"]
    for model in (description | {"depth": 3}, description | {"kind": "other"}):
        change(folder, model=model)
        with pytest.raises(ModelFileError, match=r"config\.json"):
            load_model(folder)
