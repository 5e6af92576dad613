"""The kinds of models there are, by the ``kind`` of their configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

from nested_ats.base import EncoderConfig, ImageModel
from nested_ats.baselines import CNN, CNNConfig, DeepMIL, DeepMILConfig, UniformConfig, UniformSampling
from nested_ats.model import ModelConfig, NestedATS

AnyConfig = ModelConfig | DeepMILConfig | UniformConfig | CNNConfig


class Kind(NamedTuple):
    """A configuration and its model."""

    config: type[EncoderConfig]
    model: Any  # type[ImageModel] with its own configuration


KINDS: dict[str, Kind] = {
    "ats": Kind(ModelConfig, NestedATS),
    "deepmil": Kind(DeepMILConfig, DeepMIL),
    "uniform": Kind(UniformConfig, UniformSampling),
    "cnn": Kind(CNNConfig, CNN),
}


def build_model(config: AnyConfig, *, in_channels: int, classes: int, pretrained: bool = True) -> ImageModel:
    """Build the model of a configuration.

    Parameters
    ----------
    config
        Its ``kind`` says which model.
    in_channels
        C of the images.
    classes
        Q.
    pretrained
        Read the weights that ``encoder_options`` name; false where another state will be loaded.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """
    model: ImageModel = KINDS[config.kind].model(
        config, in_channels=in_channels, classes=classes, pretrained=pretrained
    )
    return model
