"""What a user decides about a model: every kind of model, in the order in which one meets them.

`ModelConfig` is the nested model and `LevelConfig` one of its levels; `levels_for` proposes levels for images of a
size. `EncoderConfig` and `PatchConfig` are what all of them share.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nested_ats.mask import PRIORS, Prior
from nested_ats.networks.builtin import ENCODERS, GIVEN
from nested_ats.networks.encoders import check_encoder, read_choice
from nested_ats.networks.trainable import Trainable, check_trainable
from nested_ats.sampling import METHODS, Method

# Of `levels_for`: pixels of the coarse view, ratio of downsamples, pixels of a region; pixels of a cell of the
# coarser maps, and cells along a side of what is drawn from them.
_COARSE_VIEW, _FINER, _REGION, _STRIDE, _GROUP = 512, 4, 64, 2, 4


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The feature network, and what the pixels are before it."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}  # read where a user's file becomes a configuration

    # By name, or as a mapping {name: ..., weights: PATH, ...} with further arguments (see
    # `nested_ats.networks.encoders.Choice`).
    encoder: str | dict[str, Any] = "lenet"
    features: int = 32  # channels of lenet and the resnets; the others have their own options
    trainable: Trainable = "all"  # part of the encoder: all, none, n for the last n of its stages, or {lora: rank}
    # Pixels in [0, 1] become (pixel - mean) / std before any network; one number, or one for each channel. None: as
    # the encoder's weights were trained with, where that is known, else 0.5 and 0.25; a model's own configuration has
    # the numbers.
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None  # likewise
    # Micrometres per pixel at downsample 1, so that slides of all scanners are seen at one scale: at downsample d a
    # pixel measures mpp * d. None: downsample 1 is the finest level of each slide, whatever its pixels measure.
    # A scene of 10 m is one of 1e7.
    mpp: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        object.__setattr__(self, "encoder", read_choice(self.encoder).plain)
        self._check_encoder(None)
        check_trainable(self.trainable)
        std = 1.0 if self.std is None else self.std
        stds = std if isinstance(std, tuple) else (std,)
        if not stds or not min(stds) > 0:
            raise ValueError("std: must be positive")
        if self.mpp is not None and not 0 < self.mpp < math.inf:
            raise ValueError("mpp: must be positive")

    @property
    def encoder_name(self) -> str:
        """Of the encoder, without its options."""
        return read_choice(self.encoder).name

    @property
    def smallest_view(self) -> int:
        """Sides, in pixels, that an image must have at the coarsest level that is read."""
        return 1

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of all levels that the model reads."""
        raise NotImplementedError

    def _check_encoder(self, patch_size: int | None) -> None:
        check_encoder(self.encoder_name, self.features, patch_size)


