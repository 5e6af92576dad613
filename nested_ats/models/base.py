"""What every model has in common: its configuration, its encoder and head, and what it returns.

`ImageModel` encodes patches and is the interface that training and evaluation see; `SamplingModel` is one whose
answer depends on what is drawn.

Shape letters: B batch, n drawn units, k cells of one map, K units in all, P patches, C channels, H W pixels,
D features, Q classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.errors import EncoderError
from nested_ats.feature_store import EncoderName, FeatureStore
from nested_ats.geometry import box_starts, cell_centers, curve_order
from nested_ats.images import Image, Map, find_level, read_batch, scale_pixels
from nested_ats.networks.encoders import build_encoder, check_encoder, read_choice
from nested_ats.networks.trainable import Trainable, check_trainable, freeze
from nested_ats.sampling import Draw

_LEAST_SPREAD = 0.01  # of a feature that is standardised, of the mean of all
_READS = 8  # parts in which one image's patches are read, so that `map_` can read them at the same time
# Keys that decide nothing of what a frozen encoder makes of a patch.
_AFTER_FEATURES = ("trainable", "scale", "standardise", "location", "allow_gaps")

Sampler = Callable[[Tensor, int, Tensor], Draw]
Rows = TypeVar("Rows")


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
    std: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where a value is out of range."""
        object.__setattr__(self, "encoder", read_choice(self.encoder).plain)
        self._check_encoder(None)
        check_trainable(self.trainable)
        std = 1.0 if self.std is None else self.std
        stds = std if isinstance(std, tuple) else (std,)
        if not stds or not min(stds) > 0:
            raise ValueError("std: must be positive")

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

    def _check_encoder(self, patch_size: int | None) -> None:
        assert patch_size is None  # noqa: S101 - the size is the configuration's own
        super()._check_encoder(self.patch_size)
        if self.patch_downsample < 1:
            raise ValueError("patch_downsample: must be at least 1")
        if not self.scale > 0:
            raise ValueError("scale: must be positive")

    def _check_cover(self, field: str, cell_l0: float) -> None:
        """Raise ValueError where a patch is smaller than the cell that it stands for, and that is not meant."""
        side = self.patch_size * self.patch_downsample
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
    cells
        (B, n, k, g, g): logits of the attention map within each unit, g x g cells in their place; a unit that is
        drawn hands them on to the next level. None where there is no next level.
    threshold
        (B,): above which something is in a pixel (`nested_ats.models.prior`). None where any cell is possible.
    """

    log_attention: Tensor
    centers_l0: Tensor
    extent_l0: float
    cells: Tensor | None = None
    threshold: Tensor | None = None


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
    """What a model returns.

    Attributes
    ----------
    logits
        (B, Q).
    entropy
        (B,) nats: estimate of the entropy of the attention over all leaves; zero where there is no attention.
    features
        (B, D): F_hat, the estimate of the expected feature; what the head sees.
    phases
        One for each level, coarse to fine; the last one's units are the patches. Empty where there is no attention.
    """

    logits: Tensor
    entropy: Tensor
    features: Tensor
    phases: tuple[Phase, ...]


class ImageModel(nn.Module):
    """A classifier of images through an encoder and a linear head.

    Parameters
    ----------
    config
        Of the model; its own, which a saved model keeps, has in it what was left open.
    in_channels
        C of the images.
    classes
        Q.
    patch_size
        H = W of the patches that the encoder sees; none for whole images.
    location
        Whether features are told where their patch lies: its centre's y and x, -1 to 1 over the image, are appended
        to the encoder's feature vector, and a linear layer maps the D + 2 numbers to D (section 3.3).
    pretrained
        Read the weights that ``encoder`` names.
    attention
        Networks that come before the encoder in the order of parameters, which optimizer states go by.

    Frozen parts of the encoder (``trainable``) stay in evaluation mode and their parameters have
    ``requires_grad = False``; give an optimizer those that have it.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        in_channels: int,
        classes: int,
        patch_size: int | None,
        location: bool = False,
        pretrained: bool = True,
        attention: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self._mean: Tensor
        self._std: Tensor
        if attention is not None:
            self.attention = attention
        self.in_channels = in_channels
        self.classes = classes
        built = build_encoder(
            config.encoder,
            in_channels=in_channels,
            channels=config.features,
            patch_size=patch_size,
            pretrained=pretrained,
        )
        self.encoder, self.features = built.module, built.features
        self.config = config = replace(
            config,
            encoder=built.encoder,
            mean=(built.mean or 0.5) if config.mean is None else config.mean,
            std=(built.std or 0.25) if config.std is None else config.std,
        )
        self._frozen = freeze(self.encoder, config.trainable)
        self.locate = nn.Linear(self.features + 2, self.features) if location else None
        self.head = _Head(self.features, classes, config.scale if isinstance(config, PatchConfig) else 1.0)
        for name in ("mean", "std"):  # (C, 1, 1) each; not of the state: the configuration has them
            values = getattr(config, name)
            if isinstance(values, tuple) and len(values) != in_channels:
                raise EncoderError(f"{name}: {len(values)} values for images of {in_channels} channels")
            each = torch.tensor([float(v) for v in (values if isinstance(values, tuple) else [values] * in_channels)])
            self.register_buffer(f"_{name}", each[:, None, None], persistent=False)
        self.train()
        # A third faster on CPUs, and what tensor cores want; the overload is missing from torch's annotations.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def coarse_view(self, image: Image) -> Tensor:
        """Read what the model looks at first, (C, H, W) as the image gives it; (C, 0, 0) where that is nothing.

        It depends on the image alone, so it may be read ahead of the step that uses it.

        Raises
        ------
        ValueError
            The image has no level at the downsample.
        """
        del image
        return torch.empty(self.in_channels, 0, 0)

    def forward(
        self, images: Sequence[Image], keys: Tensor, *, views: Sequence[Tensor] | None = None, map_: Map = map
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

        Raises
        ------
        ValueError
            An image lacks a level that the model reads.
        ImpossibleWeightsError
            The attention is not finite: the model has diverged.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> ImageModel:
        """Set the mode of all but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def _scale(self, pixels: Tensor) -> Tensor:
        """Pixels as an image gives them -> in [0, 1], on the model's device and of its type."""
        weight = self.head.weight
        return scale_pixels(_to_device(pixels, weight.device)).to(weight.dtype)

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self._mean) / self._std

    def _see(self, pixels: Tensor) -> Tensor:
        """(P, C, H, W) as an image gives them -> the same as the encoder sees them."""
        return self._normalise(self._scale(pixels)).contiguous(memory_format=torch.channels_last)

    def _encode_seen(self, seen: Tensor) -> Tensor:
        """(P, C, H, W) as the encoder sees them -> (P, D), before normalisation."""
        frozen = self.config.trainable == "none"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features: Tensor = self.encoder(seen)
        return features.to(seen.dtype) if frozen else features  # whether they are kept in between or not


