"""The expectation of features under the attention, estimated from the drawn leaves (paper, equations 2 and 12).

Shape letters: B batch, n drawn leaves, D features.
"""

from __future__ import annotations

from torch import Tensor


def expectation(attention: Tensor, features: Tensor, z: Tensor) -> Tensor:
    """Estimate ``F = sum a_i f_i`` over all leaves from the drawn ones.

    ``F_hat = sum stop_gradient(z_i) a_i f_i``. Since ``dF = sum d(a_i f_i)`` is itself a population total, both
    F_hat and its derivative by automatic differentiation are unbiased, for the attention and for the features.

    Parameters
    ----------
    attention
        (B, n), the probability of each drawn leaf under the attention, with gradient.
    features
        (B, n, D), with gradient.
    z
        (B, n), from `nested_ats.draw` (the product along the path, where nested).

    Returns
    -------
    (B, D)
    """
    return ((z.detach() * attention)[..., None] * features).sum(-2)


def entropy(log_attention: Tensor) -> Tensor:
    """Entropy in nats over the last axis: (..., K) log-probabilities, -inf where impossible -> (...)."""
    return -(log_attention.exp() * log_attention.clamp_min(-1e4)).sum(-1)