@dataclass(frozen=True, kw_only=True)
class PatchConfig(EncoderConfig):
    """Patches and the network that encodes them."""

    patch_size: int = 64  # side of the patches that the encoder sees, in pixels
    patch_downsample: float = 1.0  # of the patches
    scale: float = 8.0  # of the pooled features, which have unit length, before the head
    standardise: bool = (
        False  # whether features are brought to mean 0 and spread 1, by the first patches of a training
    )
    location: bool = False  # whether the feature network is told where in the image a patch lies (section 3.3)
    allow_gaps: bool = (
        False  # whether cells may be larger than a patch, which is centred on one: no draw sees the rest
    )
    # Patches that can be drawn: all; those with tissue, which is told by its colour; with valid pixels, all but
    # nodata; or with something of the mask that the manifest's column mask names.
    prior: Prior = "none"
    min_tissue: float = 0.05  # share of a patch that must be tissue, valid, or of the mask
    nodata: float | None = None  # of pixels that are not valid, as they are scaled, in files that do not tell it

    def _check_encoder(self, patch_size: int | None) -> None:
        assert patch_size is None  # noqa: S101 - the size is the configuration's own
        super()._check_encoder(self.patch_size)
        if self.patch_downsample < 1:
            raise ValueError("patch_downsample: must be at least 1")
        of_tiles = (self.patch_size, self.patch_downsample, self.prior, self.mpp) == (1, 1, "valid", None)
        if self.encoder_name == GIVEN and not of_tiles:
            raise ValueError(
                "encoder: given takes features, of which each tile has one pixel: set patch_size and "
                "patch_downsample to 1, prior to valid, and leave mpp out"
            )
        if not self.scale > 0:
            raise ValueError("scale: must be positive")
        if self.prior not in PRIORS:
            raise ValueError(f"prior: must be one of {', '.join(PRIORS)}, not {self.prior!r}")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError("min_tissue: must be between 0 and 1")
        if self.nodata is not None and not -1 <= self.nodata <= 1:
            raise ValueError("nodata: must be between -1 and 1, the ends of the type's range")

    @property
    def cell_l0(self) -> float:
        """Side of the cells that patches are centred on, in level-0 pixels."""
        raise NotImplementedError

    def _check_cover(self, field: str) -> None:
        """Raise ValueError where a patch is smaller than the cell that it stands for, and that is not meant."""
        side, cell_l0 = self.patch_size * self.patch_downsample, self.cell_l0
        if side * (1 + 1e-9) < cell_l0 and not self.allow_gaps:  # 30 * 1.1 is to cover 33
            raise ValueError(
                f"{field}: patches of patch_size * patch_downsample = {side:g} level-0 pixels do not cover the cells "
                f"of {cell_l0:g} that they are drawn from; take smaller cells or larger patches, or set "
                "allow_gaps to true where the gaps are meant"
            )

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of all levels that the model reads."""
        return (self.patch_downsample,)


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of attention."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}  # read where a user's file becomes a configuration

    downsample: float  # of the view that this level's attention looks at, relative to the finest level
    samples: int  # units drawn from this level's attention: the budget
    size: int | None = None  # side of a region in pixels of its view; none for the first level, the whole image
    channels: tuple[int, ...] = (8, 8)  # of the attention network's 3x3 convolutions
    stride: int = 8  # pixels of the view per cell of the attention map
    group: int = 1  # cells of the map along a side of what is drawn; the last level draws cells, and has 1

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        if min(self.samples, self.stride, self.group, *self.channels, len(self.channels)) < 1:
            raise ValueError("levels: samples, stride, group and channels must be positive, and channels not empty")
        if self.size is not None and (self.size < 1 or self.size % self.unit):
            raise ValueError("levels: size must be a positive multiple of stride * group")

    @property
    def unit(self) -> int:
        """Side of what is drawn in pixels of the view."""
        return self.stride * self.group

    @property
    def extent_l0(self) -> float:
        """Side of what is drawn in level-0 pixels."""
        return self.downsample * self.unit


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PatchConfig):
    """A nested attention-sampling model."""

    kind: Literal["ats"] = "ats"
    levels: tuple[LevelConfig, ...]  # coarse to fine; one level is the paper's model
    attention: Literal["residual", "independent"] = "residual"  # residual: a finer level adds to its parent's map
    method: Method = "pivotal"  # sampler: pivotal, systematic, desraj or multinomial

    def __post_init__(self) -> None:
        """Raise ValueError where the levels do not fit one another."""
        if not self.levels:
            raise ValueError("levels: at least one is needed")
        if any(b > a for a, b in itertools.pairwise(self.downsamples)) or self.patch_downsample < 1:
            raise ValueError("levels: downsamples must go from coarse to fine, down to patch_downsample >= 1")
        for depth, level in enumerate(self.levels):
            if (level.size is None) != (depth == 0):
                raise ValueError(f"levels[{depth}].size: the first level has none, the others need one")
            side = (level.size or 0) * level.downsample
            if depth and side * (1 + 1e-9) < self.levels[depth - 1].extent_l0:  # 30 * 1.1 is to cover 33
                raise ValueError(
                    f"levels[{depth}].size: regions of size * downsample = {side:g} level-0 pixels do not cover the "
                    f"cells of {self.levels[depth - 1].extent_l0:g} above them"
                )
        super().__post_init__()
        self._check_cover(f"levels[{len(self.levels) - 1}].stride")
        if self.levels[-1].group != 1:
            raise ValueError("levels: the last level draws the patches, cells of its map: its group must be 1")
        if self.attention not in ("residual", "independent"):
            raise ValueError(f"attention: must be residual or independent, not {self.attention!r}")
        if self.method not in METHODS:
            raise ValueError(f"method: must be one of {', '.join(METHODS)}, not {self.method!r}")

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of all levels that the model reads, coarse to fine."""
        return (*(level.downsample for level in self.levels), self.patch_downsample)

    @property
    def cell_l0(self) -> float:
        """Side of the cells that patches are centred on, in level-0 pixels."""
        return self.levels[-1].extent_l0


def levels_for(shape_yx: tuple[int, int], *, patch_size: int = 64, samples: int = 8) -> tuple[LevelConfig, ...]:
    """Levels of attention for images of a size, so that a training step costs nearly the same whatever the size.

    The coarse view has at most 512 pixels a side, and each further level is four times finer, until what is drawn is
    no larger than a patch at the finest level. The maps of the coarser levels are finer than what is drawn from them.

    Parameters
    ----------
    shape_yx
        Height and width of the largest image in pixels, whose downsamples are powers of two.
    patch_size
        Side of a patch in pixels.
    samples
        Budget of every level.
    """
    downsample = 2 ** max(0, math.ceil(math.log2(max(shape_yx) / _COARSE_VIEW)))
    downsamples = [downsample]
    while downsamples[-1] * _STRIDE * _GROUP > patch_size and downsamples[-1] > 1:
        downsamples.append(max(downsamples[-1] // _FINER, 1))
    return tuple(
        LevelConfig(
            downsample=each,
            samples=samples,
            size=_REGION if depth else None,
            stride=_STRIDE if depth + 1 < len(downsamples) else _STRIDE * _GROUP,
            group=_GROUP if depth + 1 < len(downsamples) else 1,
        )
        for depth, each in enumerate(downsamples)
    )


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
        self._check_cover("stride")
        if self.attention not in ("plain", "gated"):
            raise ValueError(f"attention: must be plain or gated, not {self.attention!r}")

    @property
    def cell_l0(self) -> float:
        """Side of the cells that patches are centred on, in level-0 pixels."""
        return self.stride * self.patch_downsample


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
        self._check_cover("cell")

    @property
    def cell_l0(self) -> float:
        """Side of the cells that patches are centred on, in level-0 pixels."""
        return self.cell


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


AnyConfig = ModelConfig | DeepMILConfig | UniformConfig | CNNConfig
