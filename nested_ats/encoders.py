"""Feature networks: from a patch to a feature vector (paper, appendix H), and the registry that names them.

None of ours has batch statistics: a patch's feature must not depend on the patches it is batched with, or N workers
would not train the model that one does. Where the paper's networks have batch normalisation, ours have group
normalisation. Encoders from elsewhere (`nested_ats.backbones`) may have it; frozen (`trainable="none"`) they run
in evaluation mode and are safe.

Shape letters: P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.backbones import import_encoder, load_weights, timm_encoder, transformers_encoder
from nested_ats.errors import EncoderError, NestedATSError
from nested_ats.mobilenet import MobileNetV2Encoder

Trainable = Literal["all", "none"] | int


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
    weights
        Whether pretrained weights can be read, by the option ``weights``.
    """

    build: Callable[[int, int, int, Mapping[str, Any]], nn.Module]
    smallest_patch: int
    channel_multiple: int = 1
    any_size: bool = True
    weights: bool = False


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
    "mobilenet_v2": Builtin(lambda c, _n, _, o: MobileNetV2Encoder(in_channels=c, **o), 32, weights=True),
    "resnet16": _resnet(stem=3, stem_stride=2, widths=(1, 1, 2, 2, 4, 4, 8), strides=(1, 1, 2, 1, 2, 1, 2)),
}
# What the option says that an encoder from elsewhere cannot do without.
EXTRAS = {
    "timm": ("name", "an architecture of timm, such as resnet18"),
    "transformers": ("path", "a local folder with config.json and model.safetensors"),
}


def check_encoder(name: str, channels: int, patch_size: int | None) -> None:
    """See that an encoder has a known name, or an import path's form, and takes such patches (None: any image).

    Raises
    ------
    ValueError
        With the field of the configuration that is wrong.
    """
    if name in EXTRAS or is_import_path(name):
        return
    if name not in ENCODERS:
        known = ", ".join((*ENCODERS, *EXTRAS))
        raise ValueError(f"encoder: must be one of {known}, or package.module:factory, not {name!r}")
    builtin = ENCODERS[name]
    if patch_size is None and not builtin.any_size:
        raise ValueError(f"encoder: {name} takes patches of one size, not whole images")
    if patch_size is not None and patch_size < builtin.smallest_patch:
        raise ValueError(f"patch_size: {name} needs at least {builtin.smallest_patch} pixels")
    if channels < 1 or channels % builtin.channel_multiple:
        raise ValueError(f"features: {name} needs a positive multiple of {builtin.channel_multiple}")


def is_import_path(name: str) -> bool:
    """Whether an encoder's name is code to import, ``package.module:factory``."""
    module, colon, factory = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *factory.split(".")))


def build_encoder(
    name: str,
    *,
    in_channels: int,
    channels: int,
    patch_size: int | None,
    options: Mapping[str, Any],
    pretrained: bool = True,
) -> tuple[nn.Module, int]:
    """Build an encoder by name.

    Parameters
    ----------
    name
        A key of `ENCODERS`, ``timm``, ``transformers``, or ``package.module:factory``, which is imported and called
        with ``in_channels`` and `options`.
    in_channels
        C.
    channels
        Of the encoders of ours that have a width to choose.
    patch_size
        H = W; none for whole images of any size.
    options
        Further arguments of the encoder.
    pretrained
        Read the weights that `options` name; without, only the architecture (another state will be loaded).

    Returns
    -------
    encoder, features
        A module that maps (P, C, H, W) to (P, D), and D.

    Raises
    ------
    EncoderError
        It cannot be imported, built, or used on such patches.
    """
    needed, meaning = EXTRAS.get(name, ("", ""))
    if needed not in options and needed:
        raise EncoderError(f"encoder_options: {name} needs {needed}, {meaning}")
    try:
        if name in ENCODERS:
            encoder = _build_ours(name, in_channels, channels, patch_size or 0, options, pretrained=pretrained)
        elif name == "timm":
            encoder = timm_encoder(in_channels=in_channels, pretrained=pretrained, **options)
        elif name == "transformers":
            encoder = transformers_encoder(in_channels=in_channels, pretrained=pretrained, **options)
        else:
            encoder = import_encoder(name)(in_channels=in_channels, **options)
    except NestedATSError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        reason = re.sub(r"^[\w.<>]+\(\) ", "", str(error))  # of a TypeError: the name of our function or class
        raise EncoderError(f"encoder_options: {name} cannot be built with {options!r}: {reason}") from error
    if not isinstance(encoder, nn.Module):
        raise EncoderError(f"encoder: {name} gives a {type(encoder).__name__}, not a torch.nn.Module")
    features = getattr(encoder, "features", None)
    if isinstance(features, int) and not is_import_path(name):
        return encoder, features
    found = _try(name, encoder, in_channels, patch_size or 224)
    if isinstance(features, int) and features != found:
        raise EncoderError(f"encoder: {name} says that it has {features} features, and gives {found}")
    return encoder, found


def _build_ours(
    name: str, in_channels: int, channels: int, patch_size: int, options: Mapping[str, Any], *, pretrained: bool
) -> nn.Module:
    ours = ENCODERS[name]
    arguments = dict(options)
    weights = arguments.pop("weights", None) if ours.weights else None
    encoder = ours.build(in_channels, channels, patch_size, arguments)
    if weights is not None and pretrained:
        load_weights(encoder, Path(weights))
    return encoder


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


def freeze(encoder: nn.Module, trainable: Trainable) -> list[nn.Module]:
    """Take gradients from the parts of an encoder that are not trained.

    Parameters
    ----------
    encoder
        Any.
    trainable
        ``all``, ``none``, or n: the last n stages are trained. The stages are the encoder's children in the order in
        which it registered them, containers opened, those without parameters not counted.

    Returns
    -------
    The parts that are frozen; they belong in evaluation mode.

    Raises
    ------
    EncoderError
        There are fewer than n stages.
    """
    if trainable == "all":
        return []
    encoder.requires_grad_(requires_grad=False)
    if trainable == "none":
        return [encoder]
    inside = encoder
    while len(children := list(inside.children())) == 1:  # wrappers
        inside = children[0]
    stages = _stages(inside)
    counted = [place for place, stage in enumerate(stages) if any(True for _ in stage.parameters())]
    if trainable > len(counted):
        raise EncoderError(f"trainable: the encoder has {len(counted)} stages, fewer than {trainable}")
    first = counted[-trainable]
    for stage in stages[first:]:
        stage.requires_grad_(requires_grad=True)
    return stages[:first]


def _stages(module: nn.Module) -> list[nn.Module]:
    stages: list[nn.Module] = []
    for child in module.children():
        inner = list(child.children())
        container = isinstance(child, nn.Sequential | nn.ModuleList) or len(inner) == 1
        bare = not any(True for _ in child.parameters(recurse=False))
        stages += _stages(child) if inner and container and bare else [child]
    return stages
