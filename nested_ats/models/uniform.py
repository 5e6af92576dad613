"""Patches drawn without attention (U-N of the paper, section 4.1.1), behind the same interface.

Shape letters: B batch, n drawn patches, K cells, D features, Q classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from nested_ats.config import UniformConfig
from nested_ats.estimators import entropy, expectation
from nested_ats.images import Image
from nested_ats.models.patches import SamplingModel
from nested_ats.patch_augment import AS_THEY_ARE, PatchAugment
from nested_ats.phases import Leaves, Output, Population, Sampler, draw_phase, leaves_of, take_all
from nested_ats.reading import Reading
from nested_ats.sampling import Draw, draw, fold_in


class UniformSampling(SamplingModel):
    """The mean feature of N patches drawn without attention (U-N).

    Patches are centred on the cells of a map, as those of attention sampling are; N distinct cells are drawn, every
    subset with the same chance, and have equal weight.

    Its parameters and errors are those of `nested_ats.build_model`.
    """

    config: UniformConfig

    def attend(self, images: Sequence[Image], views: Sequence[Tensor]) -> Population:
        """Give every cell of an image the same attention; see `SamplingModel.attend`. No pixel is read."""
        del views
        centers, possible = self._grid(images)
        weight = self.head.weight
        logits = torch.zeros(possible.shape, device=weight.device, dtype=weight.dtype)
        logits = logits.masked_fill(~possible.to(weight.device), -torch.inf)
        return Population(logits.log_softmax(-1)[:, None], centers[:, None], self.config.cell)

    def leaves(self, image: Image, *, readers: Executor | None = None) -> Iterator[Leaves]:
        """All patches of an image; see `SamplingModel.leaves`."""
        del readers
        population = self.attend([image], ())
        ones = torch.ones_like(population.log_attention[:, :, 0])
        yield leaves_of(draw_phase(population, ones, ones, take_all, 0, ones))

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
        """Draw patches, encode them, and classify by their mean; see `SamplingModel.sample`."""
        ones = torch.ones_like(population.log_attention[:, :, 0])
        draws = take_all if exact else sampler or _draw_equally
        phase = draw_phase(population, ones, ones, draws, self.config.samples * more, fold_in(keys, 0))
        if exact:
            pooled = yield from self._pool_all(images, phase, exact)
        else:
            features = yield from self._encode_drawn(images, phase.centers_l0, augment, keys)
            pooled = expectation(phase.attention, features, phase.z)
        return Output(self.head(pooled), entropy(population.log_attention[:, 0]), pooled, (phase,))


def _draw_equally(weights: Tensor, n: int, keys: Tensor) -> Draw:
    """Draw n of the units of positive (and equal) weight without replacement, z = K / n."""
    n = min(n, weights.shape[-1])
    drawn = draw(weights, n, method="desraj", keys=keys.to(weights.device))
    units = (weights > 0).sum(-1, keepdim=True)
    return Draw(drawn.indices, torch.where(drawn.z > 0, (units / n).clamp_min(1.0), 0.0).to(weights.dtype))
