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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.attention import AttentionNetwork
from nested_ats.encoders import ENCODERS
from nested_ats.expectation import entropy, expectation
from nested_ats.geometry import box_starts, cell_centers, curve_order
from nested_ats.images import Image, Map, find_level, read_batch, scale_pixels
from nested_ats.sampling import METHODS, Draw, Method, draw, fold_in

_FORBID = {"extra": "forbid"}  # read by pydantic where a user's file becomes a configuration


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of attention."""

    __pydantic_config__ = _FORBID

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
class ModelConfig:
    """A nested attention-sampling model."""

    __pydantic_config__ = _FORBID

    levels: tuple[LevelConfig, ...]  # coarse to fine; one level is the paper's model
    patch_size: int = 64  # side of the patches that the encoder sees, in pixels
    patch_downsample: float = 1.0  # of the patches
    encoder: str = "lenet"  # feature network: lenet or resnet
    features: int = 32  # channels of the feature network
    method: Method = "systematic"  # sampler: systematic, desraj or multinomial
    mean: float = 0.5  # subtracted from pixels in [0, 1] before any network
    std: float = 0.25  # then divided by this

    def __post_init__(self) -> None:
        """Raise ValueError where the levels do not fit one another."""
        if not self.levels:
            raise ValueError("levels: at least one is needed")
        finest = [*(level.downsample for level in self.levels), self.patch_downsample]
        if any(b > a for a, b in itertools.pairwise(finest)) or finest[-1] < 1:
            raise ValueError("levels: downsamples must go from coarse to fine, down to patch_downsample >= 1")
        for depth, level in enumerate(self.levels):
            if (level.size is None) != (depth == 0):
                raise ValueError(f"levels[{depth}].size: the first level has none, the others need one")
            if depth and (level.size or 0) * level.downsample < self.levels[depth - 1].extent_l0:
                raise ValueError(
                    f"levels[{depth}].size: regions of size * downsample = {(level.size or 0) * level.downsample:g} "
                    f"level-0 pixels do not cover the cells of {self.levels[depth - 1].extent_l0:g} above them"
                )
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder: must be one of {', '.join(ENCODERS)}, not {self.encoder!r}")
        encoder = ENCODERS[self.encoder]
        if self.patch_size < encoder.smallest_patch:
            raise ValueError(f"patch_size: {self.encoder} needs at least {encoder.smallest_patch} pixels")
        if self.features < 1 or self.features % encoder.channel_multiple:
            raise ValueError(f"features: {self.encoder} needs a positive multiple of {encoder.channel_multiple}")
        if not self.std > 0:
            raise ValueError("std: must be positive")
        if self.method not in METHODS:
            raise ValueError(f"method: must be one of {', '.join(METHODS)}, not {self.method!r}")


class Population(NamedTuple):
    """The units that a phase may draw, in the order of a space-filling curve.

    Attributes
    ----------
    log_attention
        (B, n, k): log-probability of each cell within its own view, -inf where there is no cell.
    centers_l0
        (B, n, k, 2) float64: centre of each cell in level-0 pixels, y and x.
    extent_l0
        Side of a cell in level-0 pixels.
    """

    log_attention: Tensor
    centers_l0: Tensor
    extent_l0: float


class Phase(NamedTuple):
    """What one level looked at and drew.

    Attributes
    ----------
    population
        The cells of every view of this level.
    drawn
        Indices into the (n k) cells, and z of this phase alone.
    attention
        (B, n) product of attention along the path to each drawn unit, with gradient.
    z
        (B, n) product of z along the path.
    carry
        (B, parents) stop-gradient of z a of the views that the population lies in.
    centers_l0
        (B, n, 2) float64.
    """

    population: Population
    drawn: Draw
    attention: Tensor
    z: Tensor
    carry: Tensor
    centers_l0: Tensor


class Output(NamedTuple):
    """What the model returns.

    Attributes
    ----------
    logits
        (B, Q).
    entropy
        (B,) nats: estimate of the entropy of the attention over all leaves.
    features
        (B, D): F_hat, the estimate of the expected feature.
    phases
        One for each level, coarse to fine; the last one's units are the patches.
    """

    logits: Tensor
    entropy: Tensor
    features: Tensor
    phases: tuple[Phase, ...]


Sampler = Callable[[Tensor, int, Tensor], Draw]


class NestedATS(nn.Module):
    """Nested attention sampling.

    Parameters
    ----------
    config
        Levels, budget, patches, networks and sampler.
    in_channels
        C of the images.
    classes
        Q.
    """

    def __init__(self, config: ModelConfig, *, in_channels: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.classes = classes
        self.attention = nn.ModuleList(
            AttentionNetwork(in_channels=in_channels, channels=level.channels, stride=level.stride)
            for level in config.levels
        )
        self.encoder = ENCODERS[config.encoder](in_channels=in_channels, channels=config.features)
        self.head = nn.Linear(self.encoder.features, classes)
        # A third faster on CPUs, and what tensor cores want; the overload is missing from torch's annotations.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def coarse_view(self, image: Image) -> Tensor:
        """Read the view of the whole image that the first level looks at.

        It depends on the image alone, so it may be read ahead of the step that uses it.

        Returns
        -------
        (C, H, W) as the image gives it, H and W multiples of the first stride plus two margins.

        Raises
        ------
        ValueError
            The image has no level at the first downsample.
        """
        level, network = self.config.levels[0], self._network(0)
        index = find_level(image, level.downsample)
        stride, margin = network.stride, network.margin
        side = [-(-size // stride) * stride + 2 * margin for size in image.shapes[index]]
        return image.read(index, torch.tensor([[-margin, -margin, *side]]))[0]

    def forward(
        self,
        images: Sequence[Image],
        keys: Tensor,
        *,
        views: Sequence[Tensor] | None = None,
        map_: Map = map,
        sampler: Sampler | None = None,
    ) -> Output:
        """Classify a batch of images.

        Parameters
        ----------
        images
            B of them, of any sizes.
        keys
            (B,) int64, the random key of each image: it decides what is drawn, whatever the batch.
        views
            `coarse_view` of each image, where it was read ahead.
        map_
            How reads run over the images (`nested_ats.images.read_batch`).
        sampler
            Draws from (weights, n, keys) in place of `draw`.

        Raises
        ------
        ValueError
            An image lacks a level that the model reads.
        """
        if views is None:
            views = list(map_(self.coarse_view, images))
        first = self.attend(images, views)
        return self.sample(images, first, keys, map_=map_, sampler=sampler)

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Attention over the whole images, the population of the first phase: (B, 1, K) with K of the largest.

        Images of one size run as one batch; the list of a smaller one is filled with impossible cells.
        """
        shapes = [view.shape for view in views]
        lists: dict[int, tuple[Tensor, Tensor]] = {}
        for shape in dict.fromkeys(shapes):
            rows = [i for i, other in enumerate(shapes) if other == shape]
            origins = torch.zeros(len(rows), 2, dtype=torch.int64)
            logits, centers = self._look(0, torch.stack([views[i] for i in rows]), origins)
            lists |= {i: (logits[j], centers[j]) for j, i in enumerate(rows)}
        most = max(len(logits) for logits, _ in lists.values())
        padded = [
            (
                functional.pad(logits, (0, most - len(logits)), value=-torch.inf),
                functional.pad(centers, (0, 0, 0, most - len(logits))),
            )
            for logits, centers in (lists[i] for i in range(len(views)))
        ]
        logits, centers = torch.stack([a for a, _ in padded]), torch.stack([c for _, c in padded])
        return self._mask(images, Population(logits[:, None], centers[:, None], self.config.levels[0].extent_l0))

    def sample(
        self,
        images: Sequence[Image],
        population: Population,
        keys: Tensor,
        *,
        map_: Map = map,
        sampler: Sampler | None = None,
    ) -> Output:
        """Draw down the levels from a first population, encode the patches drawn, and classify."""
        config = self.config
        sampler = sampler or self._draw
        ones = torch.ones_like(population.log_attention[:, :, 0])  # (B, 1): the root's attention and z
        phases = [_phase(population, ones, ones, sampler, config.levels[0].samples, fold_in(keys, 0))]
        for depth in range(1, len(config.levels)):
            last = phases[-1]
            population = self._open(depth, images, last.centers_l0, map_)
            samples = config.levels[depth].samples
            key = fold_in(keys, depth)
            phases.append(_phase(population, last.attention, last.z, sampler, samples, key))
        features = self.encode(images, phases[-1].centers_l0, map_)
        pooled = expectation(phases[-1].attention, features, phases[-1].z)
        total = torch.stack([_entropy(phases, depth) for depth in range(len(phases))]).sum(0)
        return Output(self.head(pooled), total, pooled, tuple(phases))

    def encode(self, images: Sequence[Image], centers_l0: Tensor, map_: Map = map) -> Tensor:
        """Features of the patches centred on points: (B, n, 2) level-0 pixels -> (B, n, D) of unit length."""
        config = self.config
        boxes = _boxes(centers_l0, config.patch_downsample, config.patch_size)
        patches = self._prepare(read_batch(images, config.patch_downsample, boxes, map_))
        features: Tensor = self.encoder(patches.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return functional.normalize(features, dim=-1).reshape(*patches.shape[:2], -1)

    def _open(self, depth: int, images: Sequence[Image], centers_l0: Tensor, map_: Map) -> Population:
        """Read the regions centred on (B, n, 2) points and attend to each."""
        level, margin = self.config.levels[depth], self._network(depth).margin
        assert level.size is not None  # noqa: S101 - an invariant of ModelConfig
        boxes = _boxes(centers_l0, level.downsample, level.size + 2 * margin)
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
        y, x = cell_centers(rows, rows * network.stride), cell_centers(columns, columns * network.stride)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)[order]
        centers = (origins.cpu()[:, None] + grid) * downsample
        return logits.flatten(-2)[:, order.to(logits.device)], centers

    def _mask(self, images: Sequence[Image], population: Population) -> Population:
        """Make cells that lie wholly off their image impossible, and normalise within each view."""
        log_attention, centers, extent = population
        sizes = torch.tensor([image.shapes[0] for image in images], dtype=torch.float64)[:, None, None]
        inside = ((centers > -extent / 2) & (centers < sizes + extent / 2)).all(-1)
        logits = log_attention.masked_fill(~inside.to(log_attention.device), -torch.inf)
        # In bf16 the probabilities of many cells would not sum to one.
        precision = torch.promote_types(logits.dtype, torch.float32)
        return Population(logits.log_softmax(-1, dtype=precision), centers, extent)

    def _prepare(self, pixels: Tensor) -> Tensor:
        weight = self.head.weight
        pixels = scale_pixels(pixels.to(weight.device)).to(weight.dtype)
        return (pixels - self.config.mean) / self.config.std

    def _draw(self, weights: Tensor, n: int, keys: Tensor) -> Draw:
        return draw(weights, n, method=self.config.method, keys=keys.to(weights.device))

    def _network(self, depth: int) -> AttentionNetwork:
        network = self.attention[depth]
        assert isinstance(network, AttentionNetwork)  # noqa: S101 - ModuleList has no element type
        return network