class _Head(nn.Linear):
    """A linear layer of `scale` times its input, in the precision of its weights, autocast or not.

    Features have unit length, of which a new layer makes logits so small that the gradient of the attention drowns in
    that of the entropy; scaled, a model learns in half the epochs.

    Standard errors are differences between logits of nearly equal features, which bf16 would drown in its rounding.
    """

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__(features, classes)
        self.scale = scale

    def forward(self, pooled: Tensor) -> Tensor:
        """(..., D) -> (..., Q)."""
        with torch.autocast(pooled.device.type, enabled=False):
            return super().forward(pooled.to(self.weight.dtype) * self.scale)


class PatchModel(ImageModel):
    """An `ImageModel` whose encoder sees patches; the parameters are those of `ImageModel`.

    Attributes
    ----------
    store
        Where features are kept of a frozen encoder (``trainable: none``), of images that tell an ``identity``: a
        patch found there is neither read nor encoded. Results change by rounding alone. None: nowhere.
    observe
        Told the `spread` (P,) of all patches that are encoded or found; twice of one that comes twice. None: nobody.
    """

    config: PatchConfig

    def __init__(
        self,
        config: PatchConfig,
        *,
        in_channels: int,
        classes: int,
        pretrained: bool = True,
        attention: nn.ModuleList | None = None,
    ) -> None:
        super().__init__(
            config,
            in_channels=in_channels,
            classes=classes,
            patch_size=config.patch_size,
            location=config.location,
            pretrained=pretrained,
            attention=attention,
        )
        self.store: FeatureStore | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self._moments: Tensor | None = None
        self._feature_mean: Tensor
        self._feature_std: Tensor
        for name, value in (("_feature_mean", 0.0), ("_feature_std", 1.0)) if config.standardise else ():
            self.register_buffer(name, torch.full((self.features,), value))
        before = {f.name: getattr(self.config, f.name) for f in fields(PatchConfig) if f.name not in _AFTER_FEATURES}
        before["encoder"] = read_choice(self.config.encoder)._replace(weights=None).plain  # their bits count, no path
        self._encoder_name = EncoderName({**before, "in_channels": in_channels})

    def encode(self, images: Sequence[Image], centers_l0: Tensor, map_: Map = map) -> Tensor:
        """Features of the patches centred on points: (B, n, 2) level-0 pixels -> (B, n, D) of unit length."""
        boxes = self._patch_boxes(centers_l0)
        location = centers_l0 / image_sizes(images)[:, None] * 2 - 1
        if self._keeps:
            features = self._recall(images, boxes, map_)
            return self._point(features, location)
        patches = read_batch(images, self.config.patch_downsample, boxes, map_)
        return self._embed(patches.flatten(0, 1), location.flatten(0, 1)).reshape(*boxes.shape[:2], -1)

    def encode_one(self, image: Image, centers_l0: Tensor, map_: Map = map) -> Tensor:
        """Features of patches of one image, read in parts by `map_`: (P, 2) level-0 pixels -> (P, D)."""
        if self._keeps:
            location = centers_l0 / image_sizes([image]) * 2 - 1
            return self._point(self._recall([image], self._patch_boxes(centers_l0)[None], map_)[0], location)
        return self._embed(*self._read(image, centers_l0, map_))

    def _read(self, image: Image, centers_l0: Tensor, map_: Map) -> tuple[Tensor, Tensor]:
        """Pixels (P, C, H, W) of patches of one image, and their (P, 2) places in [-1, 1]."""
        [pixels] = self._read_parts([image], [self._patch_boxes(centers_l0)], map_)
        return pixels, centers_l0 / image_sizes([image]) * 2 - 1

    def _read_parts(self, images: Sequence[Image], boxes: Sequence[Tensor], map_: Map) -> list[Tensor]:
        """Pixels (P, C, H, W) of (P, 4) boxes of each image, P > 0 of any number, read in parts by `map_`."""
        parts = [torch.split(each, -(-len(each) * len(images) // _READS)) for each in boxes]
        tasks = [(image, part) for image, own in zip(images, parts, strict=True) for part in own]
        levels = {id(image): find_level(image, self.config.patch_downsample) for image in images}
        read = iter(map_(lambda image, part: image.read(levels[id(image)], part), *zip(*tasks, strict=True)))
        return [torch.cat([next(read) for _ in own]) for own in parts]

    def _patch_boxes(self, centers_l0: Tensor) -> Tensor:
        return boxes_at(centers_l0, self.config.patch_downsample, self.config.patch_size)

    def _embed(self, pixels: Tensor, location: Tensor) -> Tensor:
        """Patches (P, C, H, W) and their (P, 2) places in [-1, 1] -> (P, D) of unit length (section 3.2.1)."""
        seen = self._see(pixels)
        if self.observe is not None:
            self.observe(spread(seen))
        return self._point(self._encode_seen(seen), location)

    def _point(self, features: Tensor, location: Tensor) -> Tensor:
        """Features (..., D) as encoded and the (..., 2) places of their patches -> (..., D) of unit length."""
        if self._moments is not None:
            rows = features.detach().flatten(0, -2).to(self._moments.dtype)
            self._moments += torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
        if self.config.standardise:
            features = (features - self._feature_mean) / self._feature_std
        if self.locate is not None:
            features = self.locate(torch.cat([features, location.to(features)], -1))
        return functional.normalize(features, dim=-1)

    @contextmanager
    def gather_moments(self) -> Iterator[Tensor]:
        """Add up the features of all patches that are encoded within the block, for `standardise_by`.

        Yields
        ------
        (3, D) float64, filled as patches are encoded: their number, the sum of features and that of squares.
        """
        self._moments = torch.zeros(3, self.features, dtype=torch.float64, device=self.head.weight.device)
        try:
            yield self._moments
        finally:
            self._moments = None

    def standardise_by(self, moments: Tensor) -> None:
        """Bring every feature to mean 0 and spread 1 from now on, by (3, D) moments (`standardise` is set).

        Features of a pretrained network have a common mean, beside which they hardly differ once they have unit
        length, and a few of them have most of the spread; a model would learn slowly, and from those few.
        """
        mean, square = moments[1:] / moments[0].clamp_min(1)
        spreads = (square - mean.square()).clamp_min(0).sqrt()
        # One that was never anything else says nothing yet; it must not drown the others once it does.
        spreads = spreads.clamp_min(_LEAST_SPREAD * spreads.mean())
        self._feature_mean.copy_(mean)
        self._feature_std.copy_(torch.where(spreads > 0, spreads, 1.0))

    @property
    def _keeps(self) -> bool:
        return self.store is not None and self.config.trainable == "none" and self.head.weight.dtype == torch.float32

    def _recall(self, images: Sequence[Image], boxes: Tensor, map_: Map) -> Tensor:
        """Features (B, n, D) as encoded of (B, n, 4) boxes: out of the store, or put there.

        A row of the store, and of a table here, holds the D numbers and the `spread` of a patch.
        """
        store, device, width = self.store, self.head.weight.device, self.features + 1
        assert store is not None  # noqa: S101 - seen by the caller
        names = self._names(images)
        each = [rows.unique(dim=0, return_inverse=True) for rows in boxes.cpu()]
        wanted = [own for own, _ in each]

        def look(name: str | None, own: Tensor) -> tuple[Tensor, Tensor]:
            if name is None:
                return torch.empty(len(own), width), torch.zeros(len(own), dtype=torch.bool)
            return store.get(name, own[:, :2], width)

        looked = list(map_(look, names, wanted))
        tables = [rows.to(device, copy=True) for rows, _ in looked]
        missing = {row: wanted[row][~found] for row, (_, found) in enumerate(looked) if not found.all()}
        if missing:
            encoded = self._encode_boxes([images[row] for row in missing], list(missing.values()), map_)
            fresh = dict(zip(missing, encoded, strict=True))
            for row, rows in fresh.items():
                tables[row][~looked[row][1].to(device)] = rows
            puts = [(names[row], missing[row][:, :2], fresh[row].cpu()) for row in fresh if names[row] is not None]
            if puts:
                list(map_(store.put, *zip(*puts, strict=True)))
        drawn = torch.stack([table[places.to(device)] for table, (_, places) in zip(tables, each, strict=True)])
        if self.observe is not None:
            self.observe(drawn[..., -1].flatten())
        return drawn[..., :-1]

    def _names(self, images: Sequence[Image]) -> list[str | None]:
        """Under what the store has the patches of each image; None where it cannot have them."""
        encoder = self._encoder_name(self.encoder, self.head.weight.device)
        identities = [getattr(image, "identity", None) for image in images]
        return [f"{encoder}/{identity}" if encoder and identity else None for identity in identities]

    def _encode_boxes(self, images: Sequence[Image], boxes: Sequence[Tensor], map_: Map) -> list[Tensor]:
        """Rows (P, D + 1) of the patches in (P, 4) boxes of each image, all encoded at once."""
        seen = self._see(torch.cat(self._read_parts(images, boxes, map_)))
        rows = torch.cat([self._encode_seen(seen), spread(seen)[:, None]], -1)
        return list(torch.split(rows, [len(own) for own in boxes]))


class SamplingModel(PatchModel):
    """A `PatchModel` that draws the patches it sees, from an attention that does not depend on the draw."""

    def forward(
        self,
        images: Sequence[Image],
        keys: Tensor,
        *,
        views: Sequence[Tensor] | None = None,
        map_: Map = map,
        sampler: Sampler | None = None,
        more: int = 1,
    ) -> Output:
        """Classify a batch of images; see `ImageModel.forward`, and `sample` for `sampler` and `more`."""
        if views is None:
            views = list(map_(self.coarse_view, images))
        first = self.attend(images, views)
        return self.sample(images, first, keys, map_=map_, sampler=sampler, more=more)

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Attention over the whole images, the population of the first phase: (B, 1, K) with K of the largest."""
        raise NotImplementedError

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
        """Draw from a first population, encode the patches drawn, and classify.

        Parameters
        ----------
        images, keys, map_
            As of `forward`.
        population
            From `attend`.
        sampler
            Draws from (weights, n, keys) in place of the configured sampler.
        exact
            Patches to encode at once, where the last level is not to be drawn from but summed over: F_hat is then
            the sum over **all** leaves of the opened regions, exact where there is one level. 0 to draw.
        more
            Factor on the samples of every level.
        """
        raise NotImplementedError

    def _pool_all(self, images: Sequence[Image], phase: Phase, map_: Map, chunk: int) -> Tensor:
        """Sum of z a f over the units of a phase, (B, D), `chunk` patches of one image in memory at a time."""
        pooled = []
        for row, image in enumerate(images):
            weights = (phase.z * phase.attention)[row].detach()
            held = weights.nonzero().flatten()
            total = weights.new_zeros(self.features)
            for units in torch.split(held, chunk):
                features = self.encode_one(image, phase.centers_l0[row, units.to(phase.centers_l0.device)], map_)
                # Not a matrix product: autocast would make it one of bf16.
                total = total + (weights[units, None] * features).sum(0)
            pooled.append(total)
        return torch.stack(pooled)


def image_cells(images: Sequence[Image], extent_l0: float) -> tuple[Tensor, Tensor]:
    """Cells of `extent_l0` level-0 pixels that tile each image, along the curve.

    Returns
    -------
    centers_l0, there
        (B, K, 2) float64 with K of the largest image, and (B, K): whether an image has this cell.
    """
    lists = []
    for image in images:
        rows, columns = (math.ceil(side / extent_l0) for side in image.shapes[0])
        lists.append(grid_centers(rows, columns, extent_l0))
    most = max(map(len, lists))
    centers = torch.stack([functional.pad(each, (0, 0, 0, most - len(each))) for each in lists])
    return centers, torch.arange(most) < torch.tensor([len(each) for each in lists])[:, None]


def grid_centers(rows: int, columns: int, side: float) -> Tensor:
    """Centres (rows columns, 2) of the cells of a map, of `side` pixels each, along the curve."""
    y, x = cell_centers(rows, rows * side), cell_centers(columns, columns * side)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)[curve_order(rows, columns)]


def boxes_at(centers_l0: Tensor, downsample: float, size: int) -> Tensor:
    """Boxes (..., 4) of `size` pixels of a level, centred on (..., 2) points of the finest."""
    starts = box_starts(centers_l0, downsample, size)
    return torch.cat([starts, torch.full_like(starts, size)], -1)


def draw_phase(
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


def take_all(weights: Tensor, n: int, keys: Tensor) -> Draw:
    """Take every unit of positive weight with z = 1: the sampler of exact evaluation."""
    del n, keys
    indices = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
    return Draw(indices, (weights > 0).to(weights.dtype))


def take_rows(value: Rows, rows: Tensor) -> Rows:
    """The given images of a batch, from an `Output`, a `Population` or anything made of (B, ...) tensors."""
    taken: Any = value
    if isinstance(value, Tensor):
        taken = value[rows.to(value.device)]
    elif isinstance(value, tuple):
        parts = [take_rows(part, rows) for part in value]
        taken = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return taken  # type: ignore[no-any-return]


def spread(seen: Tensor) -> Tensor:
    """How much patches vary: the largest variance of a channel, (P, C, H, W) as the encoder sees them -> (P,)."""
    seen = seen.detach().float()
    # Two means of what is at most a few units large: a tenth of the time of `var`, and exact enough for a threshold.
    variance: Tensor = seen.square().mean((-2, -1)) - seen.mean((-2, -1)).square()
    return variance.amax(-1)


def _to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """Pixels on a device; to a GPU through pinned memory, so that the copy runs beside what the CPU does next.

    The pinned block may be let go of at once: torch's allocator of them waits for the copy before it is used again.
    """
    if device.type == "cuda" and pixels.device.type == "cpu":
        return pixels.pin_memory().to(device, non_blocking=True)
    return pixels.to(device)


def image_sizes(images: Sequence[Image]) -> Tensor:
    """Height and width of each image in level-0 pixels, (B, 2) float64."""
    return torch.tensor([image.shapes[0] for image in images], dtype=torch.float64)
