"""Say in words what the numbers of a training or a test mean, above all where nothing was learned.

There are four signs: a cross-entropy that class frequencies alone would reach, an area under the ROC curve that
chance would reach, an attention that is almost uniform, and patches that are drawn where there is nothing to see.

Shape letters: B batch, P patches, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nested_ats import ImageModel, Output
from nested_ats.estimators import uniform_entropy
from nested_ats.models.patches import SamplingModel
from nested_ats.models.uniform import UniformSampling
from nested_ats.networks.builtin import GIVEN
from nested_ats.targets import Classes, Target, read_target
from pipeline.results.measures import ranking

_BETTER = 0.98  # a cross-entropy above this share of that of guessing is not better than guessing
_EVEN = 0.9  # an attention that is spread over this share of the cells is called uniform
_MOSTLY = 0.9  # this share of background is worth a word
_FLAT = 0.1  # a background patch's pixels have at most this standard deviation, in units of the model's std


def class_shares(labels: Sequence[str], classes: Sequence[str], *, balanced: bool = False) -> dict[str, float]:
    """Return what a model answers that has learned the frequencies of the classes and nothing else.

    Parameters
    ----------
    labels
        The labels of the training slides.
    classes
        The names of the classes.
    balanced
        Whether weights make the classes count alike in the loss.
    """
    if balanced:
        return dict.fromkeys(classes, 1 / len(classes))
    return {name: sum(label == name for label in labels) / len(labels) for name in classes}


def run_shares(run: Mapping[str, Any]) -> dict[str, float]:
    """Return `class_shares` of a run of classes, from its run.json; it is empty for other targets."""
    target = read_target(run["target"])
    if not isinstance(target, Classes):
        return {}
    column = run["config"]["target"]["column"]
    labels = [str(({**row["extra"], **row})[column]) for row in run["entries"] if row["split"] == "train"]
    return class_shares(labels, target.classes, balanced=run["config"]["train"]["class_weights"] == "balanced")


def guess_cross_entropy(shares: Mapping[str, float], labels: Sequence[str]) -> float:
    """Return the cross-entropy in nats of answering `shares` for every slide; the labels are among its classes."""
    return -sum(math.log(max(shares[label], 1e-12)) for label in labels) / len(labels)


def verdict(
    target: Target,
    *,
    loss: float,
    guess: float,
    ranked: float | None = None,
    interval: Sequence[float] | None = None,
    entropy: float = 0.0,
    uniform: float = 0.0,
    background: float | None = None,
) -> str:
    """Say whether anything was learned; the answer is empty where all signs are good.

    Parameters
    ----------
    target
        What is answered.
    loss, guess
        The loss of the model, and that of the best answer that is the same for all slides, as by class frequencies.
    ranked, interval
        The measure that tells by ranks (`ranking`) and its 95 % interval, where they are known.
    entropy, uniform
        The entropy of the attention, and of a uniform one; both are 0 where there is no attention.
    background
        The share of the drawn patches in which there is nothing to see, where it is known.
    """
    by, classes = ranking(target), isinstance(target, Classes)
    name, title = in_words(target.loss_name), by.name.upper() if by.name == "auc" else by.name
    slack = (1 / _BETTER - 1) * abs(guess)  # likelihoods may be negative
    compared = f"{name} {loss:.3f} is {'that' if loss < guess + slack else 'worse than that'} of guessing "
    compared += f"by class frequencies ({guess:.3f})" if classes else f"({guess:.3f})"
    blind = loss > guess - (1 - _BETTER) * abs(guess)
    words_of_rank, chance = "", False
    if ranked is not None and interval is not None:
        words_of_rank = f"{title} {ranked:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
        chance = interval[0] <= by.chance  # below it has learned no more than at it
    words = []
    if blind and words_of_rank and not chance:
        answers = "probabilities" if target.probabilities else "values"
        words.append(f"ranks better than chance ({words_of_rank}), but its {answers} do not: {compared}")
    elif blind:
        words.append(f"has learned nothing yet: {compared}")
    elif chance:
        words.append("cannot be told from guessing by its ranking")
    if chance and interval is not None:
        side = "contains" if interval[1] >= by.chance else "lies below"
        words.append(f"{words_of_rank} {side} {by.chance:g}")
    if uniform > 0 and entropy - uniform > math.log(_EVEN):
        words.append(f"attention is uniform (entropy {entropy:.2f} of {uniform:.2f})")
    if background is not None and background >= _MOSTLY:
        words.append(f"{background:.0%} of the drawn patches are background")
    return "; ".join(words)


def in_words(name: str) -> str:
    """Write the name of a loss for people, as cross-entropy and squared error."""
    return {"cross_entropy": "cross-entropy"}.get(name, name.replace("_", " "))


class Observer:
    """Watches what a model draws, for the two signs that its answers do not show.

    A patch is background where it hardly varies: glass, black margins, what lies off the slide. Its standard
    deviation, as the encoder sees it, is below a tenth in every channel, which is 0.025 of the pixels' range with
    the default ``model.std``. The model tells the spread of each patch, also where it has no pixels at hand
    (`PatchModel.observe`); this takes a hundredth of the encoder's time.

    Parameters
    ----------
    model
        A model of any kind. Patches are counted if it draws, and entropies are given if its attention learns.
    """

    def __init__(self, model: ImageModel) -> None:
        self._counts = torch.zeros(2, device=model.head.weight.device)
        self._attends = not isinstance(model, UniformSampling)
        if isinstance(model, SamplingModel) and model.config.encoder_name != GIVEN:  # features have no glass
            model.observe = self._count

    def _count(self, spreads: Tensor) -> None:
        flat = is_background(spreads)
        self._counts += torch.stack([flat.sum(), flat.new_ones(flat.shape).sum()]).to(self._counts)

    def take(self) -> Tensor:
        """Return how many patches were background since the last call, and how many there were, (2,)."""
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        return counts

    def uniform_entropy(self, output: Output) -> Tensor:
        """Return the entropy of a uniform attention, (B,) nats; it is 0 for a model that learns no attention."""
        if not self._attends or not output.phases:
            return torch.zeros_like(output.entropy)
        return uniform_entropy(output.phases).to(output.entropy)


def is_background(spreads: Tensor) -> Tensor:
    """Tell by their spreads (`nested_ats.models.patches.spread`) which patches are background: (P,) -> (P,) bool."""
    return spreads < _FLAT**2
