"""Encoders from elsewhere: architectures of timm and transformers with weights of this machine, and import paths.

timm and transformers are optional and imported only when needed. They build the architecture, but download and
unpickle nothing: the weights are read here (`nested_ats.networks.weights`).

Shape letters: P patches, C channels, H W pixels, T tokens, D features.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nested_ats.errors import EncoderError
from nested_ats.networks.hub import locate
from nested_ats.networks.presets import Preset
from nested_ats.networks.weights import read_checkpoint

# Keys of a transformers configuration that are not the architecture, or would run code or read files.
_NOT_ARCHITECTURE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
)


class Backbone(NamedTuple):
    """An encoder that a library has built.

    Attributes
    ----------
    module
        Maps (P, C, H, W) to (P, D).
    mean, std
        Mean and spread of each channel of its training pixels, in [0, 1]; None where they are unknown.
    options
        Options of its entry in the configuration, enough to build it again without its weights' folder.
    """

    module: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    options: dict[str, Any]


def import_encoder(name: str) -> Callable[..., Any]:
    """Import what ``package.module:factory`` names.

    This runs the module's code: the name must come from the user, not from a file of unknown origin.

    Raises
    ------
    EncoderError
        The module does not exist or lacks the name.
    """
    module, _, factory = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in factory.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise EncoderError(f"encoder: cannot import {name}: {error}; is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise EncoderError(f"encoder: {name} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def preset_backbone(
    name: str, preset: Preset, *, in_channels: int, weights: str | None, options: Mapping[str, Any], pretrained: bool
) -> Backbone:
    """Build a published encoder; `options` add to its own, the other parameters are those of `timm_backbone`.

    Raises
    ------
    EncoderError
        Its library is not installed or lacks it, the channels differ, or the weights are missing or do not fit.
    """
    if preset.needs:
        raise EncoderError(
            f"encoder: {name} needs {preset.needs}; its licence and weights are at {preset.page}. Write a function "
            "that takes in_channels and returns its module, name it as model.encoder: package.module:function, and "
            f"set patch_size: {preset.pixels}, mean: {list(preset.mean)}, std: {list(preset.std)}"
        )
    if in_channels != len(preset.mean):
        raise EncoderError(f"encoder: {name} is made for {len(preset.mean)} channels, the images have {in_channels}")
    _library(preset.library)
    path = locate(name, weights, preset.repository, preset.page) if pretrained else None
    if preset.library == "timm":
        module = _build_timm(preset.architecture, in_channels, {**preset.options, **options}, path)
    else:
        fields = {"model_type": preset.architecture, **preset.options, **options}
        module = _build_transformers(fields, path, pool=preset.architecture != "vit")
    if preset.pooling == "token and mean":
        module = _TokenAndMean(module)
    return Backbone(module, preset.mean, preset.std, dict(options))


def timm_backbone(
    architecture: str, *, in_channels: int, weights: str | None, options: Mapping[str, Any], pretrained: bool
) -> Backbone:
    """Build a model of timm without its classifier.

    Parameters
    ----------
    architecture
        A name of timm such as ``resnet18``, with or without a tag, as in ``vit_small_patch16_224.dino``.
    in_channels
        C.
    weights
        A file or folder of its weights for C channels, whose classifier is ignored; ``random``; or None to take them
        from the cache of the Hugging Face hub.
    options
        Passed to ``timm.create_model``, such as ``dynamic_img_size`` for a transformer.
    pretrained
        Read the weights; otherwise the network keeps its random ones.

    Raises
    ------
    EncoderError
        timm is not installed, or the weights are not here or do not fit.
    ValueError
        An option would download.
    """
    timm = _library("timm")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise EncoderError(
            f"encoder: timm has no architecture {architecture!r}" + (f"; did you mean {near[0]}?" if near else "")
        )
    cfg = timm.get_pretrained_cfg(architecture)
    path = locate(f"timm/{architecture}", weights, getattr(cfg, "hf_hub_id", None) or "", "") if pretrained else None
    module = _build_timm(architecture, in_channels, options, path)
    return Backbone(module, getattr(cfg, "mean", None), getattr(cfg, "std", None), dict(options))


def transformers_backbone(
    repository: str,
    *,
    in_channels: int,
    weights: str | None,
    pretrained: bool,
    architecture: Mapping[str, Any] | None = None,
    add_pooling_layer: bool = True,
) -> Backbone:
    """Build a vision model of transformers.

    Parameters
    ----------
    repository
        Repository of the Hugging Face hub, sought in its cache; may be empty where `weights` is given.
    in_channels
        C; must be what the model was made for.
    weights
        A folder with ``config.json`` and weights, or the file of the weights beside it; ``random``; or None for the
        cache.
    pretrained
        Read the weights.
    architecture
        The contents of ``config.json`` in its place; a saved model keeps them, so that it needs no such file.
    add_pooling_layer
        False for a transformer whose weights lack a pooling layer; its first token is then the feature.

    Raises
    ------
    EncoderError
        transformers is not installed, the weights are missing or do not fit, or the channels differ.
    """
    name = f"transformers/{repository}" if repository else "transformers"
    _library("transformers")
    path = locate(name, weights, repository, "") if pretrained or architecture is None else None
    folder = path.parent if path is not None and path.is_file() else path
    if architecture is None:
        if folder is None:
            raise EncoderError(f"encoder: {name} with random weights needs its architecture, as config.json has it")
        architecture = _read_json(folder / "config.json", f"{folder}: no folder with a config.json")
    module = _build_transformers(architecture, path if pretrained else None, pool=add_pooling_layer)
    channels = getattr(module.backbone.config, "num_channels", in_channels)
    if channels != in_channels:
        raise EncoderError(f"encoder: {name} is made for {channels} channels, the images have {in_channels}")
    kept = json.loads(module.backbone.config.to_json_string())
    options = {"architecture": {key: value for key, value in kept.items() if key not in _NOT_ARCHITECTURE}}
    said = _read_json(folder / "preprocessor_config.json") if folder else {}
    mean, std = (tuple(said[key]) if isinstance(said.get(key), list) else None for key in ("image_mean", "image_std"))
    return Backbone(module, mean, std, options | ({} if add_pooling_layer else {"add_pooling_layer": False}))


def _build_timm(architecture: str, in_channels: int, options: Mapping[str, Any], path: Path | None) -> nn.Module:
    """Build an architecture of timm, and read its weights if there is a path."""
    if any(key.startswith(("pretrained", "checkpoint")) for key in options):
        raise ValueError("name its weights as weights; nothing is downloaded")
    timm, options = _library("timm"), dict(options)
    if isinstance(layer := options.get("mlp_layer"), str):
        options["mlp_layer"] = getattr(timm.layers, layer)
    model: nn.Module = timm.create_model(
        architecture, pretrained=False, in_chans=in_channels, num_classes=0, **options
    )
    if path is not None:
        load_weights(model, path)
    return model


def _build_transformers(architecture: Mapping[str, Any], path: Path | None, *, pool: bool) -> _TransformersEncoder:
    """Build an architecture of transformers, with random weights if there is no path."""
    transformers = _library("transformers")
    fields = {key: value for key, value in architecture.items() if key not in _NOT_ARCHITECTURE}
    extra = {} if pool else {"add_pooling_layer": False}
    missing: list[str] = []
    try:
        config = transformers.AutoConfig.for_model(fields.pop("model_type", "none"), **fields)
        if path is None:
            return _TransformersEncoder(transformers.AutoModel.from_config(config, trust_remote_code=False, **extra))
        model, loaded = transformers.MODEL_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=read_checkpoint(path),
            dtype=torch.float32,
            output_loading_info=True,
            **extra,
        )
        missing = sorted(loaded["missing_keys"])
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise EncoderError(f"{path or 'encoder'}: transformers cannot build its model: {error}") from error
    if missing:  # transformers would fill them with random numbers
        raise EncoderError(
            f"{path}: lacks {len(missing)} weights of the encoder, such as {missing[0]}; "
            "if that is its pooling layer, set model.encoder.add_pooling_layer to false"
        )
    return _TransformersEncoder(model)


class _TokenAndMean(nn.Module):
    """The class token beside the mean of the patches' tokens; registers are left out."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, 2 D)."""
        tokens: Tensor = self.backbone(patches)  # (P, T, D)
        first = self.backbone.num_prefix_tokens
        return torch.cat([tokens[:, 0], tokens[:, first:].mean(1)], -1)


