"""Enumerate what a sampler can draw, to prove that an estimator is unbiased without simulation.

Shape letters: K units, M outcomes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nested_ats.sampling import Method


def outcomes(method: Method, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """List all outcomes of `draw` on one row of weights.

    Parameters
    ----------
    method
        The sampler.
    weights
        (K,) double, more than n of them positive; units of weight zero are never drawn.
    n
        How many units are drawn.

    Returns
    -------
    noise, probabilities
        (M, noise_size) to hand to `draw`, a row for each of the M outcomes, and (M,), which sum to one.
    """
    w = weights / weights.sum()
    units = w.nonzero().flatten().tolist()
    if method == "multinomial":
        upper = w.cumsum(0)
        middle = upper - w / 2
        drawn = torch.tensor(list(itertools.product(units, repeat=n)))
        return middle[drawn], w[drawn].prod(-1)
    if method == "desraj":
        drawn = torch.tensor(list(itertools.permutations(units, n)))
        before = w[drawn].cumsum(-1) - w[drawn]
        probabilities = (w[drawn] / (1 - before)).prod(-1)
        # Gumbel scores that order the units as wanted: log w - log(-log u) = -place.
        place = torch.full((len(drawn), len(w)), float(len(w)), dtype=w.dtype)
        place.scatter_(-1, drawn, torch.arange(n, dtype=w.dtype).expand(len(drawn), n))
        return torch.exp(-w * place.exp()).clamp_max(1 - 2.0**-53), probabilities
    if method == "pivotal":
        return _pivotal_outcomes(w, n)
    # systematic: the outcome changes where the cumulated probabilities pass an integer; u is uniform in between.
    breaks = _systematic_breaks(w, n)
    return ((breaks[:-1] + breaks[1:]) / 2)[:, None], breaks.diff()


def _systematic_breaks(w: Tensor, n: int) -> Tensor:
    pi = inclusion(w[w > 0], n)
    parts = (pi * (pi < 1)).cumsum(0) % 1.0
    return torch.cat([parts, torch.tensor([0.0, 1.0], dtype=w.dtype)]).sort().values


def _pivotal_outcomes(w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Each way in which the units of positive weight can be drawn one after another, by Deville's description.

    In interval i the unit across its lower border, of which ``before`` lies below and ``after`` above, is drawn
    with probability ``after / (1 - before)`` if it was not drawn in interval i - 1, and never if it was.
    """
    pi = inclusion(w, n) * (w > 0)
    pi = pi * (pi < 1)
    certain = n - round(float(pi.sum()))
    upper = pi.cumsum(0)
    paths: list[tuple[list[float], float, int]] = [([], 1.0, -1)]  # noise, probability, unit drawn last
    for i in range(n - certain):
        grown: list[tuple[list[float], float, int]] = []
        parts = (torch.minimum(upper, torch.tensor(i + 1.0)) - (upper - pi).clamp_min(i)).tolist()  # in the interval
        for past, chance, last in paths:
            lower = next(k for k, end in enumerate(upper.tolist()) if end > i + 1e-12)
            after, before = parts[lower], float(pi[lower]) - parts[lower]
            if last == lower:
                start, again = 0.0, after  # the rest of the interval, in proportion
            else:
                start = again = after / (1 - before) if before > 1e-12 else 0.0
                if again > 0:
                    grown.append(([*past, again / 2], chance * again, lower))
                again = after if before > 1e-12 else 0.0
            density = (1 - start) / (1 - again)
            for unit, part in enumerate(parts):
                if part > 1e-12 and not (unit == lower and (before > 1e-12 or last == lower)):
                    width = part * density
                    grown.append(([*past, start + width / 2], chance * width, unit))
                    start += width
        paths = grown
    noise = torch.tensor([[*each, *[0.5] * certain] for each, _, _ in paths], dtype=w.dtype)
    return noise, torch.tensor([chance for _, chance, _ in paths], dtype=w.dtype)


def inclusion(w: Tensor, n: int) -> Tensor:
    """Inclusion probabilities (K,) of `systematic`: proportional to weight, capped at one by repeated capping."""
    capped = torch.zeros_like(w, dtype=torch.bool)
    while True:
        rest = w[~capped].sum()
        pi = torch.where(capped, 1.0, (n - capped.sum()) * w / rest)
        over = (pi >= 1 - 1e-12) & ~capped  # rounding leaves some just below one
        if not over.any():
            return pi
        capped |= over
