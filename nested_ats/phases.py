"""A phase of the model: the cells that a level looked at, and those that were drawn.

Shape letters: B batch, n drawn units, k cells of one map, D features, Q classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nested_ats.sampling import Draw

Sampler = Callable[[Tensor, int, Tensor], Draw]
Rows = TypeVar("Rows")


class Population(NamedTuple):
    """The units that a phase may draw, in the order of a space-filling curve.

    Attributes
    ----------
    log_attention
        (B, n, k): log-probability of each cell within its own view, -inf where there is no cell.
    centers_l0
        (B, n, k, 2) float64: centre of each cell in level-0 pixels, y and x.
    extent_l0
        Side of a cell in level-0 pixels.
    cells
        (B, n, k, g, g): logits of the g x g cells of the attention map within each unit; a drawn unit hands them on
        to the next level. None where there is no next level.
    """

    log_attention: Tensor
    centers_l0: Tensor
    extent_l0: float
    cells: Tensor | None = None


class Phase(NamedTuple):
    """What one level looked at and drew.

    Attributes
    ----------
    population
        The cells of every view of this level.
    drawn
        Indices into the (n k) cells, and the z of this phase alone.
    attention
        (B, n) product of the attention along the path to each drawn unit, with gradient.
    z
        (B, n) product of z along the path.
    carry
        (B, parents): z a, without gradient, of the views that the population lies in.
    centers_l0
        (B, n, 2) float64.
    """

    population: Population
    drawn: Draw
    attention: Tensor
    z: Tensor
    carry: Tensor
    centers_l0: Tensor


class Output(NamedTuple):
    """What a model returns.

    Attributes
    ----------
    logits
        (B, Q).
    entropy
        (B,) nats: estimate of the entropy of the attention over all leaves; zero where there is no attention.
    features
        (B, D): F_hat, the estimate of the expected feature, which the head sees.
    phases
        One for each level, coarse to fine; the last one's units are the patches. Empty where there is no attention.
    """

    logits: Tensor
    entropy: Tensor
    features: Tensor
    phases: tuple[Phase, ...]


class Leaves(NamedTuple):
    """Some of the leaves of one image: units of the last level, on which patches are centred.

    Attributes
    ----------
    centers_l0
        (n, 2) float64: centres in level-0 pixels, y and x.
    attention
        (n,): product of the attention along the path to each; over all leaves of an image it sums to 1.
    done
        Share of the work on the image that is done with these.
    """

    centers_l0: Tensor
    attention: Tensor
    done: float


def draw_phase(
    population: Population, attention: Tensor, z: Tensor, sampler: Sampler, samples: int, keys: Tensor
) -> Phase:
    """Draw jointly from the cells of all views, given the (B, n) attention and z along the path to each view."""
    within = population.log_attention.exp()  # (B, n, k)
    cells = within.shape[-1]
    carry = (z * attention).detach()
    drawn = sampler((carry[..., None] * within).detach().flatten(-2), samples, keys)
    parent = drawn.indices // cells
    path = attention.gather(-1, parent) * within.flatten(-2).gather(-1, drawn.indices)
    places = drawn.indices.to(population.centers_l0.device)[..., None].expand(-1, -1, 2)
    centers = population.centers_l0.flatten(1, 2).gather(1, places)
    return Phase(population, drawn, path, z.gather(-1, parent) * drawn.z, carry, centers)


def take_all(weights: Tensor, n: int, keys: Tensor) -> Draw:
    """Take every unit of positive weight with z = 1: the sampler of exact evaluation."""
    del n, keys
    indices = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
    return Draw(indices, (weights > 0).to(weights.dtype))


def leaves_of(phase: Phase) -> Leaves:
    """The units that a last phase has drawn of the first image, where that is all of them."""
    held = phase.z[0] > 0
    return Leaves(phase.centers_l0[0, held.cpu()], (phase.z * phase.attention)[0, held], 1.0)


def take_rows(value: Rows, rows: Tensor) -> Rows:
    """Pick images of a batch from an `Output`, a `Population` or anything made of (B, ...) tensors."""
    taken: Any = value
    if isinstance(value, Tensor):
        taken = value[rows.to(value.device)]
    elif isinstance(value, tuple):
        parts = [take_rows(part, rows) for part in value]
        taken = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return taken  # type: ignore[no-any-return]
