"""Nested attention sampling at any depth; one level is the model of Katharopoulos and Fleuret (2019).

The whole image is seen once, at the coarsest downsample. Attention there draws regions; each is read at the next
finer downsample and its attention forms, with that of the other drawn regions, **one** list of leaves from which
the next draw is made jointly: patches go where the attention is, not a fixed share to each region. The last draw
gives the patches that the encoder sees. Reads are bounded by the budget whatever the size of the image.

Shape letters: B batch, n drawn units, k cells of one map, K = n k units of a population, C channels, D features,
Q classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.cells import boxes_at, cell_centers, curve_order, grid_centers, image_sizes
from nested_ats.config import ModelConfig
from nested_ats.estimators import entropy, expectation
from nested_ats.images import Image, batch_reads, find_level
from nested_ats.models.patches import SamplingModel
from nested_ats.models.residual import group_logits, inherited
from nested_ats.networks.attention import AttentionNetwork
from nested_ats.patch_augment import AS_THEY_ARE, PatchAugment
from nested_ats.phases import Leaves, Output, Phase, Population, Sampler, draw_phase, leaves_of, take_all
from nested_ats.reading import Reading, run
from nested_ats.sampling import Draw, draw, fold_in
from nested_ats.targets import Target

_OPEN_REGIONS = 32  # of one level at a time, where every region is opened


class NestedATS(SamplingModel):
    """Nested attention sampling: equations 18 to 20 of the paper at every level, with one head at the end.

    Parameters
    ----------
    config
        Levels, budget, patches, networks and sampler.
    in_channels
        C of the images.
    classes
        Q, the number of classes; or what else the model answers.
    pretrained
        Read the weights that ``encoder`` names.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    config: ModelConfig
    attention: nn.ModuleList

    def __init__(
        self, config: ModelConfig, *, in_channels: int, classes: int | Target, pretrained: bool = True
    ) -> None:
        residual = config.attention == "residual"
        attention = nn.ModuleList(
            AttentionNetwork(
                in_channels=in_channels,
                channels=level.channels,
                stride=level.stride,
                silent=residual and depth > 0,
            )
            for depth, level in enumerate(config.levels)
        )
        super().__init__(config, in_channels=in_channels, classes=classes, pretrained=pretrained, attention=attention)

    def coarse_view(self, image: Image) -> Tensor:
        """Read the view of the whole image that the first level looks at; see `ImageModel.coarse_view`.

        Returns
        -------
        (C, H, W) as the image gives it, H and W multiples of what is drawn plus two margins.
        """
        level, margin = self.config.levels[0], self._network(0).margin
        index = find_level(image, level.downsample)
        side = [-(-size // level.unit) * level.unit + 2 * margin for size in image.shapes[index]]
        return image.read(index, torch.tensor([[-margin, -margin, *side]]))[0]

    def patch_centers(self, image: Image) -> Tensor:
        """All points that patches may be centred on, by whatever attention; see `PatchModel.patch_centers`."""
        centers = torch.empty(0, 2, dtype=torch.float64)
        for depth, level in enumerate(self.config.levels):
            if depth:
                assert level.size is not None  # noqa: S101 - an invariant of ModelConfig
                origins = boxes_at(centers, level.downsample, level.size)[:, :2]
                shape = (level.size, level.size)
            else:
                origins, shape = (
                    torch.zeros(1, 2, dtype=torch.int64),
                    image.shapes[find_level(image, level.downsample)],
                )
            rows, columns = (-(-side // level.unit) for side in shape)
            places = origins[:, None] + grid_centers(rows, columns, level.unit)
            centers = (places * level.downsample).flatten(0, 1).unique(dim=0)  # type: ignore[no-untyped-call]
            centers = centers[_touching(image_sizes([image]), centers, level.extent_l0)]
            centers = centers[self.worth_drawing([image], centers[None], level.extent_l0)[0]]
        return centers

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Attention over the whole images (equation 18); see `SamplingModel.attend`.

        Images of one size run as one batch; the list of a smaller one is filled with impossible cells.
        """
        groups: dict[torch.Size, list[int]] = {}
        for row, view in enumerate(views):
            groups.setdefault(view.shape, []).append(row)
        maps = []
        for rows in groups.values():
            batch, origins = [images[row] for row in rows], torch.zeros(len(rows), 1, 2, dtype=torch.int64)
            maps.append(self._look(0, batch, torch.stack([views[row] for row in rows])[:, None], origins))
        most = max(each.log_attention.shape[-1] for each in maps)
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()  # as the images came

        def together(parts: Sequence[Tensor], value: float) -> Tensor:
            """(B, 1, k, ...) of all images, the k of smaller ones filled up."""
            filled = [functional.pad(p, (0, 0) * (p.ndim - 3) + (0, most - p.shape[2]), value=value) for p in parts]
            return torch.cat(filled)[order.to(filled[0].device)]

        cells = [each.cells for each in maps if each.cells is not None]
        return Population(
            together([each.log_attention for each in maps], -torch.inf),
            together([each.centers_l0 for each in maps], 0.0),
            self.config.levels[0].extent_l0,
            together(cells, -torch.inf) if cells else None,
        )

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
        """Draw down the levels from a first population, encode the patches drawn, and classify.

        The parameters are those of `SamplingModel.sample`.
        """
        draws = sampler or self._draw
        phases = yield from self._descend(images, population, keys, draws, exact=exact > 0, more=more)
        last = phases[-1]
        if exact:
            pooled = yield from self._pool_all(images, last, exact)
        else:
            features = yield from self._encode_drawn(images, last.centers_l0, augment, keys)
            pooled = self._pool(phases, features)
        total = torch.stack([_entropy(phases, depth) for depth in range(len(phases))]).sum(0)
        return Output(self.head(pooled), total, pooled, tuple(phases))

    def _descend(
        self,
        images: Sequence[Image],
        population: Population,
        keys: Tensor,
        sampler: Sampler,
        *,
        exact: bool,
        more: int,
    ) -> Reading[list[Phase]]:
        """Draw from every level; where `exact`, all is taken from the last."""
        attention = z = torch.ones_like(population.log_attention[:, :, 0])  # (B, 1): the root's
        phases: list[Phase] = []
        for depth, level in enumerate(self.config.levels):
            if phases:
                attention, z = phases[-1].attention, phases[-1].z
                population = yield from self._open(depth, images, phases[-1])
            draws = take_all if exact and depth == len(self.config.levels) - 1 else sampler
            phases.append(draw_phase(population, attention, z, draws, level.samples * more, fold_in(keys, depth)))
        return phases

    def leaves(self, image: Image, *, readers: Executor | None = None) -> Iterator[Leaves]:
        """All leaves of an image; see `SamplingModel.leaves`."""
        population = self.attend([image], [self.coarse_view(image)])
        root = torch.ones_like(population.log_attention[:, :, 0])
        yield from self._below(image, 0, draw_phase(population, root, root, take_all, 0, root), readers)

    def _below(self, image: Image, depth: int, phase: Phase, readers: Executor | None) -> Iterator[Leaves]:
        """All leaves below the units of a phase that has taken all of them."""
        if depth + 1 == len(self.config.levels):
            yield leaves_of(phase)
            return
        parts = torch.split((phase.z[0] > 0).nonzero().flatten(), _OPEN_REGIONS)
        for number, units in enumerate(parts):
            opened = phase._replace(
                drawn=Draw(phase.drawn.indices[:, units], phase.drawn.z[:, units]),
                attention=phase.attention[:, units],
                z=phase.z[:, units],
                centers_l0=phase.centers_l0[:, units.cpu()],
            )
            population = run(self._open(depth + 1, [image], opened), readers)
            below = draw_phase(population, opened.attention, opened.z, take_all, 0, opened.z)
            for leaves in self._below(image, depth + 1, below, readers):
                yield leaves._replace(done=(number + leaves.done) / len(parts))

    def _pool(self, phases: Sequence[Phase], features: Tensor) -> Tensor:
        return expectation(phases[-1].attention, features, phases[-1].z)

    def _open(self, depth: int, images: Sequence[Image], parents: Phase) -> Reading[Population]:
        """Read the regions drawn by the level above and attend to each."""
        level, margin = self.config.levels[depth], self._network(depth).margin
        assert level.size is not None  # noqa: S101 - an invariant of ModelConfig
        boxes = boxes_at(parents.centers_l0, level.downsample, level.size + 2 * margin)
        views = torch.stack((yield batch_reads(images, level.downsample, boxes)))
        origins = boxes[..., :2] + margin
        above = None
        if self.config.attention == "residual":
            above = self._inherit(depth, parents, origins)
        return self._look(depth, images, views, origins, above)

    def _inherit(self, depth: int, parents: Phase, origins: Tensor) -> Tensor:
        """Logits (B, n, k, k) that the cells of drawn regions have from the map above."""
        level, parent = self.config.levels[depth], self.config.levels[depth - 1]
        cells = parents.population.cells
        assert cells is not None  # noqa: S101 - every level but the last has them
        cells = cells.flatten(1, 2)  # (B, all units, g, g)
        drawn = parents.drawn.indices[..., None, None].expand(-1, -1, *cells.shape[-2:])
        pitch = parent.downsample * parent.stride
        corner = parents.centers_l0 - parent.extent_l0 / 2
        starts = (origins.cpu() * level.downsample - corner) / pitch
        count = (level.size or 0) // level.stride
        return inherited(cells.gather(1, drawn), starts, level.downsample * level.stride / pitch, count)

    def _look(
        self,
        depth: int,
        images: Sequence[Image],
        views: Tensor,
        origins: Tensor,
        above: Tensor | None = None,
    ) -> Population:
        """Attend to (B, n, C, H, W) views at (B, n, 2) origins, in pixels of their level."""
        level, network = self.config.levels[depth], self._network(depth)
        shape = views.shape[:2]
        logits: Tensor = network(
            self._normalise(self._scale(views.flatten(0, 1))).contiguous(memory_format=torch.channels_last)
        )
        # In bf16 the probabilities of many cells would not sum to one.
        rows, columns = logits.shape[-2:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(*shape, rows, columns)
        if above is not None:
            logits = logits + above
        centers = (origins.cpu()[..., None, None, :] + _grid(rows, columns, level.stride)) * level.downsample
        extent = level.downsample * level.stride
        possible = _inside(images, centers, extent)
        possible = _prefer(possible & self.worth_drawing(images, centers, extent), possible).to(logits.device)
        if above is not None:
            possible = _prefer(possible & (above > -torch.inf), above > -torch.inf)
            # A slot that repeats another where too few were drawn may have nothing above; it weighs nothing.
            possible = _prefer(possible, torch.ones_like(possible))
            logits = logits.masked_fill(logits == -torch.inf, 0.0)
        logits = logits.masked_fill(~possible, -torch.inf)
        g = level.group
        units = (rows // g, columns // g)
        order = curve_order(*units)
        cells = logits.reshape(*shape, units[0], g, units[1], g).transpose(-3, -2)
        cells = cells.flatten(2, 3)[:, :, order.to(logits.device)]  # (B, n, k, g, g)
        places = origins.cpu()[..., None, :] + grid_centers(*units, level.unit)
        last = depth + 1 == len(self.config.levels)
        return Population(
            group_logits(cells).log_softmax(-1),
            places * level.downsample,
            level.extent_l0,
            None if last else cells,
        )

    def _draw(self, weights: Tensor, n: int, keys: Tensor) -> Draw:
        if self.config.method != "multinomial":  # the others take what there is; each unit more would cost a region
            n = min(n, weights.shape[-1])
        return draw(weights, n, method=self.config.method, keys=keys.to(weights.device))

    def _network(self, depth: int) -> AttentionNetwork:
        network = self.attention[depth]
        assert isinstance(network, AttentionNetwork)  # noqa: S101 - ModuleList has no element type
        return network


def _grid(rows: int, columns: int, side: float) -> Tensor:
    """Centres (rows, columns, 2) of the cells of a map, of `side` pixels each."""
    y, x = cell_centers(rows, rows * side), cell_centers(columns, columns * side)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)


def _inside(images: Sequence[Image], centers_l0: Tensor, extent_l0: float) -> Tensor:
    """Whether each of (B, n, rows, columns) cells touches its image; all of a view's where none does.

    A cell may reach into its image by less than the pixel to which the region that opens it is rounded.
    """
    inside = _touching(image_sizes(images)[:, None, None, None], centers_l0, extent_l0)
    return _prefer(inside, torch.ones_like(inside))


def _touching(sizes_l0: Tensor, centers_l0: Tensor, extent_l0: float) -> Tensor:
    """Whether cells around (..., 2) points touch images of these sizes."""
    return ((centers_l0 > -extent_l0 / 2) & (centers_l0 < sizes_l0 + extent_l0 / 2)).all(-1)


def _prefer(wanted: Tensor, otherwise: Tensor) -> Tensor:
    """Cells (B, n, rows, columns) of `wanted`, or of `otherwise` in a view that has none of them."""
    return torch.where(wanted.flatten(-2).any(-1)[..., None, None], wanted, otherwise)


def _entropy(phases: Sequence[Phase], depth: int) -> Tensor:
    """One level's term of the chain rule: H(a) = H(A) + sum A_r H(b|r) + ..., the sum over r estimated."""
    own = entropy(phases[depth].population.log_attention)  # (B, n)
    if depth == 0:
        return own[:, 0]
    parents = phases[depth - 1]
    return (parents.z.detach() * parents.attention * own).sum(-1)
