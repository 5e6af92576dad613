"""Nested attention sampling at any depth; one level is the model of Katharopoulos and Fleuret (2019).

The whole image is seen once, at the coarsest downsample. Attention there draws regions; each is read at the next
finer downsample and its attention forms, with that of the other drawn regions, **one** list of leaves from which
the next draw is made jointly: patches go where the attention is, not a fixed share to each region. The last draw
gives the patches that the encoder sees. Reads are bounded by the budget whatever the size of the image.

Shape letters: B batch, n drawn units, k cells of one map, K = n k units of a population, C channels, D features,
Q classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.attention import AttentionNetwork
from nested_ats.base import (
    Output,
    PatchConfig,
    Phase,
    Population,
    Sampler,
    SamplingModel,
    boxes_at,
    draw_phase,
    grid_centers,
    image_sizes,
    take_all,
)
from nested_ats.expectation import entropy, expectation, follow, leave_one_out
from nested_ats.geometry import curve_order
from nested_ats.images import Image, Map, find_level, read_batch
from nested_ats.sampling import METHODS, Draw, Method, draw, fold_in

Baseline = Literal["none", "constant", "leave-one-out"]

_COARSE_VIEW, _FINER, _REGION = 512, 4, 64  # of `levels_for`: pixels, ratio of downsamples, pixels


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of attention."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}  # read where a user's file becomes a configuration

    downsample: float  # of the view that this level's attention looks at, relative to the finest level
    samples: int  # units drawn from this level's attention: the budget
    size: int | None = None  # side of a region in pixels of its view; none for the first level, the whole image
    channels: tuple[int, ...] = (8, 8)  # of the attention network's 3x3 convolutions
    stride: int = 8  # pixels of the view per cell of the attention map

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        if min(self.samples, self.stride, *self.channels, len(self.channels)) < 1:
            raise ValueError("levels: samples, stride and channels must be positive, and channels not empty")
        if self.size is not None and (self.size < 1 or self.size % self.stride):
            raise ValueError("levels: size must be a positive multiple of stride")

    @property
    def extent_l0(self) -> float:
        """Side of a cell of the attention map in level-0 pixels."""
        return self.downsample * self.stride


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PatchConfig):
    """A nested attention-sampling model."""

    kind: Literal["ats"] = "ats"
    levels: tuple[LevelConfig, ...]  # coarse to fine; one level is the paper's model
    method: Method = "pivotal"  # sampler: pivotal, systematic, desraj or multinomial
    baseline: Baseline = "none"  # on the gradient of the attention: none, constant, or leave-one-out (multinomial)

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
        self._check_cover(f"levels[{len(self.levels) - 1}].stride", self.levels[-1].extent_l0)
        if self.method not in METHODS:
            raise ValueError(f"method: must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"baseline: must be one of {', '.join(get_args(Baseline))}, not {self.baseline!r}")
        if self.baseline == "leave-one-out" and self.method != "multinomial":
            raise ValueError("baseline: leave-one-out is unbiased with method multinomial only; constant is with any")

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of all levels that the model reads, coarse to fine."""
        return (*(level.downsample for level in self.levels), self.patch_downsample)