def _phase(
    population: Population, attention: Tensor, z: Tensor, sampler: Sampler, samples: int, keys: Tensor
) -> Phase:
    """Draw jointly from all cells of all views, whose own (B, n) path attention and z are given."""
    within = population.log_attention.exp()  # (B, n, k)
    cells = within.shape[-1]
    carry = (z * attention).detach()
    drawn = sampler((carry[..., None] * within).detach().flatten(-2), samples, keys)
    parent = drawn.indices // cells
    path = attention.gather(-1, parent) * within.flatten(-2).gather(-1, drawn.indices)
    places = drawn.indices.to(population.centers_l0.device)[..., None].expand(-1, -1, 2)
    centers = population.centers_l0.flatten(1, 2).gather(1, places)
    return Phase(population, drawn, path, z.gather(-1, parent) * drawn.z, carry, centers)


def _entropy(phases: Sequence[Phase], depth: int) -> Tensor:
    """One level's term of the chain rule: H(a) = H(A) + sum A_r H(b|r) + ..., the sum over r estimated."""
    own = entropy(phases[depth].population.log_attention)  # (B, n)
    if depth == 0:
        return own[:, 0]
    parents = phases[depth - 1]
    return (parents.z.detach() * parents.attention * own).sum(-1)


def _boxes(centers_l0: Tensor, downsample: float, size: int) -> Tensor:
    starts = box_starts(centers_l0, downsample, size)
    return torch.cat([starts, torch.full_like(starts, size)], -1)
