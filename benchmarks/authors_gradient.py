"""The gradient that the authors of attention sampling published, as a fact to compare with.

Their released code draws without replacement, averages the n Des Raj estimators, and writes the backward pass by hand
(``sampling.md``, section 2, states the formula). The value is unbiased, the gradient by the attention is not:
``tests/benchmarks/test_authors_gradient.py`` enumerates all draws. It is for one level; they have no nested model.

Shape letters: B batch, K cells, n drawn cells in the order drawn, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nested_ats import Draw, NestedATS
from nested_ats.phases import Phase
from nested_ats.sampling import uniform


class AuthorsExpectation(torch.autograd.Function):
    """Mean of the n Des Raj estimators of ``F = sum a_i f_i``, with their backward pass.

    Of (B, n) attention, which sums to one over all K cells, and (B, n, D) features, both in the order drawn: (B, D).
    """

    @staticmethod
    def forward(ctx: Any, attention: Tensor, features: Tensor) -> Tensor:
        """Average the estimators ``F_k = sum_{j<k} a_j f_j + m_k f_k``."""
        ctx.save_for_backward(attention, features)
        return (_shares(attention)[..., None] * features).sum(-2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return dL/da_k = <g, F_k m_k / a_k + sum_{j<k} f_j - k f_k> / n and dL/df_k = (m_k + (n-1-k) a_k) g / n."""
        a, f = ctx.saved_tensors
        n = a.shape[-1]
        m, k = _remaining(a), torch.arange(n, device=a.device)
        weighted = a[..., None] * f
        estimates = _sum_before(weighted, -2) + m[..., None] * f  # F_k, (B, n, D)
        by_slot = estimates * (m / a)[..., None] + _sum_before(f, -2) - k[:, None] * f
        by_attention = (by_slot * gradient[..., None, :]).sum(-1) / n
        return by_attention, _shares(a)[..., None] * gradient[..., None, :]


class AuthorsATS(NestedATS):
    """`NestedATS` of one level, drawn by ``desraj`` and trained by the authors' gradient."""

    def _draw(self, weights: Tensor, n: int, keys: Tensor) -> Draw:
        return draw_in_order(weights, n, uniform(keys, weights.shape[-1]))

    def _pool(self, phases: Sequence[Phase], features: Tensor) -> Tensor:
        (phase,) = phases
        pooled: Tensor = AuthorsExpectation.apply(phase.attention, features)
        return pooled


def draw_in_order(weights: Tensor, n: int, noise: Tensor) -> Draw:
    """Draw what `nested_ats.draw` draws by ``desraj``, but list it in the order drawn, which their gradient needs.

    Of (B, K) weights, more than n of them positive in each row, and (B, K) uniform numbers.
    """
    w = weights.detach().double()
    w = w / w.sum(-1, keepdim=True)
    gumbel = -torch.log(-torch.log(noise.double().clamp_min(2.0**-60)))
    indices = (w.log() + gumbel).topk(n).indices
    a = w.gather(-1, indices)
    return Draw(indices, (_shares(a) / a).to(weights.dtype))


def _shares(attention: Tensor) -> Tensor:
    """What a feature weighs in the mean of the estimators: z_k a_k, (B, n)."""
    n = attention.shape[-1]
    later = n - 1 - torch.arange(n, device=attention.device)
    return (_remaining(attention) + later * attention) / n


def _remaining(attention: Tensor) -> Tensor:
    """m_k, the attention not drawn before slot k; rounding must not take it below what slot k drew."""
    return torch.maximum(1 - _sum_before(attention, -1), attention)


def _sum_before(values: Tensor, axis: int) -> Tensor:
    return values.cumsum(axis) - values
