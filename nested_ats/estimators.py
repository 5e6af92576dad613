"""The expectation of features under the attention, estimated from the drawn leaves (paper, equations 2 and 12).

Shape letters: B batch, n drawn leaves, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from nested_ats.phases import Phase


def expectation(attention: Tensor, features: Tensor, z: Tensor) -> Tensor:
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
        (B, n), from `nested_ats.draw`; in a nested model the product along the path.

    Returns
    -------
    (B, D)
    """
    return ((z.detach() * attention)[..., None] * features).sum(-2)


def entropy(log_attention: Tensor) -> Tensor:
    """Entropy (the H of equation 21) in nats: (..., K) log-probabilities, -inf where impossible -> (...)."""
    return -(log_attention.exp() * log_attention.clamp_min(-1e4)).sum(-1)


def uniform_entropy(phases: Sequence[Phase]) -> Tensor:
    """Entropy in nats that the attention of a model's phases would have if it were uniform, (B,).

    It is the logarithm of the number of cells. Where levels are nested it is that of the leaves, estimated from the
    same draws as the attention's own entropy (`Output.entropy`), so that the two may be compared.
    """
    cells = [phase.population.log_attention.isfinite().sum(-1) for phase in phases]  # (B, n) each
    total = cells[0][:, 0].log()
    for parents, within in zip(phases[:-1], cells[1:], strict=True):
        total = total + (parents.z * parents.attention).detach().mul(within.log()).sum(-1)
    return total