class _TransformersEncoder(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, D): the model's pooled output, else its first token or the mean of its map."""
        output = self.backbone(pixel_values=patches)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            hidden: Tensor = output.last_hidden_state  # (P, T, D) of a transformer, (P, D, h, w) of a CNN
            pooled = hidden[:, 0] if hidden.ndim == 3 else hidden.mean((-2, -1))
        return pooled.flatten(1)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises the latter
        raise EncoderError(
            f"encoder: {name} cannot be imported ({error}); install it, with a torchvision that belongs to this "
            f"torch: pip install {name}, or nested-ats[{name}]"
        ) from error


def _read_json(path: Path, otherwise: str = "") -> dict[str, Any]:
    """Read a mapping; if the file is missing, refuse with `otherwise`, or return an empty one."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        if otherwise:
            raise EncoderError(otherwise) from None
        return {}
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: not readable as JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights of a file or folder into an encoder; further ones, such as a classifier's, are ignored.

    Raises
    ------
    EncoderError
        The weights do not fit, or some are missing.
    ModelFileError
        The file cannot be read.
    """
    try:
        missing, _ = model.load_state_dict(read_checkpoint(path), strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise EncoderError(f"{path}: weights do not fit the encoder: {reason}") from error
    if missing:
        raise EncoderError(f"{path}: lacks {len(missing)} weights of the encoder, such as {missing[0]}")
