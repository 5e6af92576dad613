"""Configuration: overrides, and every mistake named at once."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from nested_ats.models.kinds import KINDS
from pipeline.config import Config, digest, dump_config, load_config, plain
from pipeline.errors import UsageError
from pipeline.sections import CacheConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
SIGNS = EXAMPLES / "signs.yaml"


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_round_trip(tmp_path):
    config = load_config(None)
    assert config == Config()
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("name", ["histology", "scenes"])
def test_patches_of_the_examples_repeat_and_cover_what_they_are_drawn_from(name):
    """Features are kept by the place of a patch, so cells of the last level are as large as one, on one grid."""
    model = load_config(EXAMPLES / f"{name}.yaml").model
    first, last = model.levels
    assert last.extent_l0 == model.patch_size * model.patch_downsample
    assert first.extent_l0 == last.size * last.downsample
    assert first.extent_l0 % last.extent_l0 == 0
    assert model.trainable == "none"
    assert model.standardise


def test_file_and_overrides(tmp_path):
    path = write(tmp_path, "train: {epochs: 3}\nmodel:\n  levels: [{downsample: 8, samples: 4, stride: 2}]\n")
    config = load_config(path, ["train.epochs=5", "model.levels.0.samples=9", "model.encoder=resnet", "seed=7"])
    assert config.train.epochs == 5
    assert config.model.levels[0].samples == 9
    assert config.model.levels[0].stride == 2
    assert config.model.encoder == "resnet"
    assert config.seed == 7


def test_override_of_the_model_keeps_the_default_levels():
    assert load_config(None, ["model.encoder=resnet"]).model.levels == Config().model.levels


class TestEncoder:
    @pytest.mark.parametrize("text", ["", "model: {encoder: resnet}", "model: {encoder: {name: resnet, stem: 3}}"])
    def test_weights_by_an_override_keep_the_name(self, tmp_path, text, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = load_config(write(tmp_path, text), ["model.encoder.weights=w.pth"])
        whole = {"weights": str(tmp_path / "w.pth")}  # workers may run in other folders
        options = {"stem": 3} if "stem" in text else {}
        assert config.model.encoder == {"name": "resnet" if text else "lenet", **whole, **options}
        assert load_config(write(tmp_path, dump_config(config))) == config

    def test_of_the_kind(self):
        config = load_config(None, ["model.kind=cnn", "model.encoder.stem=7"])
        assert config.model.encoder == {"name": "resnet16", "stem": 7}

    def test_random_weights_are_no_path(self):
        config = load_config(None, ["model.encoder.name=timm/resnet18", "model.encoder.weights=random"])
        assert config.model.encoder == {"name": "timm/resnet18", "weights": "random"}

    def test_options_as_they_stood_before(self, tmp_path):
        path = write(tmp_path, "model: {encoder: timm, encoder_options: {name: resnet18, checkpoint: /w.pth}}")
        assert load_config(path, ["model.scale=8"]).model.encoder == {"name": "timm/resnet18", "weights": "/w.pth"}
        config = load_config(path, ["model.encoder.drop_rate=0.5"])
        assert config.model.encoder == {"name": "timm/resnet18", "weights": "/w.pth", "drop_rate": 0.5}
        with pytest.raises(UsageError, match=r"model\.encoder_options: must be a mapping"):
            load_config(write(tmp_path, "model: {encoder_options: 3}"))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("model.encoder=3", r"model\.encoder: Input should be a valid string; model\.encoder: .*dictionary"),
            ("model.encoder={weights: x}", "mapping with a name"),
            ("model.encoder.weights=3", "weights must be the path"),
            ("model.encoder=uni", "patch_size: uni takes patches of 224 pixels"),
            ("model.trainable={lora: x}", "trainable"),
        ],
    )
    def test_mistakes(self, setting, message):
        with pytest.raises(UsageError, match=message):
            load_config(None, [setting])


def test_override_of_a_default_level():
    assert load_config(None, ["model.levels.1.samples=32"]).model.levels[1].samples == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 3}", r"unknown key train\.epoch \(did you mean epochs\?\)"),
        ("model: {levels: [{downsample: 8, sample: 4}]}", r"unknown key model\.levels\.0\.sample .*samples"),
        ("trian: {}", "unknown key trian.*train"),
        ("train: {epochs: 0}", r"train\.epochs: .*greater than or equal to 1"),
        ("train: {epochs: many}", r"train\.epochs: .*integer"),
        ("model: {patch_size: 8, encoder: vgg, levels: [{downsample: 8, samples: 4}]}", "encoder: must be one of"),
        ("model: {levels: []}", "at least one"),
        ("[1, 2]", "mapping"),
        ("a: [", "not YAML"),
        ("data: {test: 0.6, validation: 0.5}", "leave slides to train on"),
        ("seed: 36893488147419103232", "seed"),
        ("[" * 3000, "not YAML"),
        ("seed: 2020-13-45", "not YAML"),
        ("model: {kind: vit}", "model.kind: not one of ats, deepmil, uniform, cnn$"),
        ("model: {kind: null}", "model.kind: not one of ats, deepmil, uniform, cnn$"),
        ("model: 3", "model: must be a mapping of keys to values$"),
        (
            "model: {kind: cnn, levels: []}",
            r"key model\.levels \(models of kind ats have it, this one is of kind cnn",
        ),
        ("epochs: 3", r"unknown key epochs \(did you mean train\.epochs\?\)"),
        ("train: {flip: true}", r"unknown key train\.flip \(did you mean train\.augment\.flip\?\)"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(UsageError, match="epochs.*batch_sise"):
        load_config(write(tmp_path, "train: {epochs: -1, batch_sise: 2}"))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "setting", ["train.epochs", "model.levels.5.samples=3", "seed.a=1", "seed=[", "seed=" + "[" * 3000]
)
def test_wrong_overrides(setting):
    with pytest.raises(UsageError, match="--set"):
        load_config(None, [*(["seed=1"] if setting.startswith("seed") else []), setting])


def test_digest_tells_configurations_apart():
    assert digest(plain(Config())) == digest(plain(Config()))
    assert digest(plain(Config(seed=1))) != digest(plain(Config()))


def test_the_commented_example_states_the_defaults():
    assert load_config(SIGNS) == Config()


def keys(values, above=()):
    """Every key of nested mappings and lists, with those above it."""
    if isinstance(values, list):
        return set().union(*(keys(value, above) for value in values))
    if not isinstance(values, dict):
        return set()
    return set().union(*({(*above, key)} | keys(value, (*above, key)) for key, value in values.items()))


def test_the_commented_example_has_every_key():
    """Those of other kinds of models, and of what is left out by default, in comments."""
    text = SIGNS.read_text()
    assert keys(yaml.safe_load(text)) == keys(plain(Config()))
    elsewhere = {field.name for kind in KINDS.values() for field in fields(kind.config)} | {*CacheConfig.model_fields}
    assert {name for name in elsewhere if not re.search(rf"\b{name}: ", text)} == set()


def test_the_commented_example_explains_every_key():
    """A comment behind it or above it."""
    lines = SIGNS.read_text().splitlines()
    sections = ("model:", "train:", "data:", "predict:")
    assert [
        line for above, line in pairwise(lines) if line and line not in sections and "#" not in above[:5] + line
    ] == []
