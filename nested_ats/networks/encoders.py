"""Feature networks: from a patch to a feature vector (paper, appendix H), and the registry that names them.

None of ours has batch statistics: a patch's feature must not depend on the patches it is batched with, or N workers
would not train the model that one does. Where the paper's networks have batch normalisation, ours have group
normalisation. `mobilenet_v2` and encoders from elsewhere (`nested_ats.networks.backbones`) may have it. Frozen or
trained in part (`nested_ats.networks.trainable`) they normalise by the statistics of their weights and are safe;
trained whole they are refused on several workers (`pipeline.training.trainer`).

Shape letters: P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.errors import EncoderError, NestedATSError
from nested_ats.networks.backbones import (
    Backbone,
    import_encoder,
    load_weights,
    preset_backbone,
    timm_backbone,
    transformers_backbone,
)
from nested_ats.networks.mobilenet import MobileNetV2Encoder
from nested_ats.networks.presets import IMAGENET_MEAN, IMAGENET_STD, PRESETS


class LeNetEncoder(nn.Module):
    """Convolutions in the manner of LeNet-1 with a global max-pool at the end (appendix H.1); D = `channels`."""

    def __init__(self, *, in_channels: int, channels: int = 32) -> None:
        super().__init__()
        self.features = channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 5),
            nn.MaxPool2d(2),  # before the ReLU, which it commutes with: a quarter of the work
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3),
            nn.AdaptiveMaxPool2d(1),
            nn.ReLU(),
            nn.Flatten(),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W), H and W >= 24 -> (P, D)."""
        features: Tensor = self.layers(patches)
        return features


