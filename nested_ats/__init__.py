"""Hierarchical attention sampling in torch: classify images of any size from a few patches.

`NestedATS` is the model at any depth (depth 1 is Katharopoulos and Fleuret 2019); `draw` and `expectation` are
the estimators under it and stand alone. Images are read through the `Image` protocol.
"""

from nested_ats.checkpoint import load_model, save_model
from nested_ats.errors import ImpossibleWeightsError, ModelFileError, NestedATSError
from nested_ats.evaluation import Prediction, predict
from nested_ats.expectation import entropy, expectation
from nested_ats.images import ArrayImage, Image, read_batch
from nested_ats.losses import attention_sampling_loss
from nested_ats.model import LevelConfig, ModelConfig, NestedATS, Output
from nested_ats.sampling import Draw, draw

__all__ = [
    "ArrayImage",
    "Draw",
    "Image",
    "ImpossibleWeightsError",
    "LevelConfig",
    "ModelConfig",
    "ModelFileError",
    "NestedATS",
    "NestedATSError",
    "Output",
    "Prediction",
    "attention_sampling_loss",
    "draw",
    "entropy",
    "expectation",
    "load_model",
    "predict",
    "read_batch",
    "save_model",
]
