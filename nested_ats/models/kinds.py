"""The kinds of models there are, by the ``kind`` of their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nested_ats.config import AnyConfig, CNNConfig, DeepMILConfig, EncoderConfig, ModelConfig, UniformConfig
from nested_ats.models.base import ImageModel
from nested_ats.models.cnn import CNN
from nested_ats.models.deepmil import DeepMIL
from nested_ats.models.nested import NestedATS
from nested_ats.models.uniform import UniformSampling
from nested_ats.networks.encoders import TIMM, read_choice
from nested_ats.networks.hub import RANDOM
from nested_ats.targets import Target


class Kind(NamedTuple):
    """A configuration and its model."""

    config: type[EncoderConfig]
    model: Any  # a type[ImageModel] that takes this configuration


KINDS: dict[str, Kind] = {
    "ats": Kind(ModelConfig, NestedATS),
    "deepmil": Kind(DeepMILConfig, DeepMIL),
    "uniform": Kind(UniformConfig, UniformSampling),
    "cnn": Kind(CNNConfig, CNN),
}


def build_model(config: AnyConfig, *, in_channels: int, classes: int | Target, pretrained: bool = True) -> ImageModel:
    """Build the model of a configuration.

    Parameters
    ----------
    config
        Its ``kind`` says which model.
    in_channels
        C of the images.
    classes
        Q, the number of classes; or what else the model answers.
    pretrained
        Read the weights that ``encoder`` names; false where another state will be loaded.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """
    model: ImageModel = KINDS[config.kind].model(
        config, in_channels=in_channels, classes=classes, pretrained=pretrained
    )
    return model


def plain_encoder(model: Mapping[str, Any]) -> Any:
    """The encoder in a model's plain configuration; if it names none, its kind's default, or "" if unknown."""
    kind = str(model.get("kind", "ats"))
    return model.get("encoder", KINDS[kind].config.encoder if kind in KINDS else "")


def bring_up_to_date(model: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite an older plain configuration, with ``encoder_options`` or ``baseline``, in today's form.

    Raises
    ------
    ValueError
        The options are no mapping or lack a name, or there is a baseline, which nothing replaces.
    """
    folded = dict(model)
    if folded.pop("baseline", "none") != "none":
        raise ValueError(
            "baseline: there is none on the attention's gradient any more; leave it out, and train again"
        )
    options = folded.pop("encoder_options", None)
    if not options:
        return folded
    if not isinstance(options, Mapping):
        raise ValueError(  # noqa: TRY004 - wrong values of a configuration are ValueErrors
            "encoder_options: must be a mapping; write it as encoder: {name: ..., weights: ..., ...}"
        )
    name, weights, rest = read_choice(plain_encoder(folded))
    rest = {**rest, **options}
    if name == "timm":
        if "name" not in rest:
            raise ValueError("encoder_options: timm needs name; write it as encoder: timm/ARCHITECTURE")
        name, weights = f"{TIMM}{rest.pop('name')}", rest.pop("checkpoint", RANDOM)
    elif name == "transformers":
        weights = rest.pop("path", weights)
    folded["encoder"] = {"name": name, **({} if weights is None else {"weights": weights}), **rest}
    return folded
