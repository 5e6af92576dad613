"""Encoders by name: how the configuration names one, which patches it takes, and how it is built.

Shape letters: P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nested_ats.errors import EncoderError, NestedATSError
from nested_ats.networks.backbones import (
    Backbone,
    import_encoder,
    load_weights,
    preset_backbone,
    timm_backbone,
    transformers_backbone,
)
from nested_ats.networks.builtin import ENCODERS
from nested_ats.networks.presets import IMAGENET_MEAN, IMAGENET_STD, PRESETS

TIMM, TRANSFORMERS = "timm/", "transformers"


class Choice(NamedTuple):
    """An encoder as the configuration names it.

    Attributes
    ----------
    name
        A key of `ENCODERS` or `PRESETS`, ``timm/ARCHITECTURE``, ``transformers/OWNER/NAME``, ``transformers`` with a
        folder as `weights`, or ``package.module:factory``.
    weights
        File or folder of its weights; None for the encoder's default.
    options
        Further arguments of the encoder.
    """

    name: str
    weights: str | None
    options: dict[str, Any]

    @property
    def plain(self) -> str | dict[str, Any]:
        """Its entry in the configuration: a mapping, or the name alone if there is nothing else."""
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"name": self.name, **weights, **self.options} if weights or self.options else self.name


def read_choice(encoder: str | Mapping[str, Any]) -> Choice:
    """Read a plain name, or a mapping of ``name``, ``weights`` and options.

    Raises
    ------
    ValueError
        The entry is neither.
    """
    entries: dict[Any, Any] = dict(encoder) if isinstance(encoder, Mapping) else {"name": encoder}
    name, weights = entries.pop("name", None), entries.pop("weights", None)
    if isinstance(weights, Path):
        weights = str(weights)
    if not isinstance(name, str):
        raise ValueError(  # noqa: TRY004 - wrong values of a configuration are ValueErrors
            "encoder: must be a name, or a mapping with a name, as in {name: mobilenet_v2, weights: PATH}"
        )
    if weights is not None and not isinstance(weights, str):
        raise ValueError(f"encoder: weights must be the path of a file or folder, or random, not {weights!r}")
    if not all(isinstance(key, str) for key in entries):
        raise ValueError("encoder: the options must have names")
    return Choice(name, weights, entries)


def check_encoder(name: str, channels: int, patch_size: int | None) -> None:
    """Check that an encoder's name is known or an import path, and that it takes such patches (None: any image).

    Raises
    ------
    ValueError
        The message names the wrong field of the configuration.
    """
    if name in PRESETS:
        _check_preset(name, patch_size)
        return
    if is_import_path(name) or name == TRANSFORMERS or name.startswith((TIMM, f"{TRANSFORMERS}/")):
        return
    if name not in ENCODERS:
        known = ", ".join((*ENCODERS, *PRESETS))
        raise ValueError(
            f"encoder: must be one of {known}, timm/ARCHITECTURE, transformers/OWNER/NAME, or "
            f"package.module:factory, not {name!r}"
        )
    builtin = ENCODERS[name]
    if patch_size is None and not builtin.any_size:
        raise ValueError(f"encoder: {name} takes patches of one size, not whole images")
    if patch_size is not None and patch_size < builtin.smallest_patch:
        raise ValueError(f"patch_size: {name} needs at least {builtin.smallest_patch} pixels")
    if channels < 1 or channels % builtin.channel_multiple:
        raise ValueError(f"features: {name} needs a positive multiple of {builtin.channel_multiple}")


def _check_preset(name: str, patch_size: int | None) -> None:
    preset = PRESETS[name]
    if patch_size is None:
        raise ValueError(f"encoder: {name} takes patches, not whole images")
    if not preset.takes(patch_size):
        others = f", or another multiple of {preset.step} from {preset.pixels // 2} up" if preset.step else ""
        raise ValueError(f"patch_size: {name} takes patches of {preset.pixels} pixels{others}, not {patch_size}")


def is_import_path(name: str) -> bool:
    """Whether an encoder's name is code to import, ``package.module:factory``."""
    module, colon, factory = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *factory.split(".")))


