"""What attention sampling is compared with (paper, section 4.1.1), behind the same interface.

`DeepMIL` encodes every patch of a grid and attends to the features (Ilse et al. 2018), `CNN` sees the whole image at
one downsample, and `UniformSampling` (U-N) draws patches without attention.

Shape letters: B batch, K patches of a grid, C channels, H W pixels, D features, L attention features, Q classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nested_ats.expectation import entropy, expectation
from nested_ats.images import Image, Map, find_level
from nested_ats.models.base import (
    EncoderConfig,
    ImageModel,
    Output,
    PatchConfig,
    PatchModel,
    Phase,
    Population,
    Sampler,
    SamplingModel,
    draw_phase,
    image_cells,
    take_all,
)
from nested_ats.networks.encoders import ENCODERS
from nested_ats.sampling import Draw, draw, fold_in


@dataclass(frozen=True, kw_only=True)
class DeepMILConfig(PatchConfig):
    """Deep multiple-instance learning over all patches of a grid (Ilse et al. 2018)."""

    kind: Literal["deepmil"] = "deepmil"
    stride: int = 32  # pixels at patch_downsample from one patch to the next; the paper's is at least half a patch
    attention: Literal["plain", "gated"] = "plain"  # their equation 8 or 9
    attention_features: int = 128  # width of the attention network
    chunk: int = 256  # patches of one image encoded at a time
    recompute: bool = False  # encode each chunk again in the backward pass instead of keeping its activations

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        super().__post_init__()
        if min(self.stride, self.attention_features, self.chunk) < 1:
            raise ValueError("stride, attention_features and chunk must be positive")
        self._check_cover("stride", self.stride * self.patch_downsample)
        if self.attention not in ("plain", "gated"):
            raise ValueError(f"attention: must be plain or gated, not {self.attention!r}")


@dataclass(frozen=True, kw_only=True)
class UniformConfig(PatchConfig):
    """Patches drawn uniformly (U-N)."""

    kind: Literal["uniform"] = "uniform"
    samples: int = 10  # N, patches drawn
    cell: float = 8.0  # side of a cell in level-0 pixels: downsample * stride of the attention that it stands for

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        super().__post_init__()
        if min(self.samples, self.cell) < 1:
            raise ValueError("samples and cell must be at least 1")
        self._check_cover("cell", self.cell)


@dataclass(frozen=True, kw_only=True)
class CNNConfig(EncoderConfig):
    """A CNN on the whole image."""

    kind: Literal["cnn"] = "cnn"
    encoder: str | dict[str, Any] = (
        "resnet16"  # resnet16 in H.1 and H.3 of the paper, resnet8 in H.2; any that takes every size
    )
    downsample: float = 1.0  # of the image that it sees: one over the paper's scale

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        super().__post_init__()
        if self.downsample < 1:
            raise ValueError("downsample: must be at least 1")

    @property
    def smallest_view(self) -> int:
        """Sides, in pixels, that an image must have at the coarsest level that is read."""
        return ENCODERS[self.encoder_name].smallest_patch if self.encoder_name in ENCODERS else 1

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of all levels that the model reads."""
        return (self.downsample,)


class _AttentionPooling(nn.Module):
    """Logits of the attention to each feature: equation 8 of Ilse et al. (2018), or 9 where gated."""

    def __init__(self, features: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, width)
        self.gate = nn.Linear(features, width) if gated else None
        self.logit = nn.Linear(width, 1, bias=False)  # softmax does not see a bias

    def forward(self, features: Tensor) -> Tensor:
        """(K, D) -> (K,)."""
        hidden = self.hidden(features).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(features).sigmoid()
        logits: Tensor = self.logit(hidden)
        return logits.squeeze(-1)


