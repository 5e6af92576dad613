"""Encoders from elsewhere: a timm or transformers backbone from local files, or any module by import path.

timm and transformers are imported when they are asked for and are no dependencies. Nothing is ever downloaded: timm
is told to build without weights, transformers to read a local folder, and names that mean a hub are refused. Weights
are read from safetensors files alone.

Shape letters: P patches, C channels, H W pixels, T tokens, D features.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nested_ats.errors import EncoderError
from nested_ats.weights import how_to_convert, read_checkpoint


def import_encoder(name: str) -> Callable[..., Any]:
    """Import what ``package.module:factory`` names.

    This runs the module's code: the name must come from the user, not from a file of unknown origin.

    Raises
    ------
    EncoderError
        There is no such module, or it has no such name.
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


def timm_encoder(
    *, in_channels: int, pretrained: bool, name: str, checkpoint: str | None = None, **options: Any
) -> nn.Module:
    """Build a timm model without its classifier.

    Parameters
    ----------
    in_channels
        C.
    pretrained
        Read `checkpoint`; without, the weights are left as they are made.
    name
        An architecture of timm, such as ``resnet18``.
    checkpoint
        A safetensors file of its weights for C channels, a classifier's left out; none to start from random ones.
    options
        Passed to ``timm.create_model``, such as ``img_size`` for a transformer.

    Raises
    ------
    EncoderError
        timm is not installed, or the weights do not fit.
    ValueError
        `name` or an option would download.
    """
    if ":" in name or "/" in name or any(key.startswith(("pretrained", "checkpoint")) for key in options):
        raise ValueError("name an architecture and a local checkpoint; nothing is downloaded")
    timm = _library("timm")
    model: nn.Module = timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=0, **options)
    if checkpoint is not None and pretrained:
        load_weights(model, Path(checkpoint))
    return model


def transformers_encoder(
    *, in_channels: int, pretrained: bool, path: str, add_pooling_layer: bool = True
) -> nn.Module:
    """Build a vision model of transformers from a local folder.

    Parameters
    ----------
    in_channels
        C; must be what the model was made for.
    pretrained
        Read the weights; without, the folder's ``config.json`` alone is read.
    path
        The folder, with ``config.json`` and ``model.safetensors``.
    add_pooling_layer
        False for a transformer whose weights lack its pooling layer; its first token is the feature then.

    Raises
    ------
    EncoderError
        transformers is not installed, the folder is not there or lacks weights, or the channels are others.
    """
    if not (Path(path) / "config.json").is_file():
        raise EncoderError(f"{path}: no folder with a config.json; give a local folder, nothing is downloaded")
    if pretrained:
        _check_weights(Path(path))
    transformers = _library("transformers")
    local = {"local_files_only": True, "trust_remote_code": False}
    extra = {} if add_pooling_layer else {"add_pooling_layer": False}
    missing: list[str] = []
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        if pretrained:
            model, loaded = transformers.AutoModel.from_pretrained(
                path, config=config, use_safetensors=True, output_loading_info=True, **local, **extra
            )
            missing = sorted(loaded["missing_keys"])
        else:
            model = transformers.AutoModel.from_config(config, trust_remote_code=False, **extra)
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: transformers cannot build its model: {error}") from error
    if missing:  # transformers would go on with random numbers
        raise EncoderError(
            f"{path}: lacks {len(missing)} weights of the encoder, such as {missing[0]}; "
            "if that is its pooling layer, set encoder_options.add_pooling_layer to false"
        )
    channels = getattr(config, "num_channels", in_channels)
    if channels != in_channels:
        raise EncoderError(f"{path}: made for {channels} channels, the images have {in_channels}")
    return _TransformersEncoder(model)


def _check_weights(folder: Path) -> None:
    """Raise EncoderError where a folder has no weights but pickled ones, which transformers would not name."""
    pickled = folder / "pytorch_model.bin"
    if pickled.exists() and not any(folder.glob("*.safetensors*")):
        raise EncoderError(f"{pickled}: {how_to_convert(pickled)}")


class _TransformersEncoder(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

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
    except ImportError as error:
        raise EncoderError(f"encoder: {name} cannot be imported ({error}); install it: pip install {name}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into an encoder; what the file has besides, such as a classifier, is left.

    Raises
    ------
    EncoderError
        They do not fit, or some are missing.
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