class Built(NamedTuple):
    """An encoder that can be used.

    Attributes
    ----------
    module
        Maps (P, C, H, W) to (P, D).
    features
        D.
    encoder
        Its entry in the configuration, enough to build it again without its weights.
    mean, std
        Mean and spread of each channel of its training pixels, in [0, 1], or one of all; None where they are unknown.
    """

    module: nn.Module
    features: int
    encoder: str | dict[str, Any]
    mean: tuple[float, ...] | float | None = None
    std: tuple[float, ...] | float | None = None


def build_encoder(
    encoder: str | Mapping[str, Any],
    *,
    in_channels: int,
    channels: int = 32,
    patch_size: int | None,
    pretrained: bool = True,
) -> Built:
    """Build an encoder by name.

    Parameters
    ----------
    encoder
        A name, or a mapping of name, weights and options (`Choice`). A ``package.module:factory`` is imported and
        called with ``in_channels`` and the options.
    in_channels
        C.
    channels
        Width of those of our own encoders that have one to choose.
    patch_size
        H = W; None for whole images of any size.
    pretrained
        Read the weights; False builds only the architecture, into which another state will be loaded.

    Raises
    ------
    EncoderError
        It cannot be imported, built or used on such patches, or its weights are missing.
    """
    choice = read_choice(encoder)
    try:
        backbone = _build(choice, in_channels, channels, patch_size or 0, pretrained=pretrained)
    except NestedATSError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        reason = re.sub(r"^[\w.<>]+\(\) ", "", str(error))  # a TypeError begins with the name of our function
        raise EncoderError(f"encoder: {choice.name} cannot be built with {choice.options!r}: {reason}") from error
    module, name = backbone.module, choice.name
    if not isinstance(module, nn.Module):
        raise EncoderError(f"encoder: {name} gives a {type(module).__name__}, not a torch.nn.Module")
    said = getattr(module, "features", None)
    found = (
        said if isinstance(said, int) and name in ENCODERS else _try_out(name, module, in_channels, patch_size or 224)
    )
    if isinstance(said, int) and said != found:
        raise EncoderError(f"encoder: {name} says that it has {said} features, and gives {found}")
    kept = choice._replace(options=backbone.options).plain
    if name in ENCODERS and ENCODERS[name].raw:
        return Built(module, found, kept, 0.0, 1.0)
    return Built(
        module, found, kept, _per_channel(backbone.mean, in_channels), _per_channel(backbone.std, in_channels)
    )


def _build(choice: Choice, in_channels: int, channels: int, patch_size: int, *, pretrained: bool) -> Backbone:
    name, weights, options = choice
    rest: dict[str, Any] = {"in_channels": in_channels, "weights": weights, "pretrained": pretrained}
    if name in PRESETS:
        return preset_backbone(name, PRESETS[name], options=options, **rest)
    if name.startswith(TIMM):
        return timm_backbone(name.removeprefix(TIMM), options=options, **rest)
    if name.startswith(TRANSFORMERS):
        return transformers_backbone(name.removeprefix(TRANSFORMERS).removeprefix("/"), **rest, **options)
    imagenet = False
    if name in ENCODERS:
        module = ENCODERS[name].build(in_channels, channels, patch_size, options)
        imagenet = ENCODERS[name].imagenet and weights is not None
    else:
        module = import_encoder(name)(in_channels=in_channels, **options)
    if weights is not None and pretrained:
        load_weights(module, Path(weights).expanduser())
    return Backbone(module, IMAGENET_MEAN if imagenet else None, IMAGENET_STD if imagenet else None, options)


def _per_channel(values: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """Values of a library as floats; None where they are for another number of channels."""
    return tuple(map(float, values)) if values is not None and len(values) == channels else None


def _try_out(name: str, encoder: nn.Module, in_channels: int, size: int) -> int:
    """Find D by encoding two blank patches, in evaluation mode so that nothing is learned from them."""
    training = encoder.training
    patches = torch.zeros(2, in_channels, size, size)
    try:
        with torch.no_grad():
            features = encoder.eval()(patches)
    except Exception as error:  # whatever a stranger's module raises
        raise EncoderError(
            f"encoder: {name} does not take patches of shape {tuple(patches.shape)}: {error}"
        ) from error
    finally:
        encoder.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise EncoderError(f"encoder: {name} maps {tuple(patches.shape)} to {got}, not to (2, features)")
    return features.shape[1]
