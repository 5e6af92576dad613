"""The course of a training: how learning rate, entropy weight and budget change, and which weights are kept.

Everything is a function of how far training has come, from 0 to 1, so that a run that goes on after an interruption
takes the same course.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.sections import TrainConfig

# Keys of `train` as in the paper: nothing changes during training, and the last weights are kept.
PAPERS_COURSE: dict[str, Any] = {
    "schedule": "constant",
    "warmup": 0.0,
    "clip": 0.0,
    "average": 0.0,
    "entropy_fade": 0.0,
    "early_samples": 1,
}


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate: it rises linearly over `warmup`, then falls along half a cosine to zero, or stays."""
    rate = config.learning_rate * min(1.0, progress / config.warmup if config.warmup else 1.0)
    if config.schedule == "constant":
        return rate
    left = max(0.0, progress - config.warmup) / (1 - config.warmup)
    return rate * (1 + math.cos(math.pi * min(left, 1.0))) / 2


def entropy_weight(config: TrainConfig, progress: float) -> float:
    """Weight of the entropy: it falls linearly to zero over `entropy_fade` of the training."""
    left = 1.0 - progress / config.entropy_fade if config.entropy_fade else 1.0
    return config.entropy_weight * max(0.0, left)


def more_samples(config: TrainConfig, progress: float) -> int:
    """Factor on the samples of every level, larger early on, while the attention has not learned where to look."""
    return config.early_samples if progress < config.early_share else 1


class KeptWeights:
    """The kept weights of a training: a moving average, and the best of these by validation.

    Averaged weights wander less than those of the last step. Floating-point buffers, such as the statistics of batch
    normalisation, are averaged too.

    Parameters
    ----------
    model
        The model, whose parameters with ``requires_grad`` are kept.
    decay
        Share of the average that a step keeps, in [0, 1); less in the first steps. 0 keeps the last weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = [p for p in model.parameters() if p.requires_grad]
        self._live = trained + [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._average = self._copy()
        self._best: list[Tensor] = []
        self._steps, self._stale = torch.zeros(2, dtype=torch.int64).unbind()
        self._score = torch.tensor(torch.inf, dtype=torch.float64)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average."""
        self._steps += 1
        decay = min(self.decay, int(self._steps) / (int(self._steps) + 10)) if self.decay else 0.0
        torch._foreach_lerp_(self._average, [value.detach() for value in self._live], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights while the block runs."""
        live = self._copy()
        self._put(self._average)
        try:
            yield
        finally:
            self._put(live)

    @property
    def stale(self) -> int:
        """How often in a row the average was no better than the best."""
        return int(self._stale)

    @property
    def judged(self) -> bool:
        """Whether there is a best."""
        return bool(self._best)

    def judge(self, score: float) -> None:
        """Keep the average if its score is the lowest so far, which NaN never is."""
        self._stale += 1
        if score < float(self._score):
            self._score.fill_(score)
            self._stale.zero_()
            self._best = [value.clone() for value in self._average]

    def use_best(self) -> None:
        """Replace the weights for good by the best average, or by the last one where none was judged."""
        self._put(self._best or self._average)

    def _copy(self) -> list[Tensor]:
        return [value.detach().clone() for value in self._live]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for live, value in zip(self._live, values, strict=True):
            live.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, to be saved."""
        parts = {"average": self._average, "best": self._best}
        tensors = {f"{part}.{number}": value for part, values in parts.items() for number, value in enumerate(values)}
        numbers = {"steps": self._steps, "stale": self._stale, "score": self._score}
        return {name: value.clone() for name, value in (numbers | tensors).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises
        ------
        KeyError, RuntimeError
            The state is not that of this model.
        """
        self._steps.copy_(state["steps"])
        self._stale.copy_(state["stale"])
        self._score.copy_(state["score"])
        if self._score.isfinite():
            self._best = self._copy()
        for part, values in (("average", self._average), ("best", self._best)):
            for number, value in enumerate(values):
                value.copy_(state[f"{part}.{number}"])


def class_by_class(order: Tensor, labels: Tensor) -> Tensor:
    """Take a slide of each class in turn, so that every step has as many of each.

    Slides of a class below its share are repeated, those of one above it take turns over the epochs. What all slides
    have in common then cancels in the gradient of a step.

    Parameters
    ----------
    order
        (S,) the slides of an epoch, in random order.
    labels
        (S,) int64: the class of each slide, by its number.

    Returns
    -------
    (S,) slides.
    """
    classes = [order[labels[order] == number] for number in sorted(set(labels.tolist()))]
    share = -(-len(order) // len(classes))
    return torch.stack([rows.repeat(-(-share // len(rows)))[:share] for rows in classes], 1).flatten()[: len(order)]


def clip(parameters: Sequence[nn.Parameter], largest: float) -> None:
    """Scale all gradients down to a common norm of at most `largest`; 0 leaves them alone."""
    if largest:
        nn.utils.clip_grad_norm_(parameters, largest)
