"""Models that see patches, and those whose answer depends on which patches are drawn.

Shape letters: B batch, n drawn units, K units in all, P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.cells import boxes_at, image_cells, image_sizes
from nested_ats.config import PatchConfig
from nested_ats.feature_store import EncoderName, FeatureStore, recall
from nested_ats.images import Image, batch_reads, find_level
from nested_ats.mask import worth_seeing
from nested_ats.models.base import ImageModel
from nested_ats.networks.encoders import read_choice
from nested_ats.patch_augment import AS_THEY_ARE, PatchAugment
from nested_ats.phases import Leaves, Output, Phase, Population, Sampler
from nested_ats.reading import Reading, run
from nested_ats.targets import Target

_LEAST_SPREAD = 0.01  # least spread that a feature is divided by, as a part of the mean spread
_READS = 8  # parts in which one image's patches are read, so that several threads can read them
# These keys do not change the features of a frozen encoder.
_AFTER_FEATURES = (
    "trainable",
    "scale",
    "standardise",
    "location",
    "allow_gaps",
    "mpp",
    "prior",
    "min_tissue",
    "nodata",
)


class PatchModel(ImageModel):
    """An `ImageModel` whose encoder sees patches; the parameters are those of `ImageModel`.

    Attributes
    ----------
    store
        Keeps the features of a frozen encoder (``trainable: none``) for images that have an ``identity``: a patch
        found there is neither read nor encoded. Results change by rounding alone. None keeps nothing.
    observe
        Is called with the `spread` (P,) of all patches that are encoded or found, repeated ones included; or None.
    """

    config: PatchConfig

    def __init__(
        self,
        config: PatchConfig,
        *,
        in_channels: int,
        classes: int | Target,
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
        before["encoder"] = read_choice(self.config.encoder)._replace(weights=None).plain  # not the path
        self._encoder_name = EncoderName({**before, "in_channels": in_channels})

    def encode(self, images: Sequence[Image], centers_l0: Tensor) -> Tensor:
        """Features of the patches centred on points: (B, n, 2) level-0 pixels -> (B, n, D) of unit length."""
        return run(self.encoding(images, centers_l0))

    def encoding(self, images: Sequence[Image], centers_l0: Tensor) -> Reading[Tensor]:
        """`encode` as a generator that yields its reads."""
        if self._keeps:
            features = yield from self._recall(images, self.patch_boxes(centers_l0))
            return self._finish_features(features, _location(images, centers_l0))
        patches = yield from self._read_drawn(images, centers_l0, self.config.patch_size)
        location = _location(images, centers_l0).flatten(0, 1)
        return self._embed(patches, location).reshape(*centers_l0.shape[:2], -1)

    def encoding_of_many(self, image: Image, centers_l0: Tensor) -> Reading[Tensor]:
        """Features of many patches of one image, read in parts: (P, 2) level-0 pixels -> (P, D) of unit length."""
        if self._keeps:
            [features] = yield from self._recall([image], self.patch_boxes(centers_l0)[None])
            return self._finish_features(features, centers_l0 / image_sizes([image]) * 2 - 1)
        return self._embed(*(yield from self._read(image, centers_l0)))

    def patch_centers(self, image: Image) -> Tensor:
        """All points of an image that patches may be centred on: (P, 2) float64, y and x in level-0 pixels."""
        centers, possible = self._grid([image])
        return centers[possible]

    def extracting(self, image: Image, centers_l0: Tensor) -> Reading[tuple[Tensor, Tensor]]:
        """Encode patches of one image, or find them in the store, as a generator that yields its reads.

        Parameters
        ----------
        image
            An image of any size.
        centers_l0
            (P, 2) float64: the centres of patches in level-0 pixels.

        Returns
        -------
        boxes, features
            (P, 4) int64: first y and x, height and width of each patch in pixels of its level; and (P, D) as the
            encoder gives them, before all that a training decides.
        """
        boxes = self.patch_boxes(centers_l0)
        if self._keeps:
            [features] = yield from self._recall([image], boxes[None])
        else:
            [rows] = yield from self._encode_boxes([image], [boxes])
            features = rows[:, :-1]
        return boxes, features

    def patch_boxes(self, centers_l0: Tensor) -> Tensor:
        """Boxes (..., 4) of the patches around (..., 2) points, in pixels of the patches' level."""
        return boxes_at(centers_l0, self.config.patch_downsample, self.config.patch_size)

    def remember(self, image: Image, boxes: Tensor, features: Tensor) -> None:
        """Put features that others have encoded into the store; how much the pixels vary is then not known.

        Parameters
        ----------
        image
            An image that `can_keep` says yes to.
        boxes
            (P, 4) int64, distinct patches as `extracting` gives them.
        features
            (P, D) float32 as the encoder gives them.
        """
        [name] = self._store_names([image])
        assert self.store is not None  # noqa: S101 - the caller has asked
        assert name is not None  # noqa: S101 - likewise
        rows = torch.cat([features, torch.full_like(features[:, :1], torch.nan)], -1)
        self.store.put(name, boxes[:, :2].contiguous(), rows)

    @property
    def encoder_digest(self) -> str | None:
        """Names all that decides features besides the pixels (`EncoderName`); None where that is not known."""
        return self._encoder_name(self.encoder, self.head.weight.device)

    def can_keep(self, image: Image) -> bool:
        """Whether the store takes features of an image: both the image and the encoder have a name there."""
        return self._keeps and self._store_names([image]) != [None]

    def _read_drawn(self, images: Sequence[Image], centers_l0: Tensor, side: int) -> Reading[Tensor]:
        """Pixels (B n, C, side, side) around (B, n, 2) points, as many of each image."""
        boxes = boxes_at(centers_l0, self.config.patch_downsample, side)
        return torch.cat((yield batch_reads(images, self.config.patch_downsample, boxes)))

    def _read(self, image: Image, centers_l0: Tensor) -> Reading[tuple[Tensor, Tensor]]:
        """Pixels (P, C, H, W) of patches of one image, and their (P, 2) places in [-1, 1]."""
        [pixels] = yield from self._read_parts([image], [self.patch_boxes(centers_l0)])
        return pixels, centers_l0 / image_sizes([image]) * 2 - 1

    def _read_parts(self, images: Sequence[Image], boxes: Sequence[Tensor]) -> Reading[list[Tensor]]:
        """Pixels (P, C, H, W) of (P, 4) boxes of each image, read in parts; P > 0 may differ between images."""
        levels = [find_level(image, self.config.patch_downsample) for image in images]
        parts = [torch.split(each, -(-len(each) * len(images) // _READS)) for each in boxes]
        wanted = zip(images, levels, parts, strict=True)
        pixels = iter((yield [partial(image.read, level, part) for image, level, own in wanted for part in own]))
        return [torch.cat([next(pixels) for _ in own]) for own in parts]

    def worth_drawing(self, images: Sequence[Image], centers_l0: Tensor, extent_l0: float) -> Tensor:
        """Whether cells have, around some point of theirs, a patch with enough of the image's mask in it.

        A cell of no more than one patch has its own patch; a larger one, all those that may be drawn inside it.

        Parameters
        ----------
        images
            B of them; each has a ``mask`` unless the configuration's ``prior`` is none.
        centers_l0
            (B, ..., 2) float64: centres of cells in level-0 pixels.
        extent_l0
            Side of a cell in level-0 pixels.

        Returns
        -------
        (B, ...) bool
        """
        if self.config.prior == "none":
            return torch.ones(centers_l0.shape[:-1], dtype=torch.bool)
        patch = self.config.patch_size * self.config.patch_downsample
        reach = (extent_l0 - self.config.cell_l0 + patch) / 2
        return worth_seeing(images, centers_l0, reach, self.config.min_tissue * patch**2)

    def _grid(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Cells of `image_cells`, and on which of them patches are centred: all, of an image with nothing to see."""
        centers, there = image_cells(images, self.config.cell_l0)
        possible = there & self.worth_drawing(images, centers, self.config.cell_l0)
        return centers, torch.where(possible.any(-1, keepdim=True), possible, there)

    def _embed(self, pixels: Tensor, location: Tensor) -> Tensor:
        """Patches (P, C, H, W) and their (P, 2) places in [-1, 1] -> (P, D) of unit length (section 3.2.1)."""
        return self._embed_seen(self._prepare(pixels), location)

    def _embed_seen(self, seen: Tensor, location: Tensor) -> Tensor:
        """`_embed` of patches as the encoder sees them."""
        if self.observe is not None:
            self.observe(spread(seen))
        return self._finish_features(self._encode_seen(seen), location)

    def _finish_features(self, features: Tensor, location: Tensor) -> Tensor:
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

        Features of a pretrained network have a common mean, so that they hardly differ once they have unit length,
        and a few of them have most of the spread; a model would learn slowly, and from those few.
        """
        mean, square = moments[1:] / moments[0].clamp_min(1)
        spreads = (square - mean.square()).clamp_min(0).sqrt()
        # A feature that was constant so far must not outweigh the others once it varies.
        spreads = spreads.clamp_min(_LEAST_SPREAD * spreads.mean())
        self._feature_mean.copy_(mean)
        self._feature_std.copy_(torch.where(spreads > 0, spreads, 1.0))

    @property
    def _keeps(self) -> bool:
        return self.store is not None and self.config.trainable == "none" and self.head.weight.dtype == torch.float32

    def _recall(self, images: Sequence[Image], boxes: Tensor) -> Reading[Tensor]:
        """Look up the features (B, n, D) of (B, n, 4) boxes in the store; encode and store the missing ones.

        A row of the store, and of a table here, holds the D numbers and the `spread` of a patch.
        """
        assert self.store is not None  # noqa: S101 - the caller has checked it

        def encode(rows: list[int], missing: list[Tensor]) -> Reading[list[Tensor]]:
            return self._encode_boxes([images[row] for row in rows], missing)

        names, width, device = self._store_names(images), self.features + 1, self.head.weight.device
        drawn = yield from recall(self.store, names, boxes, width, device, encode)
        if self.observe is not None:
            self.observe(drawn[..., -1].flatten())
        return drawn[..., :-1]

    def _store_names(self, images: Sequence[Image]) -> list[str | None]:
        """The name of each image's patches in the store; None where they cannot be kept."""
        encoder = self.encoder_digest
        identities = [getattr(image, "identity", None) for image in images]
        return [f"{encoder}/{identity}" if encoder and identity else None for identity in identities]

    def _encode_boxes(self, images: Sequence[Image], boxes: Sequence[Tensor]) -> Reading[list[Tensor]]:
        """Rows (P, D + 1) of the patches in (P, 4) boxes of each image, all encoded at once."""
        seen = self._prepare(torch.cat((yield from self._read_parts(images, boxes))))
        rows = torch.cat([self._encode_seen(seen), spread(seen)[:, None]], -1)
        return list(torch.split(rows, [len(own) for own in boxes]))


def _location(images: Sequence[Image], centers_l0: Tensor) -> Tensor:
    """Places of (B, n, 2) points in their images, in [-1, 1]."""
    return centers_l0 / image_sizes(images)[:, None] * 2 - 1


class SamplingModel(PatchModel):
    """A `PatchModel` that draws the patches it sees, from an attention that does not depend on the draw."""

    def forward(
        self,
        images: Sequence[Image],
        keys: Tensor,
        *,
        views: Sequence[Tensor] | None = None,
        readers: Executor | None = None,
        sampler: Sampler | None = None,
        more: int = 1,
        augment: PatchAugment = AS_THEY_ARE,
    ) -> Output:
        """Classify a batch of images; see `ImageModel.forward`, and `sample` for the other parameters."""
        return run(self.classify(images, keys, views=views, sampler=sampler, more=more, augment=augment), readers)

    def classify(
        self,
        images: Sequence[Image],
        keys: Tensor,
        *,
        views: Sequence[Tensor] | None = None,
        sampler: Sampler | None = None,
        more: int = 1,
        augment: PatchAugment = AS_THEY_ARE,
    ) -> Reading[Output]:
        """`forward` as a generator that yields its reads; see `ImageModel.classify`."""
        if views is None:
            views = yield from self.coarse_views(images)
        population = self.attend(images, views)
        return (yield from self.sample(images, population, keys, sampler=sampler, more=more, augment=augment))

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Attention over the whole images, the population of the first phase: (B, 1, K) with K of the largest."""
        raise NotImplementedError

    def leaves(self, image: Image, *, readers: Executor | None = None) -> Iterator[Leaves]:
        """All leaves of an image with their attention, a few regions at a time: those of every level are opened."""
        raise NotImplementedError

    def sample(
        self,
        images: Sequence[Image],
        population: Population,
        keys: Tensor,
        *,
        sampler: Sampler | None = None,
        exact: int = 0,
        more: int = 1,
        augment: PatchAugment = AS_THEY_ARE,
    ) -> Reading[Output]:
        """Draw from a first population, encode the patches drawn, and classify.

        Parameters
        ----------
        images, keys
            See `forward`.
        population
            The result of `attend`.
        sampler
            Draws, given (weights, n, keys), in place of the configured sampler.
        exact
            0 to draw from the last level. Otherwise F_hat is the sum over **all** leaves of the opened regions, which
            is exact where there is one level, and this many patches are encoded at once.
        more
            Multiplies the samples of every level.
        augment
            How each drawn patch is changed at random.
        """
        raise NotImplementedError

    def _encode_drawn(
        self, images: Sequence[Image], centers_l0: Tensor, augment: PatchAugment, keys: Tensor
    ) -> Reading[Tensor]:
        """`encoding` of drawn patches, each changed at random."""
        side = self.config.patch_size
        centers_l0 = augment.move(centers_l0, side * self.config.patch_downsample, keys)
        if not augment.warp:
            return (yield from self.encoding(images, centers_l0))
        patches = yield from self._read_drawn(images, centers_l0, augment.side(side))
        warped = augment.warped(self._prepare(patches), side, keys)
        location = _location(images, centers_l0).flatten(0, 1)
        return self._embed_seen(warped, location).reshape(*centers_l0.shape[:2], -1)

    def _pool_all(self, images: Sequence[Image], phase: Phase, chunk: int) -> Reading[Tensor]:
        """Sum of z a f over the units of a phase, (B, D), `chunk` patches of one image in memory at a time."""
        pooled = []
        for row, image in enumerate(images):
            weights = (phase.z * phase.attention)[row].detach()
            held = weights.nonzero().flatten()
            total = weights.new_zeros(self.features)
            for units in torch.split(held, chunk):
                places = phase.centers_l0[row, units.to(phase.centers_l0.device)]
                features = yield from self.encoding_of_many(image, places)
                # Not a matrix product: autocast would make it one of bf16.
                total = total + (weights[units, None] * features).sum(0)
            pooled.append(total)
        return torch.stack(pooled)


def spread(seen: Tensor) -> Tensor:
    """How much patches vary: the largest variance of a channel, (P, C, H, W) as the encoder sees them -> (P,)."""
    seen = seen.detach().float()
    # Values are at most a few units, so two means are exact enough for a threshold, in a tenth of the time of `var`.
    variance: Tensor = seen.square().mean((-2, -1)) - seen.mean((-2, -1)).square()
    return variance.amax(-1)
