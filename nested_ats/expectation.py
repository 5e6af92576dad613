"""The expectation of features under the attention, estimated from the drawn leaves (paper, equations 2 and 12).

Two baselines lower the variance of the attention's gradient and leave its mean alone: a constant in `expectation`,
exact for every sampler, and `leave_one_out`, exact for independent draws only.

Shape letters: B batch, n drawn leaves, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nested_ats.base import Phase


def expectation(attention: Tensor, features: Tensor, z: Tensor, baseline: Tensor | None = None) -> Tensor:
    """Estimate ``F = sum a_i f_i`` over all leaves from the drawn ones.

    ``F_hat = sum stop_gradient(z_i) a_i f_i``, whose derivative is the paper's equation 12 where z is that of
    independent draws. Since ``dF = sum d(a_i f_i)`` is itself a population total, both
    F_hat and its derivative by automatic differentiation are unbiased, for the attention and for the features.

    Parameters
    ----------
    attention
        (B, n), the probability of each drawn leaf under the attention, with gradient.
    features
        (B, n, D), with gradient.
    z
        (B, n), from `nested_ats.draw` (the product along the path, where nested).
    baseline
        (D,), any vector that does not depend on the draw: it is subtracted from the features in the term of the
        gradient that carries the attention. The closer it is to F, the less that gradient varies; its expectation
        is unchanged since ``sum d a_i = 0``.

    Returns
    -------
    (B, D)
    """
    weights = z.detach() * attention
    pooled = (weights[..., None] * features).sum(-2)
    if baseline is not None and torch.is_grad_enabled():
        pooled = pooled - (weights - weights.detach()).sum(-1, keepdim=True) * baseline.detach()
    return pooled


def follow(pooled: Tensor, baseline: Tensor) -> Tensor:
    """Return (B, D) `pooled`, and make a (D,) parameter learn its mean.

    Whatever the loss, the gradient of `baseline` is the sum over the batch of ``baseline - pooled``, so that any
    optimizer moves it to the mean of F_hat; that of `pooled` is not touched. As an ordinary parameter the baseline is
    summed over workers and saved like the others, and a step's draws do not move the one that they are used with.
    """
    followed: Tensor = _Follow.apply(pooled, baseline)  # type: ignore[no-untyped-call]
    return followed


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: Tensor, baseline: Tensor) -> Tensor:
        ctx.save_for_backward((baseline - pooled).sum(0))
        return pooled.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.saved_tensors[0]


def entropy(log_attention: Tensor) -> Tensor:
    """Entropy (the H of equation 21) in nats: (..., K) log-probabilities, -inf where impossible -> (...)."""
    return -(log_attention.exp() * log_attention.clamp_min(-1e4)).sum(-1)


def uniform_entropy(phases: Sequence[Phase]) -> Tensor:
    """Entropy in nats that the attention of a model's phases would have if it were uniform, (B,).

    The logarithm of the number of cells; where levels are nested, that of the leaves, estimated from the same draws
    as the attention's own entropy (`Output.entropy`), so that the two may be compared.
    """
    cells = [phase.population.log_attention.isfinite().sum(-1) for phase in phases]  # (B, n) each
    total = cells[0][:, 0].log()
    for parents, within in zip(phases[:-1], cells[1:], strict=True):
        total = total + (parents.z * parents.attention).detach().mul(within.log()).sum(-1)
    return total


def leave_one_out(phases: Sequence[Phase], features: Tensor) -> Tensor:
    """Baseline on the gradient of the attention, for independent draws: zero in value and in mean gradient.

    In the term of the gradient that carries the attention of a drawn unit, the mean of what the *other* units drawn
    with it have found is subtracted from what it has found, level by level. The draws of a level being independent
    given those before, that mean does not depend on the unit, and ``sum d a_i = 0``: the expectation is unchanged.
    It is not for draws without replacement: which others are drawn then depends on the unit.

    Parameters
    ----------
    phases
        Of a model that draws by ``multinomial``, coarse to fine.
    features
        (B, n, D), of the units of the last phase.

    Returns
    -------
    (B, D), to be subtracted from the expectation.
    """
    found = (phases[-1].z * phases[-1].attention).detach()[..., None] * features.detach()  # (B, n, D)
    total = found.sum(1, keepdim=True)
    baseline = torch.zeros_like(total[:, 0])
    for phase in reversed(phases):
        log_within = phase.population.log_attention.flatten(1).gather(-1, phase.drawn.indices)
        share = (phase.z * phase.attention).detach()
        # Where every unit was taken nothing was left to chance, and one drawn alone has no others.
        within = phase.population.log_attention.detach().exp()
        chance = ((phase.carry[..., None] * within).flatten(1) > 0).sum(-1) > share.shape[-1]
        others = (total - found) / (1 - share).clamp_min(1e-12)[..., None]
        weight = share * (log_within - log_within.detach()) * (chance & (share.shape[-1] > 1))[:, None]
        baseline = baseline + (weight[..., None] * others).sum(1)
        parent = phase.drawn.indices // phase.population.log_attention.shape[-1]
        above = found.new_zeros(len(found), phase.carry.shape[-1], found.shape[-1])
        found = above.scatter_add(1, parent[..., None].expand_as(found), found)
    return baseline
