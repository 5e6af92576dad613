"""Configuration: one YAML file, which is checked before any work, and in which every key has a default.

`ModelConfig` lives beside the model, and what the pipeline adds in `sections`. Unknown keys are refused with the
nearest known name. `digest` identifies what a run computes, so that no run goes on under another configuration.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from nested_ats import CNNConfig, DeepMILConfig, ModelConfig, UniformConfig, levels_for
from nested_ats.config import PatchConfig
from nested_ats.models.kinds import KINDS, bring_up_to_date, plain_encoder
from nested_ats.networks.builtin import GIVEN
from nested_ats.networks.encoders import read_choice
from nested_ats.networks.hub import RANDOM
from pipeline.errors import UsageError
from pipeline.sections import (
    AnyTarget,
    ClassesTarget,
    DataConfig,
    OrdinalTarget,
    PredictConfig,
    Section,
    TrainConfig,
    by_kind,
    whole,
)
from pipeline.units import in_pixels

# Encodings, dates and numbers raise ValueError, and what is nested too deep raises RecursionError.
_NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
# Where a key may be of several types, an error is placed at each of them.
_OF_A_UNION = re.compile(r"str|int|float|constrained-int|(literal|dict|tuple)\[.*\]")
DEFAULT_LEVELS = levels_for((8192, 8192))


AnyModel = Annotated[
    Annotated[ModelConfig, Tag("ats")]
    | Annotated[DeepMILConfig, Tag("deepmil")]
    | Annotated[UniformConfig, Tag("uniform")]
    | Annotated[CNNConfig, Tag("cnn")],
    by_kind("ats"),
]


class Config(Section):
    """A whole run."""

    seed: int = Field(default=0, ge=0, lt=2**63)  # decides the first weights, the order of slides and every draw
    model: AnyModel = ModelConfig(levels=DEFAULT_LEVELS)
    train: TrainConfig = TrainConfig()
    target: AnyTarget = ClassesTarget()
    data: DataConfig = DataConfig()
    predict: PredictConfig = PredictConfig()

    @model_validator(mode="after")
    def _know_what_lies_between_slides(self) -> Self:
        if self.data.unit == "case":
            if not isinstance(self.model, PatchConfig) or self.model.prior == "none":
                raise ValueError(
                    "data.unit: the slides of a case lie side by side, and the model must know what lies between; "
                    "set model.prior to tissue or valid, or unit to slide"
                )
            if self.model.location:
                raise ValueError("data.unit: a place in a case means nothing; set model.location to false")
        return self

    @model_validator(mode="after")
    def _move_features_alone(self) -> Self:
        change = self.train.augment
        if self.model.encoder_name == GIVEN and (
            change.brightness or change.contrast or change.hed or change.jitter or change.warp
        ):
            raise ValueError(
                "train.augment: features have no brightness, contrast or stains, and lie on a grid without jitter or "
                "warp; flip and translation move tiles"
            )
        return self

    @model_validator(mode="after")
    def _change_drawn_patches_alone(self) -> Self:
        change = self.train.augment
        if self.model.kind in ("deepmil", "cnn") and (change.jitter or change.warp):
            raise ValueError(
                f"train.augment: jitter and warp change drawn patches, and a model of kind {self.model.kind} draws "
                "none; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _normalize_once(self) -> Self:
        if self.data.normalize and (self.model.mean is not None or self.model.std is not None):
            raise ValueError("data.normalize: auto measures model.mean and model.std; leave these out")
        return self

    @model_validator(mode="after")
    def _balance_classes_alone(self) -> Self:
        balanced = self.train.class_weights == "balanced" or self.train.sampling == "balanced"
        if balanced and not isinstance(self.target, ClassesTarget | OrdinalTarget):
            raise ValueError(
                f"train: class_weights and sampling balance classes, and the target is {self.target.kind}"
            )
        return self


def load_config(path: Path | None, settings: list[str] | None = None) -> Config:
    """Read a configuration.

    Parameters
    ----------
    path
        A YAML file, or none for the defaults.
    settings
        Overrides such as ``a.b=value``, where values are YAML and numbers name the elements of lists
        (``model.levels.0.samples=16``).

    Raises
    ------
    UsageError
        The file is missing or not YAML, or a key or value is wrong; all problems are named.
    """
    where = str(path) if path else "configuration"
    raw = _fold(_read_yaml(path) if path else {}, where)
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write it as key=value, as in --set train.epochs=10")
        try:
            parsed = yaml.safe_load(value)
        except _NOT_YAML:
            raise UsageError(f"--set {setting}: {value[:100]} is not a YAML value") from None
        _override(raw, key.split("."), parsed, setting)
    if any(setting.startswith("model.") for setting in settings or []) and isinstance(raw["model"], dict):
        _add_levels(raw["model"])
    return _whole_weights(parse_config(raw, where))


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """Check a configuration of plain values; `where` names it in errors (UsageError)."""
    raw = _fold(raw, where)
    if isinstance(raw.get("model"), dict):
        try:
            raw = {**raw, "model": in_pixels(raw["model"])}
        except ValueError as error:
            raise UsageError(f"{where}: model.{error}") from error
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise UsageError(f"{where}: {problems}") from error


def dump_config(config: Config) -> str:
    """Write the resolved configuration as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as plain lists, mappings and scalars."""
    values: dict[str, Any] = TypeAdapter(Config).dump_python(config, mode="json")
    return values


def digest(value: Any) -> str:
    """Hash plain values to a short text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _fold(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Move the options of the encoder in plain values to where they stand today."""
    if not isinstance(raw.get("model"), dict):
        return raw
    try:
        return {**raw, "model": bring_up_to_date(raw["model"])}
    except ValueError as error:
        raise UsageError(f"{where}: model.{error}") from error


def _whole_weights(config: Config) -> Config:
    """Write the path of the encoder's weights whole: workers may run in other folders."""
    choice = read_choice(config.model.encoder)
    if choice.weights in (None, RANDOM):
        return config
    weights = str(whole(Path(choice.weights or "")))
    model = replace(config.model, encoder=choice._replace(weights=weights).plain)
    return config.model_copy(update={"model": model})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give the configuration's path") from error
    except _NOT_YAML as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: a configuration is a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], keys: list[str], value: Any, setting: str) -> None:
    if keys[:2] == ["model", "levels"] and isinstance(raw.setdefault("model", {}), dict):
        _add_levels(raw["model"])  # they are changed one by one
    if keys[:2] == ["model", "encoder"] and len(keys) > 2 and isinstance(raw.setdefault("model", {}), dict):
        _name_encoder(raw["model"])  # it is given weights and options
    node: Any = raw
    for i, key in enumerate(keys):
        step: Any = key
        if isinstance(node, list):
            if not (key.isdecimal() and int(key) < len(node)):
                raise UsageError(f"--set {setting}: {'.'.join(keys[:i])} has no element {key}")
            step = int(key)
        elif not isinstance(node, dict):
            raise UsageError(f"--set {setting}: {'.'.join(keys[:i])} is a value and has no keys")
        if i == len(keys) - 1:
            node[step] = value
        else:
            node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]


