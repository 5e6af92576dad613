"""The settings that decide a prediction besides the slide: those of the run, and what the user gives instead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from nested_ats import ModelConfig, UniformConfig, UntrustedEncoderError, inspect_model
from nested_ats.config import EncoderConfig
from pipeline.config import digest
from pipeline.data.slides import Opening
from pipeline.errors import UsageError
from pipeline.files import read_inside
from pipeline.results.thresholds import Thresholds
from pipeline.runs import CALIBRATION, model_folder, read_run
from pipeline.sections import CacheConfig, FeaturesConfig, Precision

_FORMAT = 2  # the format of a result: rows of format 1 have no intervals


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a prediction, besides the slide."""

    model: str  # the folder of the model
    device: str = "auto"  # auto, cpu or cuda; with Ray, the workers share the cluster's GPUs evenly
    draws: int  # how many independent draws are averaged
    samples: tuple[int, ...] = ()  # how many units are drawn at each level; empty: as many as in training
    background: float  # the value of pixels off the slide
    channels: tuple[int | str, ...] | None = None  # which channels of slides the model sees; None: all
    seed: int
    target_error: float | None = None  # drawing stops before that many draws at this expected error
    exact: bool = False  # encode every patch of the opened regions instead of drawing among them
    precision: Precision = "float32"  # what the networks compute in
    trust_encoder: bool = False  # import the model's encoder where it is code of the user's
    cache: CacheConfig | None = None  # keeps chunks that are fetched from URLs
    assume_mpp: float | None = None  # micrometres per pixel of slides that do not tell it
    features: FeaturesConfig | None = None  # keeps features of patches, where the encoder is frozen
    unit: Literal["slide", "case"] = "slide"  # what is one sample (`DataConfig.unit`)
    temperature: float | None = None  # what logits are divided by, where the model was calibrated
    thresholds: Thresholds = field(default_factory=dict)  # of labels, where they were chosen (`calibrate`)
    model_sha256: str = ""  # tells which model that folder holds (`nested_ats.ModelInfo`)

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as JSON values, without where things are kept, which decides nothing but time."""
        values = asdict(replace(self, cache=None, features=None))
        del values["features"]  # earlier predictions do not have them
        for name in ("assume_mpp", "channels", "temperature"):
            if values[name] is None:
                del values[name]  # nor these
        if not self.thresholds:
            del values["thresholds"]
        if self.unit == "slide":
            del values["unit"]
        return values

    @property
    def opening(self) -> Opening:
        """How slides are opened."""
        return {
            "background": self.background,
            "cache": self.cache,
            "assume_mpp": self.assume_mpp,
            "channels": self.channels,
        }

    @property
    def fingerprint(self) -> str:
        """Tells whether earlier results can be kept: equal settings classify a slide alike on any machine."""
        return digest({**self.plain, "model": "", "device": "", "format": _FORMAT})


class Options(TypedDict, total=False):
    """The `Settings` that a user may give; those that are left out or empty are the run's."""

    draws: int | None
    samples: Sequence[int]
    target_error: float | None
    exact: bool
    trust_encoder: bool
    device: str
    seed: int
    uncalibrated: bool  # leave the answers as they are, whatever `pipeline.results.calibrate` has found
    last: bool  # the model after the last epoch, where the best one is another


def prediction_settings(run: Path, **options: Unpack[Options]) -> Settings:
    """Return the settings for a finished run.

    Raises
    ------
    nested_ats.ModelFileError
        The model is damaged.
    UsageError
        `run` is no finished run, `samples` does not fit its model, or its encoder is code and not to be trusted.
    """
    last = options.get("last", False)
    config, folder = read_run(run)["config"], model_folder(run, last=last)
    try:
        model = inspect_model(folder, trust_encoder=options.get("trust_encoder", False))
    except UntrustedEncoderError as error:
        raise UsageError(
            f"{error.path}: its encoder is code to import, {error.encoder}; if you trust it, give --trust-encoder"
        ) from error
    samples = tuple(options.get("samples", ()))
    with_samples(model.config, samples)
    cache, features = (config["data"][name] for name in ("cache", "features"))
    given = {name: value for name, value in options.items() if value and name not in ("uncalibrated", "last")}
    uncalibrated = options.get("uncalibrated")
    temperature, thresholds = (None, {}) if uncalibrated else _calibration(run, model.sha256, last=last)
    return Settings(
        model=str(folder.absolute()),
        model_sha256=model.sha256,
        temperature=temperature,
        thresholds=thresholds,
        background=config["data"]["background"],
        assume_mpp=config["data"].get("assume_mpp"),  # earlier runs do not have it
        channels=_chosen(config["data"].get("channels")),
        unit=config["data"]["unit"],
        cache=cache and CacheConfig(**cache),
        features=features and FeaturesConfig(**features),
        **{"seed": config["seed"], **config["predict"], **given, "samples": samples},
    )


def _calibration(run: Path, model_sha256: str, *, last: bool) -> tuple[float | None, dict[str, float]]:
    """Return the temperature and the thresholds of a calibrated model; the `last` one has those of the best never.

    Raises
    ------
    UsageError
        It is that of another model, or damaged.
    """
    path = run / CALIBRATION
    try:
        found = json.loads(read_inside(run, CALIBRATION))
        known, temperature = found["model"], None if found["temperature"] is None else float(found["temperature"])
        thresholds = {str(name): float(value) for name, value in found.get("thresholds", {}).items()}
    except FileNotFoundError:
        return None, {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: damaged ({error}); run nested-ats calibrate again, or remove it") from error
    if known != model_sha256 and last:
        return None, {}
    sound = (temperature is None or temperature > 0) and all(0 < value < 1 for value in thresholds.values())
    if known != model_sha256 or not sound:
        raise UsageError(
            f"{path}: of a model from before it was trained further; run nested-ats calibrate again, or give "
            "--no-calibration"
        )
    return temperature, thresholds


def _chosen(channels: Any) -> tuple[int | str, ...] | None:
    """`DataConfig.chosen`, of its value in a file."""
    return tuple(channels) if isinstance(channels, list) else None


def with_samples(config: EncoderConfig, samples: Sequence[int]) -> EncoderConfig:
    """Return the configuration of a model with another budget.

    Raises
    ------
    UsageError
        There is not one positive number for each level.
    """
    if not samples:
        return config
    match config:
        case ModelConfig() as old if len(samples) == len(old.levels) and min(samples) > 0:
            drawn = zip(old.levels, samples, strict=True)
            return replace(old, levels=tuple(replace(level, samples=n) for level, n in drawn))
        case UniformConfig() as old if len(samples) == 1 and samples[0] > 0:
            return replace(old, samples=samples[0])
        case old:
            levels = len(old.levels) if isinstance(old, ModelConfig) else int(isinstance(old, UniformConfig))
            raise UsageError(f"--samples: the model draws at {levels} levels; give that many positive numbers")
