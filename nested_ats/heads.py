"""The last layer of a model, which makes the numbers of its target of a feature.

Shape letters: Q numbers of the head, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Head(nn.Linear):
    """A linear layer of `scale` times its input, in the precision of its weights even under autocast.

    Features have unit length, so a new layer's logits are so small that the gradient of the entropy hides that of the
    attention; scaled, a model learns in half the epochs.

    Standard errors are differences between logits of nearly equal features, which the rounding of bf16 would hide.

    Attributes
    ----------
    temperature
        What the Q numbers are divided by; it is no weight, and 1 unless a calibration sets it.
    """

    def __init__(self, features: int, outputs: int, scale: float) -> None:
        super().__init__(features, outputs)
        self.scale = scale
        self.temperature = 1.0

    def forward(self, pooled: Tensor) -> Tensor:
        """(..., D) -> (..., Q)."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.numbers(super().forward(pooled.to(self.weight.dtype) * self.scale)) / self.temperature

    def numbers(self, values: Tensor) -> Tensor:
        """Make the head's numbers of those of the linear layer: (..., outputs of the layer) -> (..., Q)."""
        return values


class OrdinalHead(Head):
    """The head of the proportional odds model: one score, ordered thresholds, and Q log-probabilities of them."""

    def __init__(self, features: int, outputs: int, scale: float) -> None:
        super().__init__(features, 1, scale)
        # The first threshold, and the logarithms of the distances to the following ones; grades begin equally likely.
        even = torch.linspace(0, 1, outputs + 1)[1:-1].logit()
        self.thresholds = nn.Parameter(torch.cat([even[:1], even.diff().log()]))

    def numbers(self, values: Tensor) -> Tensor:
        """(..., 1) -> (..., Q)."""
        steps = self.thresholds[1:].exp()
        above = values - (self.thresholds[0] + functional.pad(steps, (1, 0)).cumsum(0))  # logit of P(class > k)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) loses nothing where both are near 0 or 1.
        between = functional.pad(torch.log(-torch.expm1(-steps)), (1, 1))
        return (
            functional.pad(functional.logsigmoid(above), (1, 0))
            + functional.pad(functional.logsigmoid(-above), (0, 1))
            + between
        )
