"""What a model answers: classes, several labels at once, grades in an order, a number, or survival.

A target says how many numbers the head has, which loss they are trained with, what they mean as answers, and on which
scale an answer is nearly linear in them, which is where its sampling error is symmetric.

Shape letters: B batch, Q numbers of the head, A answers, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nested_ats.heads import Head, OrdinalHead


@dataclass(frozen=True)
class Target:
    """What all targets have in common.

    Attributes
    ----------
    kind
        By which a target is named in files.
    loss_name
        The name of what `loss` returns.
    probabilities
        Whether answers are probabilities.
    countable
        Whether answers are right or wrong (`right`).
    """

    kind: ClassVar[str]
    loss_name: ClassVar[str] = "cross_entropy"
    probabilities: ClassVar[bool] = True
    countable: ClassVar[bool] = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the A answers."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Q."""
        return len(self.names)

    def head(self, features: int, scale: float) -> Head:
        """Make the layer from features to the Q numbers; `scale` is a factor of the features."""
        return Head(features, self.outputs, scale)

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), from (B, Q) numbers of the head and what is true (see the target)."""
        raise NotImplementedError

    def answers(self, logits: Tensor) -> Tensor:
        """Turn numbers of the head into answers: (..., Q) -> (..., A)."""
        raise NotImplementedError

    def linear(self, logits: Tensor) -> Tensor:
        """Answers on the scale that is nearly linear in the features: (..., Q) -> (..., A) float64."""
        raise NotImplementedError

    def from_linear(self, values: Tensor) -> Tensor:
        """Answers of values on that scale: (..., A) -> (..., A)."""
        return values.sigmoid()

    def right(self, logits: Tensor, truth: Tensor) -> Tensor | None:
        """Return how right each sample is, (B,) in [0, 1]; None where answers are not right or wrong."""
        del logits, truth
        return None

    def guess(self, truth: Tensor) -> Tensor:
        """Return the numbers of the head, (Q,), of the best answer that is the same for all samples.

        Parameters
        ----------
        truth
            What is true of the training samples, as `loss` takes it.
        """
        raise NotImplementedError

    @property
    def plain(self) -> dict[str, Any]:
        """The target as plain values, from which `read_target` makes an equal one."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class Classes(Target):
    """One class of several; ``truth`` is (B,) int64, the number of the class."""

    kind: ClassVar[str] = "classes"
    countable: ClassVar[bool] = True
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where names are missing or occur twice."""
        _check_names(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.classes

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(logits, truth, reduction="none")

    def answers(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the classes."""
        return logits.softmax(-1)

    def linear(self, logits: Tensor) -> Tensor:
        """Return the logit of each class against the rest."""
        logits = logits.double()  # their differences are small
        own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
        rest = logits[..., None, :].masked_fill(own, -torch.inf).logsumexp(-1)
        return logits - rest

    def right(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return whether the class of the highest probability is the true one."""
        return (logits.argmax(-1) == truth).to(logits.dtype)

    def guess(self, truth: Tensor) -> Tensor:
        """Return the logarithms of the frequencies of the classes."""
        counts = torch.bincount(truth, minlength=self.outputs)
        return (counts / counts.sum()).clamp_min(1e-12).log()


@dataclass(frozen=True)
class Ordinal(Classes):
    """One class of several in an order, lowest first; ``truth`` is (B,) int64, the number of the class.

    The head is that of the proportional odds model (McCullagh, 1980): P(class > k) = sigmoid(f - threshold_k) with
    one score f and ordered thresholds. What it returns are the logarithms of the probabilities of the classes, so
    that everything else is as for classes.
    """

    kind: ClassVar[str] = "ordinal"

    def head(self, features: int, scale: float) -> Head:
        """Make a head of one score and ordered thresholds."""
        return OrdinalHead(features, self.outputs, scale)


@dataclass(frozen=True)
class MultiLabel(Target):
    """Several labels, each there or not; ``truth`` is (B, Q) of 1, 0, and NaN where it is not known."""

    kind: ClassVar[str] = "multilabel"
    countable: ClassVar[bool] = True
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where names are missing or occur twice."""
        _check_names(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.labels

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over the labels that are known."""
        known = ~truth.isnan()
        each = functional.binary_cross_entropy_with_logits(logits, truth.nan_to_num(0.0), reduction="none")
        return (each * known).sum(-1) / known.sum(-1).clamp_min(1)

    def answers(self, logits: Tensor) -> Tensor:
        """Return the probability of each label."""
        return logits.sigmoid()

    def linear(self, logits: Tensor) -> Tensor:
        """Return the logits."""
        return logits.double()

    def right(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the share of the known labels that are right."""
        known = ~truth.isnan()
        return (((logits > 0) == (truth > 0.5)) & known).sum(-1) / known.sum(-1).clamp_min(1)

    def guess(self, truth: Tensor) -> Tensor:
        """Return the logits of the frequencies of the labels."""
        return truth.nanmean(0).clamp(1e-6, 1 - 1e-6).logit()


@dataclass(frozen=True)
class Regression(Target):
    """A number; ``truth`` is (B,), in its own unit.

    Parameters
    ----------
    mean, std
        Of the training samples: the head's one number is in this scale.
    """

    kind: ClassVar[str] = "regression"
    loss_name: ClassVar[str] = "squared_error"
    probabilities: ClassVar[bool] = False
    mean: float
    std: float

    def __post_init__(self) -> None:
        """Raise ValueError where the spread is not positive."""
        if not self.std > 0:
            raise ValueError("std: must be positive")

    @property
    def names(self) -> tuple[str, ...]:
        """The one answer."""
        return ("value",)

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the squared error in units of the variance of the training samples: 1 is what guessing has."""
        return (logits[..., 0] - (truth - self.mean) / self.std).square()

    def answers(self, logits: Tensor) -> Tensor:
        """Return the number in its own unit."""
        return logits * self.std + self.mean

    def linear(self, logits: Tensor) -> Tensor:
        """Return the number in its own unit."""
        return self.answers(logits.double())

    def from_linear(self, values: Tensor) -> Tensor:
        """Return the values as they are."""
        return values

    def guess(self, truth: Tensor) -> Tensor:
        """Return the mean."""
        return ((truth.mean() - self.mean) / self.std)[None]


@dataclass(frozen=True)
class Cox(Target):
    """The logarithm of a hazard ratio (Cox, 1972); ``truth`` is (B, 2): cumulative baseline hazard, and the event.

    With the baseline hazard of Breslow (1974) held fixed (`cumulative_hazard`) the log-likelihood is a sum over
    samples whose gradient is that of the partial likelihood, so samples of one step need not be together.
    """

    kind: ClassVar[str] = "cox"
    loss_name: ClassVar[str] = "partial_likelihood"
    probabilities: ClassVar[bool] = False

    @property
    def names(self) -> tuple[str, ...]:
        """The one answer."""
        return ("risk",)

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the negative log-likelihood, but for what does not depend on the logits."""
        hazard, event = truth.unbind(-1)
        return hazard * logits[..., 0].exp() - event * logits[..., 0]

    def answers(self, logits: Tensor) -> Tensor:
        """Return the log hazard ratio."""
        return logits

    def linear(self, logits: Tensor) -> Tensor:
        """Return the log hazard ratio."""
        return logits.double()

    def from_linear(self, values: Tensor) -> Tensor:
        """Return the values as they are."""
        return values

    def guess(self, truth: Tensor) -> Tensor:
        """Return the log ratio of the events to those that the baseline expects."""
        return (truth[:, 1].sum() / truth[:, 0].sum().clamp_min(1e-12)).clamp_min(1e-12).log()[None]


@dataclass(frozen=True)
class DiscreteSurvival(Target):
    """Survival past the end of each interval of time, by discrete hazards.

    ``truth`` is (B, 2): the number of the interval in which the event happened and 1; or, where it was not seen, the
    number of the intervals that were survived and 0.

    Parameters
    ----------
    times
        Ends of the Q intervals, increasing, in the unit of the table.
    """

    kind: ClassVar[str] = "survival"
    loss_name: ClassVar[str] = "likelihood"
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where times do not increase from above 0."""
        steps = zip((0.0, *self.times), self.times, strict=False)
        if not self.times or not all(before < after < float("inf") for before, after in steps):
            raise ValueError("times: must increase from above 0")

    @property
    def names(self) -> tuple[str, ...]:
        """Survival past each of the times."""
        return tuple(f"survival_{time:g}" for time in self.times)

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the negative log-likelihood of discrete hazards (Kvamme and Borgan, 2021, equation 5)."""
        interval, event = truth.long().unbind(-1)
        number = torch.arange(logits.shape[-1], device=logits.device)
        at_risk = number < (interval + event)[..., None]
        happens = ((number == interval[..., None]) & (event[..., None] > 0)).to(logits.dtype)
        each = functional.binary_cross_entropy_with_logits(logits, happens, reduction="none")
        return (each * at_risk).sum(-1)

    def answers(self, logits: Tensor) -> Tensor:
        """Return the probability of surviving each interval and all before it."""
        return functional.logsigmoid(-logits).cumsum(-1).exp()

    def linear(self, logits: Tensor) -> Tensor:
        """Return the logit of each probability."""
        log_survival = functional.logsigmoid(-logits.double()).cumsum(-1)
        return log_survival - torch.log1p(-log_survival.exp().clamp_max(1 - 1e-15))

    def guess(self, truth: Tensor) -> Tensor:
        """Return the logits of the hazards over all samples."""
        interval, event = truth.long().unbind(-1)
        number = torch.arange(self.outputs, device=truth.device)
        at_risk = (number < (interval + event)[:, None]).sum(0)
        events = ((number == interval[:, None]) & (event[:, None] > 0)).sum(0)
        return (events / at_risk.clamp_min(1)).clamp(1e-6, 1 - 1e-6).logit()

    def intervals(self, times: Tensor, events: Tensor) -> Tensor:
        """Make ``truth`` of times and events, (B,) each.

        A time without an event counts up to the last interval that it reaches the end of. An event after the last
        time counts as none, at the last time.
        """
        ends = torch.tensor(self.times, dtype=torch.float64, device=times.device)
        times = times.double()
        happened = (events > 0) & (times <= ends[-1])
        numbers = torch.where(happened, torch.bucketize(times, ends), torch.bucketize(times, ends, right=True))
        return torch.stack([numbers, happened.long()], -1)


KINDS_OF_TARGETS: dict[str, type[Target]] = {
    target.kind: target for target in (Classes, Ordinal, MultiLabel, Regression, Cox, DiscreteSurvival)
}


def read_target(plain: Mapping[str, Any]) -> Target:
    """Make a target of plain values, as `Target.plain` returns them.

    Raises
    ------
    ValueError, TypeError, KeyError
        The values describe none.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return KINDS_OF_TARGETS[str(values.pop("kind"))](**values)


def as_target(classes: int | Target) -> Target:
    """Return the target itself, or that of so many classes, which are named by their numbers."""
    return classes if isinstance(classes, Target) else Classes(tuple(map(str, range(classes))))


def cumulative_hazard(times: Tensor, log_risks: Tensor, events: Tensor, at: Tensor) -> Tensor:
    """Cumulative baseline hazard of Breslow (1974): the sum of 1 / (sum of risks still at risk) over events.

    Parameters
    ----------
    times, log_risks, events
        (N,) each, of the training samples; events are 1 where the event was seen, and 0 where it was not.
    at
        (B,) times.

    Returns
    -------
    (B,) float64: the hazard of events up to and at these times. Events at one time share its risk set.
    """
    order = times.argsort(descending=True, stable=True)
    ordered = times[order].double()
    at_risk = log_risks[order].double().logcumsumexp(0)
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1  # of those with an equal time
    steps = (events[order] > 0) * (-at_risk[last]).exp()
    summed = functional.pad(steps.flip(0).cumsum(0), (1, 0))
    return summed[torch.searchsorted(ordered.flip(0), at.double().contiguous(), right=True)]


def _check_names(names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{list(names)!r}: must be different names")