class DeepMIL(PatchModel):
    """Attention over the features of **all** patches of a grid; every draw is the same.

    Patches are centred on the cells of a grid that tiles the image. Nothing is left out as background.

    Memory of a training step grows with the image: the activations of every patch are kept, as in the paper, or with
    ``recompute`` those of one chunk at a time, for one more forward pass; the pixels of all patches are kept either
    way, as the image gives them, (K, C, patch_size, patch_size). Without gradients one chunk is held at a time.

    Parameters
    ----------
    config
        Grid, patches and networks.
    in_channels
        C of the images.
    classes
        Q.
    pretrained
        Read the weights that ``encoder`` names.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    config: DeepMILConfig

    def __init__(self, config: DeepMILConfig, *, in_channels: int, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, in_channels=in_channels, classes=classes, pretrained=pretrained)
        gated = config.attention == "gated"
        self.pooling = _AttentionPooling(self.features, config.attention_features, gated=gated)

    def forward(
        self, images: Sequence[Image], keys: Tensor, *, views: Sequence[Tensor] | None = None, map_: Map = map
    ) -> Output:
        """Classify a batch of images; see `ImageModel.forward`. The one phase holds every patch, with z = 1."""
        del keys, views
        extent = self.config.patch_downsample * self.config.stride
        centers, there = image_cells(images, extent)
        bags = [self._bag(image, c[t], map_) for image, c, t in zip(images, centers, there, strict=True)]
        logits = [
            functional.pad(self.pooling(bag), (0, centers.shape[1] - len(bag)), value=-torch.inf) for bag in bags
        ]
        stacked = torch.stack(logits)
        log_attention = stacked.log_softmax(-1, dtype=torch.promote_types(stacked.dtype, torch.float32))
        attention = log_attention.exp()
        # Not a matrix product: autocast would make it one of bf16.
        pooled = torch.stack([(a[: len(f), None] * f).sum(0) for a, f in zip(attention, bags, strict=True)])
        phase = _all_of(Population(log_attention[:, None], centers[:, None], extent))
        return Output(self.head(pooled), entropy(log_attention), pooled, (phase,))

    def _bag(self, image: Image, centers_l0: Tensor, map_: Map) -> Tensor:
        """Features of all patches of an image: (K, 2) level-0 pixels -> (K, D)."""
        features = []
        for chunk in torch.split(centers_l0, self.config.chunk):
            if self.config.recompute and torch.is_grad_enabled() and not self._keeps:
                pixels, location = self._read(image, chunk, map_)
                features.append(checkpoint(self._embed, pixels, location, use_reentrant=False))
            else:
                features.append(self.encode_one(image, chunk, map_))
        return torch.cat(features)


class UniformSampling(SamplingModel):
    """The mean feature of N patches drawn without attention (U-N).

    Patches are centred on the cells of a map, as those of attention sampling are; N distinct cells are drawn, every
    subset with the same chance, and weigh the same.

    Parameters
    ----------
    config
        Map, number of patches, and network.
    in_channels
        C of the images.
    classes
        Q.
    pretrained
        Read the weights that ``encoder`` names.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    config: UniformConfig

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Give every cell of an image the same attention; see `SamplingModel.attend`. No pixel is read."""
        del views
        centers, there = image_cells(images, self.config.cell)
        weight = self.head.weight
        logits = torch.zeros(there.shape, device=weight.device, dtype=weight.dtype)
        logits = logits.masked_fill(~there.to(weight.device), -torch.inf)
        return Population(logits.log_softmax(-1)[:, None], centers[:, None], self.config.cell)

    def sample(
        self,
        images: Sequence[Image],
        population: Population,
        keys: Tensor,
        *,
        map_: Map = map,
        sampler: Sampler | None = None,
        exact: int = 0,
        more: int = 1,
    ) -> Output:
        """Draw patches, encode them, and classify by their mean; see `SamplingModel.sample`."""
        ones = torch.ones_like(population.log_attention[:, :, 0])
        draws = take_all if exact else sampler or _draw_equally
        phase = draw_phase(population, ones, ones, draws, self.config.samples * more, fold_in(keys, 0))
        if exact:
            pooled = self._pool_all(images, phase, map_, exact)
        else:
            pooled = expectation(phase.attention, self.encode(images, phase.centers_l0, map_), phase.z)
        return Output(self.head(pooled), entropy(population.log_attention[:, 0]), pooled, (phase,))


class CNN(ImageModel):
    """An encoder that sees the whole image at one downsample; every draw is the same.

    Its feature is not normalised, there being nothing to weigh. Memory grows with the image.

    Parameters
    ----------
    config
        Downsample and network.
    in_channels
        C of the images.
    classes
        Q.
    pretrained
        Read the weights that ``encoder`` names.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    config: CNNConfig

    def __init__(self, config: CNNConfig, *, in_channels: int, classes: int, pretrained: bool = True) -> None:
        super().__init__(config, in_channels=in_channels, classes=classes, patch_size=None, pretrained=pretrained)

    def coarse_view(self, image: Image) -> Tensor:
        """Read the whole image at the model's downsample; see `ImageModel.coarse_view`."""
        level = find_level(image, self.config.downsample)
        return image.read(level, torch.tensor([[0, 0, *image.shapes[level]]]))[0]

    def forward(
        self, images: Sequence[Image], keys: Tensor, *, views: Sequence[Tensor] | None = None, map_: Map = map
    ) -> Output:
        """Classify a batch of images; see `ImageModel.forward`. Images of one size run as one batch."""
        del keys
        if views is None:
            views = list(map_(self.coarse_view, images))
        features: dict[int, Tensor] = {}
        for shape in dict.fromkeys(view.shape for view in views):
            rows = [i for i, view in enumerate(views) if view.shape == shape]
            encoded = self._encode_seen(self._see(torch.stack([views[i] for i in rows])))
            features |= dict(zip(rows, encoded, strict=True))
        pooled = torch.stack([features[i] for i in range(len(views))])
        return Output(self.head(pooled), pooled.new_zeros(len(views)), pooled, ())


def _draw_equally(weights: Tensor, n: int, keys: Tensor) -> Draw:
    """Draw n of the units of positive (and equal) weight without replacement, z = K / n."""
    n = min(n, weights.shape[-1])
    drawn = draw(weights, n, method="desraj", keys=keys.to(weights.device))
    units = (weights > 0).sum(-1, keepdim=True)
    return Draw(drawn.indices, torch.where(drawn.z > 0, (units / n).clamp_min(1.0), 0.0).to(weights.dtype))


def _all_of(population: Population) -> Phase:
    """A phase that has drawn everything."""
    ones = torch.ones_like(population.log_attention[:, :, 0])
    return draw_phase(population, ones, ones, take_all, 0, torch.empty(0))