class IlseEncoder(nn.Module):
    """The network of Ilse et al. (2018) for colon cancer patches (appendix H.2; their patches have 27 pixels).

    Their table, where conv(k, s, p)-n has n filters of k pixels with stride s and padding p: conv(4,1,0)-36 + ReLU,
    maxpool(2,2), conv(3,1,0)-48 + ReLU, maxpool(2,2), fc-512 + ReLU, dropout, fc-512 + ReLU, dropout. What follows
    there, mil-attention-128 and fc-1 + sigm, is `DeepMIL` here.

    Parameters
    ----------
    in_channels
        C.
    patch_size
        H = W: the linear layers see the whole patch, so they are made for one size.
    features
        D, the width of both linear layers; theirs is 512.
    dropout
        Probability after each linear layer. Theirs drops (public versions of it, 0.5 or 0.2); ours does not by
        default, since what is dropped depends on the batch and so on the number of workers.
    """

    def __init__(self, *, in_channels: int, patch_size: int = 27, features: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = features
        side = ((patch_size - 3) // 2 - 2) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 36, 4),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(36, 48, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * side * side, features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(features, features),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W), H = W = `patch_size` -> (P, D)."""
        features: Tensor = self.layers(patches)
        return features


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(8, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.GroupNorm(8, after),
        )
        same = before == after and stride == 1
        self.stride = stride
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution of stride 2 by hand: torch 2.13's own, channels last with 8 channels on a CPU, writes past
        # its memory in the backward pass.
        return functional.relu(self.layers(x) + self.shortcut(x[..., :: self.stride, :: self.stride]))


class ResNetEncoder(nn.Module):
    """A ResNet with group normalisation and a global mean at the end; D = `channels` times the last width.

    Parameters
    ----------
    in_channels
        C.
    channels
        Of the first convolution, a multiple of 8.
    stem, stem_stride
        Kernel and stride of the first convolution.
    widths, strides
        Of each residual block of two 3x3 convolutions; widths in `channels`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int = 32,
        stem: int = 5,
        stem_stride: int = 2,
        widths: Sequence[int] = (1, 2, 4),
        strides: Sequence[int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        self.features = channels * widths[-1]
        before = [channels * width for width in (1, *widths[:-1])]
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, stem, stride=stem_stride, padding=stem // 2, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            *(_ResidualBlock(b, channels * w, s) for b, w, s in zip(before, widths, strides, strict=True)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, D)."""
        features: Tensor = self.layers(patches)
        return features


class Builtin(NamedTuple):
    """An encoder of ours.

    Attributes
    ----------
    build
        From (in_channels, channels, patch_size, options); patch_size is 0 where any size will come.
    smallest_patch
        Pixels.
    channel_multiple
        Of ModelConfig.features.
    any_size
        Whether one network takes images of any size.
    imagenet
        Whether its published weights are for pixels normalised as ImageNet's.
    """

    build: Callable[[int, int, int, Mapping[str, Any]], nn.Module]
    smallest_patch: int
    channel_multiple: int = 1
    any_size: bool = True
    imagenet: bool = False


def _resnet(**shape: Any) -> Builtin:
    return Builtin(lambda c, n, _, o: ResNetEncoder(in_channels=c, channels=n, **{**shape, **o}), 8, 8)


# The layer that the head adds is counted, as in He et al. (2016): resnet and resnet8 have 7 3x3 (or 5x5)
# convolutions on their longest path, resnet16 has 15.
ENCODERS: dict[str, Builtin] = {
    "lenet": Builtin(lambda c, n, _, o: LeNetEncoder(in_channels=c, channels=n, **o), 24, 2),
    "ilse": Builtin(lambda c, _, p, o: IlseEncoder(in_channels=c, patch_size=p, **o), 12, any_size=False),
    # Ours: as deep and with the same total stride of 8 as the paper's, but it strides in a 5x5 stem, which makes it
    # four times cheaper there, and doubles its width: D = 4 channels.
    "resnet": _resnet(),
    # Appendix H.3: 8 layers of 32 channels with strides 1, 2, 2, 2, as in the authors' code, but for group
    # normalisation after the convolutions where they have batch normalisation before them.
    "resnet8": _resnet(stem=3, stem_stride=1, widths=(1, 1, 1), strides=(2, 2, 2)),
    # The CNN baseline of H.1 and H.3: starts with 32 channels, doubled after every two residual blocks. The strides
    # are not in the paper: here the image is halved by the stem and wherever the width doubles.
    "resnet16": _resnet(stem=3, stem_stride=2, widths=(1, 1, 2, 2, 4, 4, 8), strides=(1, 1, 2, 1, 2, 1, 2)),
    "mobilenet_v2": Builtin(lambda c, _n, _, o: MobileNetV2Encoder(in_channels=c, **o), 32, imagenet=True),
}
TIMM, TRANSFORMERS = "timm/", "transformers"


class Choice(NamedTuple):
    """An encoder as the configuration names it.

    Attributes
    ----------
    name
        A key of `ENCODERS` or `PRESETS`, ``timm/ARCHITECTURE``, ``transformers/OWNER/NAME``, ``transformers`` for a
        folder that `weights` names, or ``package.module:factory``.
    weights
        File or folder that its weights are read from; None for what the encoder does without.
    options
        Further arguments of the encoder.
    """

    name: str
    weights: str | None
    options: dict[str, Any]

    @property
    def plain(self) -> str | dict[str, Any]:
        """As it stands in the configuration: the name, where there is nothing else."""
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"name": self.name, **weights, **self.options} if weights or self.options else self.name


def read_choice(encoder: str | Mapping[str, Any]) -> Choice:
    """Read a plain name, or a mapping of ``name``, ``weights`` and options.

    Raises
    ------
    ValueError
        It is neither.
    """
    entries: dict[Any, Any] = dict(encoder) if isinstance(encoder, Mapping) else {"name": encoder}
    name, weights = entries.pop("name", None), entries.pop("weights", None)
    if isinstance(weights, Path):
        weights = str(weights)
    if not isinstance(name, str):
        raise ValueError(  # noqa: TRY004 - a wrong value of the configuration, as everywhere
            "encoder: must be a name, or a mapping with a name, as in {name: mobilenet_v2, weights: PATH}"
        )
    if weights is not None and not isinstance(weights, str):
        raise ValueError(f"encoder: weights must be the path of a file or folder, or random, not {weights!r}")
    if not all(isinstance(key, str) for key in entries):
        raise ValueError("encoder: the options must have names")
    return Choice(name, weights, entries)


def check_encoder(name: str, channels: int, patch_size: int | None) -> None:
    """See that an encoder has a known name, or an import path's form, and takes such patches (None: any image).

    Raises
    ------
    ValueError
        With the field of the configuration that is wrong.
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
        Its entry in the configuration, with all that it takes to build it again without its weights.
    mean, std
        Of each channel of the pixels, in [0, 1], that its weights were trained on; None where nothing says so.
    """

    module: nn.Module
    features: int
    encoder: str | dict[str, Any]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


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
        Of the encoders of ours that have a width to choose.
    patch_size
        H = W; none for whole images of any size.
    pretrained
        Read the weights; without, only the architecture (another state will be loaded), and nothing is read.

    Raises
    ------
    EncoderError
        It cannot be imported, built, or used on such patches, or its weights are not here.
    """
    choice = read_choice(encoder)
    try:
        backbone = _build(choice, in_channels, channels, patch_size or 0, pretrained=pretrained)
    except NestedATSError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        reason = re.sub(r"^[\w.<>]+\(\) ", "", str(error))  # of a TypeError: the name of our function or class
        raise EncoderError(f"encoder: {choice.name} cannot be built with {choice.options!r}: {reason}") from error
    module, name = backbone.module, choice.name
    if not isinstance(module, nn.Module):
        raise EncoderError(f"encoder: {name} gives a {type(module).__name__}, not a torch.nn.Module")
    said = getattr(module, "features", None)
    found = said if isinstance(said, int) and name in ENCODERS else _try(name, module, in_channels, patch_size or 224)
    if isinstance(said, int) and said != found:
        raise EncoderError(f"encoder: {name} says that it has {said} features, and gives {found}")
    kept = choice._replace(options=backbone.options).plain
    return Built(module, found, kept, _each(backbone.mean, in_channels), _each(backbone.std, in_channels))


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


def _each(values: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """Values of a library for each channel; none where they are for other channels."""
    return tuple(map(float, values)) if values is not None and len(values) == channels else None


def _try(name: str, encoder: nn.Module, in_channels: int, size: int) -> int:
    """D, by encoding two blank patches; in evaluation mode, so that nothing is learned from them."""
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