def _add_levels(model: dict[str, Any]) -> None:
    """Give a model that has levels, but none of its own, those of the default configuration."""
    if model.get("kind", "ats") == "ats":
        model.setdefault("levels", plain(Config())["model"]["levels"])


def _name_encoder(model: dict[str, Any]) -> None:
    """Turn an encoder that is a plain name, or the default of the model's kind, into a mapping."""
    named = plain_encoder(model)
    if isinstance(named, str):
        model["encoder"] = {"name": named}


def _explain(problem: Any) -> str:
    place, kind = [str(part) for part in problem["loc"]], None
    if problem["type"].startswith("union_tag"):
        return f"model.kind: not one of {', '.join(KINDS)}"
    if place[:1] == ["model"] and place[1:2] and place[1] in KINDS:
        kind = place.pop(1)  # it is no key
    name = ".".join(part for part in place if not _OF_A_UNION.fullmatch(part))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {name}" + _advise(place, kind)
    if problem["type"] in ("model_type", "dataclass_type", "model_attributes_type"):
        return f"{name}: must be a mapping of keys to values"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def _advise(place: Sequence[str], kind: str | None) -> str:
    """Say what an unknown key may mean: the nearest that there is, or where a key of that name belongs."""
    wanted = place[-1]
    if len(place) == 2 and kind:
        others = [name for name, other in KINDS.items() if wanted in {field.name for field in fields(other.config)}]
        if others:
            return f" (models of kind {', '.join(others)} have it, this one is of kind {kind})"
    keys = _known_keys()
    near = difflib.get_close_matches(wanted, keys, n=1)
    if not near:
        return ""
    # A key that is right but for its place is named with the right one.
    return f" (did you mean {keys[near[0]] if near[0] == wanted else near[0]}?)"


def _known_keys() -> dict[str, str]:
    """Map every key's name to its whole path."""
    keys = {field.name: f"model.{field.name}" for kind in KINDS.values() for field in fields(kind.config)}
    nodes: list[tuple[str, Any]] = [("", plain(Config()))]
    while nodes:
        path, node = nodes.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(key, str):
                keys.setdefault(key, f"{path}{key}")
            if isinstance(value, dict | list):
                nodes.append((f"{path}{key}.", value))
    return keys