def levels_for(shape_yx: tuple[int, int], *, patch_size: int = 64, samples: int = 8) -> tuple[LevelConfig, ...]:
    """Levels of attention for images of a size, so that a training step costs nearly the same whatever the size.

    The coarse view has at most 512 pixels a side, and each further level is four times finer, until a cell of
    attention is no larger than a patch at the finest level.

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
    levels = [LevelConfig(downsample=downsample, samples=samples)]
    while levels[-1].extent_l0 > patch_size and downsample > 1:
        downsample = max(downsample // _FINER, 1)
        levels.append(LevelConfig(downsample=downsample, samples=samples, size=_REGION))
    return tuple(levels)


class NestedATS(SamplingModel):
    """Nested attention sampling: equations 18 to 20 of the paper at every level, with one head at the end.

    Parameters
    ----------
    config
        Levels, budget, patches, networks and sampler.
    in_channels
        C of the images.
    classes
        Q.
    pretrained
        Read the weights that ``encoder_options`` name.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    config: ModelConfig
    attention: nn.ModuleList

    def __init__(self, config: ModelConfig, *, in_channels: int, classes: int, pretrained: bool = True) -> None:
        attention = nn.ModuleList(
            AttentionNetwork(in_channels=in_channels, channels=level.channels, stride=level.stride)
            for level in config.levels
        )
        super().__init__(config, in_channels=in_channels, classes=classes, pretrained=pretrained, attention=attention)
        self.baseline = nn.Parameter(torch.zeros(self.features)) if config.baseline == "constant" else None

    def coarse_view(self, image: Image) -> Tensor:
        """Read the view of the whole image that the first level looks at; see `ImageModel.coarse_view`.

        Returns
        -------
        (C, H, W) as the image gives it, H and W multiples of the first stride plus two margins.
        """
        level, network = self.config.levels[0], self._network(0)
        index = find_level(image, level.downsample)
        stride, margin = network.stride, network.margin
        side = [-(-size // stride) * stride + 2 * margin for size in image.shapes[index]]
        return image.read(index, torch.tensor([[-margin, -margin, *side]]))[0]

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Attention over the whole images (equation 18); see `SamplingModel.attend`.

        Images of one size run as one batch; the list of a smaller one is filled with impossible cells.
        """
        groups: dict[torch.Size, list[int]] = {}
        for row, view in enumerate(views):
            groups.setdefault(view.shape, []).append(row)
        maps = [
            self._look(0, torch.stack([views[row] for row in rows]), torch.zeros(len(rows), 2, dtype=torch.int64))
            for rows in groups.values()
        ]
        most = max(logits.shape[1] for logits, _ in maps)
        logits = torch.cat([functional.pad(each, (0, most - each.shape[1]), value=-torch.inf) for each, _ in maps])
        centers = torch.cat([functional.pad(each, (0, 0, 0, most - each.shape[1])) for _, each in maps])
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()  # as the images came
        logits, centers = logits[order.to(logits.device), None], centers[order, None]
        return self._mask(images, Population(logits, centers, self.config.levels[0].extent_l0))

    def sample(
        self,
        images: Sequence[Image],
        population: Population,
        keys: Tensor,
        *,
        map_: Map = map,
        sampler: Sampler | None = None,
        exact: int = 0,
    ) -> Output:
        """Draw down the levels from a first population, encode the patches drawn, and classify.

        The parameters are those of `SamplingModel.sample`.
        """
        phases = self._descend(images, population, keys, map_, sampler or self._draw, exact=exact > 0)
        last = phases[-1]
        if exact:
            pooled = self._pool_all(images, last, map_, exact)
        else:
            pooled = self._pool(phases, self.encode(images, last.centers_l0, map_))
        total = torch.stack([_entropy(phases, depth) for depth in range(len(phases))]).sum(0)
        return Output(self.head(pooled), total, pooled, tuple(phases))

    def _descend(
        self,
        images: Sequence[Image],
        population: Population,
        keys: Tensor,
        map_: Map,
        sampler: Sampler,
        *,
        exact: bool,
    ) -> list[Phase]:
        """Draw from every level; where `exact`, all is taken from the last."""
        attention = z = torch.ones_like(population.log_attention[:, :, 0])  # (B, 1): the root's
        phases: list[Phase] = []
        for depth, level in enumerate(self.config.levels):
            if phases:
                attention, z = phases[-1].attention, phases[-1].z
                population = self._open(depth, images, phases[-1].centers_l0, map_)
            draws = take_all if exact and depth == len(self.config.levels) - 1 else sampler
            phases.append(draw_phase(population, attention, z, draws, level.samples, fold_in(keys, depth)))
        return phases

    def _pool(self, phases: Sequence[Phase], features: Tensor) -> Tensor:
        last = phases[-1]
        pooled = expectation(last.attention, features, last.z, self.baseline)
        if torch.is_grad_enabled():
            if self.baseline is not None:
                return follow(pooled, self.baseline)
            if self.config.baseline == "leave-one-out":
                return pooled - leave_one_out(phases, features)
        return pooled

    def _open(self, depth: int, images: Sequence[Image], centers_l0: Tensor, map_: Map) -> Population:
        """Read the regions centred on (B, n, 2) points and attend to each."""
        level, margin = self.config.levels[depth], self._network(depth).margin
        assert level.size is not None  # noqa: S101 - an invariant of ModelConfig
        boxes = boxes_at(centers_l0, level.downsample, level.size + 2 * margin)
        views = read_batch(images, level.downsample, boxes, map_)
        shape = views.shape[:2]
        logits, centers = self._look(depth, views.flatten(0, 1), boxes[..., :2].flatten(0, 1) + margin)
        cells = Population(logits.reshape(*shape, -1), centers.reshape(*shape, -1, 2), level.extent_l0)
        return self._mask(images, cells)

    def _look(self, depth: int, views: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, k) and centres (B, k, 2) of the cells of (B, C, H, W) views at (B, 2) origins, in order."""
        network, downsample = self._network(depth), self.config.levels[depth].downsample
        logits: Tensor = network(self._prepare(views).contiguous(memory_format=torch.channels_last))
        rows, columns = logits.shape[-2:]
        order = curve_order(rows, columns)
        centers = (origins.cpu()[:, None] + grid_centers(rows, columns, network.stride)) * downsample
        return logits.flatten(-2)[:, order.to(logits.device)], centers

    def _mask(self, images: Sequence[Image], population: Population) -> Population:
        """Make cells that lie wholly off their image impossible, and normalise within each view."""
        log_attention, centers, extent = population
        sizes = image_sizes(images)[:, None, None]
        inside = ((centers > -extent / 2) & (centers < sizes + extent / 2)).all(-1)
        # A cell may reach into its image by less than the pixel to which the region that opens it is rounded.
        inside |= ~inside.any(-1, keepdim=True)
        logits = log_attention.masked_fill(~inside.to(log_attention.device), -torch.inf)
        # In bf16 the probabilities of many cells would not sum to one.
        precision = torch.promote_types(logits.dtype, torch.float32)
        return Population(logits.log_softmax(-1, dtype=precision), centers, extent)

    def _draw(self, weights: Tensor, n: int, keys: Tensor) -> Draw:
        if self.config.method != "multinomial":  # the others take what there is; each unit more would cost a region
            n = min(n, weights.shape[-1])
        return draw(weights, n, method=self.config.method, keys=keys.to(weights.device))

    def _network(self, depth: int) -> AttentionNetwork:
        network = self.attention[depth]
        assert isinstance(network, AttentionNetwork)  # noqa: S101 - ModuleList has no element type
        return network


def _entropy(phases: Sequence[Phase], depth: int) -> Tensor:
    """One level's term of the chain rule: H(a) = H(A) + sum A_r H(b|r) + ..., the sum over r estimated."""
    own = entropy(phases[depth].population.log_attention)  # (B, n)
    if depth == 0:
        return own[:, 0]
    parents = phases[depth - 1]
    return (parents.z.detach() * parents.attention * own).sum(-1)
