"""The training loss (paper, equation 21).

Shape letters: B batch, Q classes.
"""

from __future__ import annotations

from torch import Tensor

from nested_ats.targets import Target, as_target


def attention_sampling_loss(
    logits: Tensor,
    truth: Tensor,
    entropy: Tensor,
    *,
    entropy_weight: float,
    target: Target | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of the answer less the weighted entropy of the attention, for each sample (equation 21).

    Parameters
    ----------
    logits
        (B, Q).
    truth
        What is true, as the target takes it: (B,) int64 in [0, Q) for classes.
    entropy
        (B,) nats: the entropy of the attention over all leaves.
    entropy_weight
        Lambda, >= 0; the paper has 0.01 and 0.05.
    target
        What the model answers; by default one of Q classes, whose loss is the cross-entropy.
    weights
        (B,), factors of the first term; the paper weighs by the inverse prior of the class in section 4.4.

    Returns
    -------
    loss, first
        (B,) each: the loss to minimise, and its first term.
    """
    first = (target or as_target(logits.shape[-1])).loss(logits, truth)
    first = first if weights is None else weights * first
    return first - entropy_weight * entropy, first
