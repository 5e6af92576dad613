"""Hierarchical attention sampling in torch: classify images of any size from a few patches.

`NestedATS` is the model at any depth (depth 1 is Katharopoulos and Fleuret 2019); `draw` and `expectation` are
the estimators under it and stand alone. `DeepMIL`, `CNN` and `UniformSampling` are what the paper compares with,
behind the same interface (`build_model` makes any of them). Images are read through the `Image` protocol.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nested_ats.checkpoint import ModelInfo, inspect_model, load_model, save_model, take_weights
    from nested_ats.config import (
        AnyConfig,
        CNNConfig,
        DeepMILConfig,
        LevelConfig,
        ModelConfig,
        UniformConfig,
        levels_for,
    )
    from nested_ats.errors import (
        EncoderError,
        ImpossibleWeightsError,
        ModelFileError,
        NestedATSError,
        UntrustedEncoderError,
    )
    from nested_ats.estimators import entropy, expectation
    from nested_ats.evaluation import Prediction, predict
    from nested_ats.feature_store import FeatureStore
    from nested_ats.images import ArrayImage, Image, read_batch
    from nested_ats.losses import attention_sampling_loss
    from nested_ats.mask import Mask
    from nested_ats.models.base import ImageModel
    from nested_ats.models.cnn import CNN
    from nested_ats.models.deepmil import DeepMIL
    from nested_ats.models.kinds import build_model
    from nested_ats.models.nested import NestedATS
    from nested_ats.models.patches import SamplingModel
    from nested_ats.models.uniform import UniformSampling
    from nested_ats.patch_augment import PatchAugment
    from nested_ats.phases import Output
    from nested_ats.profiling import Cost, step_cost
    from nested_ats.sampling import Draw, draw
    from nested_ats.targets import Classes, Cox, DiscreteSurvival, MultiLabel, Ordinal, Regression, Target

__all__ = [
    "CNN",
    "AnyConfig",
    "ArrayImage",
    "CNNConfig",
    "Classes",
    "Cost",
    "Cox",
    "DeepMIL",
    "DeepMILConfig",
    "DiscreteSurvival",
    "Draw",
    "EncoderError",
    "FeatureStore",
    "Image",
    "ImageModel",
    "ImpossibleWeightsError",
    "LevelConfig",
    "Mask",
    "ModelConfig",
    "ModelFileError",
    "ModelInfo",
    "MultiLabel",
    "NestedATS",
    "NestedATSError",
    "Ordinal",
    "Output",
    "PatchAugment",
    "Prediction",
    "Regression",
    "SamplingModel",
    "Target",
    "UniformConfig",
    "UniformSampling",
    "UntrustedEncoderError",
    "attention_sampling_loss",
    "build_model",
    "draw",
    "entropy",
    "expectation",
    "inspect_model",
    "levels_for",
    "load_model",
    "predict",
    "read_batch",
    "save_model",
    "step_cost",
    "take_weights",
]

# Names are fetched from their modules at first use (PEP 562): who needs no torch does not wait for it.
_MODULES = {
    "checkpoint": ("ModelInfo", "inspect_model", "load_model", "save_model", "take_weights"),
    "config": (
        "AnyConfig",
        "CNNConfig",
        "DeepMILConfig",
        "LevelConfig",
        "ModelConfig",
        "UniformConfig",
        "levels_for",
    ),
    "errors": ("EncoderError", "ImpossibleWeightsError", "ModelFileError", "NestedATSError", "UntrustedEncoderError"),
    "evaluation": ("Prediction", "predict"),
    "estimators": ("entropy", "expectation"),
    "feature_store": ("FeatureStore",),
    "images": ("ArrayImage", "Image", "read_batch"),
    "losses": ("attention_sampling_loss",),
    "mask": ("Mask",),
    "models.base": ("ImageModel",),
    "models.cnn": ("CNN",),
    "models.deepmil": ("DeepMIL",),
    "models.kinds": ("build_model",),
    "models.nested": ("NestedATS",),
    "models.patches": ("SamplingModel",),
    "models.uniform": ("UniformSampling",),
    "patch_augment": ("PatchAugment",),
    "phases": ("Output",),
    "profiling": ("Cost", "step_cost"),
    "sampling": ("Draw", "draw"),
    "targets": ("Classes", "Cox", "DiscreteSurvival", "MultiLabel", "Ordinal", "Regression", "Target"),
}
_HOMES = {name: f"nested_ats.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nested_ats' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
