"""Two estimators of the expected feature that cost no patch more, to be compared with the product's in `learning.py`.

*Control variate* (the survey statistician's GREG): what the last attention network has computed for every cell of the
opened views predicts its features linearly; the prediction is summed over all cells, and what the drawn ones differ
from it by is estimated. *Memory*: of a frozen encoder, the features of all cells drawn in earlier epochs are summed
exactly, and only the unknown rest is drawn.

Both are unbiased for any sampler given the past, since neither the prediction nor what is known depends on the draw
of the step: ``tests/benchmarks/test_estimators.py`` averages over draws.

Shape letters: B batch, n drawn cells, K cells of the last population, C channels and one, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nested_ats import Draw, NestedATS
from nested_ats.cells import curve_order
from nested_ats.estimators import entropy, expectation
from nested_ats.images import Image
from nested_ats.patch_augment import AS_THEY_ARE, PatchAugment
from nested_ats.phases import Output, Phase, Population, Sampler, draw_phase
from nested_ats.reading import Reading
from nested_ats.sampling import fold_in

DECAY = 0.99  # of what earlier steps say of the prediction, a step
RIDGE = 1e-3  # of the mean square of what is predicted from


class ControlledATS(NestedATS):
    """`NestedATS` with a control variate at its last level; all images of a batch have one size.

    Attributes
    ----------
    told
        ``explained``: share of the features' variance over the attention that the prediction explains, R squared.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        last = self._network(len(self.config.levels) - 1).layers[-1]
        assert isinstance(last, nn.Conv2d)
        width = last.in_channels + 1
        self.register_buffer("_squares", torch.zeros(width, width))
        self.register_buffer("_products", torch.zeros(width, self.features))
        self._seen = torch.empty(0)
        last.register_forward_pre_hook(lambda _, given: self._look_on(given[0]))
        self.told: dict[str, float] = {}

    def _look_on(self, activations: Tensor) -> None:
        self._seen = activations.detach().float()

    def _pool(self, phases: Sequence[Phase], features: Tensor) -> Tensor:
        last = phases[-1]
        within = last.population.log_attention.exp()  # (B, views, k)
        path = within.flatten(1)
        if len(phases) > 1:
            above = phases[-2]
            path = ((above.z.detach() * above.attention)[..., None] * within).flatten(1)  # (B, K)
        order = curve_order(*self._seen.shape[-2:]).to(self._seen.device)
        known = self._seen.flatten(2).mT[:, order].reshape(*path.shape, -1)  # (B, K, C - 1)
        known = torch.cat([known, torch.ones_like(known[..., :1])], -1)
        drawn = known.gather(1, last.drawn.indices[..., None].expand(-1, -1, known.shape[-1]))
        coefficients = self._coefficients()
        rest = features - drawn @ coefficients
        if self.training:
            weights = (last.z * last.attention).detach()
            if coefficients.any():
                self._tell(features.detach(), weights, rest.detach())
            self._learn(drawn, features.detach(), weights)
        return expectation(last.attention, rest, last.z) + (path[..., None] * known).sum(1) @ coefficients

    def _coefficients(self) -> Tensor:
        """(C, D) of the prediction, by earlier steps alone."""
        squares: Tensor = self._squares  # type: ignore[assignment]
        products: Tensor = self._products  # type: ignore[assignment]
        mean = squares.diagonal().mean()
        if mean == 0:
            return torch.zeros_like(products)
        ridge = RIDGE * mean * torch.eye(len(squares), device=squares.device)
        return torch.linalg.solve(squares + ridge, products)

    def _learn(self, drawn: Tensor, features: Tensor, weights: Tensor) -> None:
        weighted = (drawn * weights[..., None]).flatten(0, 1)
        self._squares.mul_(DECAY).add_(weighted.T @ drawn.flatten(0, 1))  # type: ignore[operator]
        self._products.mul_(DECAY).add_(weighted.T @ features.flatten(0, 1))  # type: ignore[operator]

    def _tell(self, features: Tensor, weights: Tensor, rest: Tensor) -> None:
        share = (weights / weights.sum())[..., None]
        around = features - (share * features).sum((0, 1))
        explained = 1 - float((share * rest.square()).sum() / (share * around.square()).sum())
        before = self.told.get("explained", explained)
        self.told["explained"] = round(0.9 * before + 0.1 * explained, 4)


class RememberingATS(NestedATS):
    """`NestedATS` of one level and a frozen encoder that remembers the features of every cell it has drawn.

    At prediction nothing is remembered. Images tell an `identity`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if len(self.config.levels) != 1 or self.config.trainable != "none":
            raise ValueError("features are remembered of one level and a frozen encoder")
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}
        self.told: dict[str, float] = {}

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
        """Draw from what is not remembered; see `NestedATS.sample`."""
        if not self.training:
            draw = super().sample(images, population, keys, sampler=sampler, exact=exact, more=more, augment=augment)
            return (yield from draw)
        attention = population.log_attention[:, 0].exp()  # (B, K)
        remembered = [self._of(image, attention.shape[-1]) for image in images]
        known = torch.stack([each for each, _ in remembered])
        chosen = sampler or self._draw

        def rest(weights: Tensor, n: int, keys: Tensor) -> Draw:
            unknown = weights * ~known
            drawn = chosen(torch.where((unknown.sum(-1) > 0)[:, None], unknown, weights), n, keys)
            return Draw(drawn.indices, drawn.z * ~known.gather(-1, drawn.indices))

        one = torch.ones_like(attention[:, :1])
        phase = draw_phase(population, one, one, rest, self.config.levels[0].samples * more, fold_in(keys, 0))
        features = yield from self.encoding(images, phase.centers_l0)
        places = [mask.nonzero().flatten() for mask, _ in remembered]  # of what is known now
        summed = [a[own] @ table[own] for a, own, (_, table) in zip(attention, places, remembered, strict=True)]
        pooled = expectation(phase.attention, features, phase.z) + torch.stack(summed)
        self.told["remembered"] = round(float((attention.detach() * known).sum(-1).mean()), 4)
        for row, (mask, table) in enumerate(remembered):
            held = phase.drawn.indices[row][phase.drawn.z[row] > 0]
            table[held] = features[row][phase.drawn.z[row] > 0].detach()
            mask[held] = True
        return Output(self.head(pooled), entropy(population.log_attention)[:, 0], pooled, (phase,))

    def _of(self, image: Image, cells: int) -> tuple[Tensor, Tensor]:
        """Which of the cells are known, (K,), and the features of those, (K, D)."""
        identity: str = image.identity  # type: ignore[attr-defined]
        if identity not in self._memory:
            weight = self.head.weight
            known = torch.zeros(cells, dtype=torch.bool, device=weight.device)
            self._memory[identity] = known, weight.new_zeros(cells, self.features)
        return self._memory[identity]
