"""Tasks and arms of `learning.py`: which models learn from which images, and what each arm changes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from authors_gradient import AuthorsATS
from estimators import ControlledATS, RememberingATS
from learning_data import Task

from nested_ats import LevelConfig, ModelConfig, NestedATS, UniformConfig, UniformSampling
from nested_ats.config import PatchConfig
from nested_ats.models.patches import SamplingModel
from pipeline.config import DEFAULT_LEVELS
from pipeline.training.course import PAPERS_COURSE

_LEVEL = LevelConfig(downsample=4, stride=2, samples=10, channels=(8, 8))
_MNIST = ModelConfig(levels=(_LEVEL,), patch_size=50, mean=0.13, std=0.31)
_NEEDLES = ModelConfig(
    levels=(
        LevelConfig(downsample=4, stride=2, group=4, samples=8),
        LevelConfig(downsample=2, size=16, stride=4, samples=8),
    ),
    patch_size=48,
    mean=0.13,
    std=0.31,
)
_SIGNS = ModelConfig(levels=DEFAULT_LEVELS)
# The encoder of these is named when a model is made: where its weights lie is not a setting.
_FROZEN: dict[str, Any] = {"trainable": "none", "standardise": True}
_COLON = ModelConfig(
    levels=(LevelConfig(downsample=8, stride=16, samples=25, channels=(16, 16)),), patch_size=128, **_FROZEN
)
_SLIDES = ModelConfig(  # of examples/histology.yaml
    levels=(
        LevelConfig(downsample=16, stride=4, group=4, samples=16),
        LevelConfig(downsample=4, size=64, stride=16, samples=32),
    ),
    **_FROZEN,
)
_FEW = {"learning_rate": 3e-3}
TASKS = {
    "mnist": Task(_MNIST, channels=1, classes=10, size=384, train=2000, test=500, batch=32, epochs=30),
    "needles": Task(_NEEDLES, channels=1, classes=10, size=256, train=2000, test=500, batch=32, epochs=30),
    "signs": Task(_SIGNS, channels=3, classes=4, size=1024, train=700, test=150, batch=16, epochs=45),
    "colon": Task(
        _COLON,
        channels=3,
        classes=2,
        size=1000,
        train=100,
        test=0,
        batch=4,
        epochs=20,
        folds=10,
        background=1.0,
        course=_FEW,
    ),
    "slides": Task(
        _SLIDES,
        channels=3,
        classes=2,
        size=4096,
        train=60,
        test=0,
        batch=4,
        epochs=40,
        folds=3,
        background=1.0,
        course=_FEW,
    ),
}
TRAINED, FROZEN = ("mnist", "signs", "needles"), ("colon", "slides")  # encoders
UNIFORM, AUTHORS = "uniform", "desraj, authors' gradient"
CONTROLLED, REMEMBERING, ONE_REMEMBERING = "control variate", "memory of features", "one level, memory of features"
_ONE_LEVEL = (LevelConfig(downsample=8, stride=8, samples=32, channels=(16, 16)),)


ESTIMATORS: dict[str, type[NestedATS]] = {
    AUTHORS: AuthorsATS,
    CONTROLLED: ControlledATS,
    REMEMBERING: RememberingATS,
    ONE_REMEMBERING: RememberingATS,
}


@dataclass(frozen=True)
class Arm:
    """What is changed in the model and in the training."""

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    batch: float = 1.0  # images of a step, as a share of the task's
    epochs: int = 1  # times those of the task
    tasks: tuple[str, ...] = (*TRAINED, *FROZEN)


_MOVED = Arm(
    {"levels": (replace(_LEVEL, channels=(16, 32)),)},
    {"augment": {"translation": 0.03, "jitter": 0.16}, "learning_rate": 3e-3},
    tasks=("mnist",),
)
_STAYS = replace(_MOVED, train=_MOVED.train | {"weight_decay": 0.1, "entropy_fade": 0.0})
_SMALL_STEPS = replace(
    _STAYS,
    model={"levels": (replace(_LEVEL, channels=(16, 32, 32)),)},
    train=_STAYS.train | {"learning_rate": 2e-3},
    batch=0.25,
)
_EVEN = {"entropy_weight": 0.1, "entropy_fade": 0.0}
ARMS = {
    "default": Arm(),
    "independent levels": Arm({"attention": "independent"}, tasks=("signs", "needles", "slides")),
    "features not scaled": Arm({"scale": 1.0}),
    "features standardised": Arm({"standardise": True}, tasks=TRAINED),
    "features as they are": Arm({"standardise": False}, tasks=FROZEN),
    "one level": Arm({"levels": _ONE_LEVEL}, tasks=("slides",)),
    CONTROLLED: Arm(),
    REMEMBERING: Arm(tasks=("colon",)),
    ONE_REMEMBERING: Arm({"levels": _ONE_LEVEL}, tasks=("slides",)),
    "tissue prior": Arm({"prior": "tissue"}, tasks=("slides",)),
    "three times the epochs": Arm(epochs=3),
    "encoder trained": Arm({"trainable": "all", "standardise": False}, {"learning_rate": 1e-4}, tasks=("colon",)),
    "encoder from nothing": Arm(
        {"encoder": "resnet16", "trainable": "all", "standardise": False},
        {"learning_rate": 1e-3},
        tasks=("colon",),
    ),
    "systematic": Arm({"method": "systematic"}),
    "desraj": Arm({"method": "desraj"}),
    "multinomial": Arm({"method": "multinomial"}),
    "learning rate 3e-3": Arm(train={"learning_rate": 3e-3}, tasks=TRAINED),
    "learning rate 1e-3": Arm(train={"learning_rate": 1e-3}, tasks=FROZEN),
    "balanced steps": Arm(train={"sampling": "balanced"}),
    "balanced steps, learning rate 3e-3": Arm(train={"sampling": "balanced", "learning_rate": 3e-3}, tasks=TRAINED),
    "half the batch": Arm(batch=0.5),
    "half the batch, balanced steps": Arm(train={"sampling": "balanced"}, batch=0.5),
    "weight decay 0.05": Arm(train={"weight_decay": 0.05}),
    "moved": Arm(train={"augment": {"translation": 0.1}}, tasks=TRAINED),
    "patches moved": Arm(train={"augment": {"jitter": 0.16}}, tasks=TRAINED),
    "wider attention, moved, patches moved, learning rate 3e-3": _MOVED,
    "the same, weight decay 0.1, entropy weight stays": _STAYS,
    "those, quarter of the batch, learning rate 2e-3, deeper attention": _SMALL_STEPS,
    "those, and patches warped": replace(
        _SMALL_STEPS, train=_SMALL_STEPS.train | {"augment": _MOVED.train["augment"] | {"warp": 0.15}}
    ),
    "turned": Arm(train={"augment": {"flip": True}}, tasks=FROZEN),
    "stains changed": Arm(train={"augment": {"hed": 0.05}}, tasks=FROZEN),
    "stains changed more": Arm(train={"augment": {"hed": 0.2}}, tasks=FROZEN),
    "turned, scale 24, entropy weight .1": Arm(
        {"scale": 24.0}, {"augment": {"flip": True}, "entropy_weight": 0.1, "entropy_fade": 0.0}, tasks=("colon",)
    ),
    "resnet8": Arm({"encoder": "resnet8"}, tasks=TRAINED),
    "as many samples early": Arm(train={"early_samples": 1}),
    "constant learning rate": Arm(train={"schedule": "constant", "warmup": 0.0}),
    "last weights": Arm(train={"average": 0.0}),
    "entropy weight stays": Arm(train={"entropy_fade": 0.0}),
    "entropy weight 0.1 stays": Arm(train=_EVEN),
    "entropy weight 0.1 stays, three times the epochs": Arm(train=_EVEN, epochs=3, tasks=FROZEN),
    "gradient not clipped": Arm(train={"clip": 0.0}),
    "the paper's training": Arm({"attention": "independent", "scale": 1.0, "method": "multinomial"}, PAPERS_COURSE),
    AUTHORS: Arm({"method": "desraj", "scale": 1.0}, PAPERS_COURSE, tasks=("mnist",)),
    UNIFORM: Arm(),
}


def make_model(arm: str, task: Task, weights: Path | None) -> SamplingModel:
    """Model of an arm, with weights by torch's seed."""
    changes = ARMS[arm].model
    if task.model.trainable == "none" and "encoder" not in changes:
        encoder = {"name": "mobilenet_v2", "weights": str(weights)}
        changes = {"encoder": encoder, "mean": None, "std": None, **changes}  # and its pixels as it was trained with
    config = replace(task.model, **changes)
    shapes: dict[str, Any] = {"in_channels": task.channels, "classes": task.classes}
    if arm == UNIFORM:
        last = config.levels[-1]
        common = {each.name: getattr(config, each.name) for each in fields(PatchConfig) if each.name != "kind"}
        return UniformSampling(UniformConfig(samples=last.samples, cell=last.extent_l0, **common), **shapes)
    return ESTIMATORS.get(arm, NestedATS)(config, **shapes)
