"""The training loss (paper, equation 21).

Shape letters: B batch, Q classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def attention_sampling_loss(
    logits: Tensor,
    labels: Tensor,
    entropy: Tensor,
    *,
    entropy_weight: float,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy less the weighted entropy of the attention, for each sample (equation 21).

    Parameters
    ----------
    logits
        (B, Q).
    labels
        (B,) int64 in [0, Q).
    entropy
        (B,) nats: the entropy of the attention over all leaves.
    entropy_weight
        Lambda, >= 0; the paper has 0.01 and 0.05.
    class_weights
        (Q,), factors of the cross-entropy by label; the paper weighs by the inverse prior in section 4.4.

    Returns
    -------
    loss, cross_entropy
        (B,) each: the loss to minimise, and its first term.
    """
    cross_entropy = functional.cross_entropy(logits, labels, weight=class_weights, reduction="none")
    return cross_entropy - entropy_weight * entropy, cross_entropy
