"""Draw a few units of a large population so that totals stay unbiased.

One rule serves every sampler: it returns units S and, for each, a number ``z`` with
``E[sum over S of z_i y_i] = sum of all y_i`` for every population ``y``. Whatever is built on that rule is
unbiased for the value, and automatic differentiation of ``sum stop_gradient(z_i) a_i f_i`` is unbiased for the
gradient, at any depth and without a hand-written backward pass (see `nested_ats.expectation`).

Shape letters: B batch, K units of the population, n units drawn.

The random numbers are a pure function of a key (SplitMix64), so that the same slide draws the same patches
whatever its batch and its worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nested_ats.errors import ImpossibleWeightsError

Method = Literal["systematic", "desraj", "multinomial"]
METHODS: tuple[Method, ...] = get_args(Method)

# SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers, whose products wrap as unsigned ones do.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# A unit this close to certain is taken for certain: below it, rounding could draw it twice.
_NEARLY_CERTAIN = 1 - 1e-9


class Draw(NamedTuple):
    """Units drawn from each row of a population, in increasing order of index.

    Attributes
    ----------
    indices
        (B, n) int64, in [0, K). Where a row has fewer than n units to give, the empty slots come last, repeat
        a drawn index (so that they cost no extra read) and have z = 0.
    z
        (B, n) of the weights' type, in float32 at least (double for integers), >= 0, without gradient;
        ``sum z_i y_i`` over the n slots is unbiased for ``sum y_i`` over K.
    """

    indices: Tensor
    z: Tensor


def draw(
    weights: Tensor,
    n: int,
    *,
    method: Method = "systematic",
    keys: Tensor | None = None,
    noise: Tensor | None = None,
) -> Draw:
    """Draw `n` units of every row, with a probability that grows with their weight.

    Parameters
    ----------
    weights
        (B, K), non-negative, at least one positive in each row; they need not sum to one. Order matters to
        `systematic`: neighbours in the list share a stratum, so list cells along a space-filling curve
        (`nested_ats.geometry.curve_order`).
    n
        Units to draw, >= 1. A row with at most n positive weights gives them all, each with z = 1.
    method
        ``systematic``: fixed size, without replacement, inclusion probability proportional to weight and
        capped at 1, z = 1 / probability (Madow 1949). ``desraj``: Gumbel top-n, the mean of the n Des Raj
        estimators; the last of them is the paper's equations 14-17. ``multinomial``: independent draws with
        replacement, z = 1 / (n a), the paper's equation 4.
    keys
        (B,) int64, one a row: equal keys and weights draw equal units. Default: from torch's generator.
    noise
        (B, `noise_size(method, K, n)`) in [0, 1), the uniform numbers themselves instead of `keys`.

    Raises
    ------
    ImpossibleWeightsError
        A negative, NaN or infinite weight, or a row without a positive one; also a ValueError.
    ValueError
        `n` < 1, an unknown method, or wrong shapes.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    w = weights.detach().double()
    if w.ndim != 2 or not w.shape[-1] or (keys is not None and keys.shape != w.shape[:1]):
        raise ValueError(f"weights must be (B, K) with K > 0, and keys (B,), not {tuple(w.shape)}")
    total = w.sum(-1)
    # One reduction checks all four: a negative, a NaN or an infinite weight, and a row of zeros.
    if not bool(((w.amin(-1) >= 0) & (total > 0) & total.isfinite()).all()):
        raise ImpossibleWeightsError("weights must be non-negative and finite, with a positive one in every row")
    size = noise_size(method, w.shape[-1], n)
    if noise is None:
        if keys is None:
            keys = torch.randint(-(2**63), 2**63 - 1, w.shape[:1], device=w.device)
        noise = uniform(keys, size)
    elif noise.shape != (len(w), size):
        raise ValueError(f"noise must be {(len(w), size)} for {method}, not {tuple(noise.shape)}")
    indices, z = _SAMPLERS[method](w, n, noise.double())
    indices, z = _sort(indices, z, w.shape[-1])
    if weights.is_floating_point():  # in bf16, sum z a would be off by a part in a thousand
        z = z.to(torch.promote_types(weights.dtype, torch.float32))
    return Draw(indices, z)


def noise_size(method: Method, population: int, n: int) -> int:
    """Uniform numbers that one row of `draw` takes."""
    return {"systematic": 1, "desraj": population, "multinomial": n}[method]


def uniform(keys: Tensor, count: int) -> Tensor:
    """(B, count) doubles in [0, 1), a pure function of (B,) int64 `keys` (SplitMix64 with the key as state)."""
    counter = torch.arange(1, count + 1, device=keys.device)
    bits = _mix(keys[:, None] + counter * _GOLDEN)
    return _shift_right(bits, 11).double() * 2.0**-53


def fold_in(keys: Tensor, number: int) -> Tensor:
    """Derive new (B,) keys for the `number`-th stream of each key."""
    return _mix(_mix(keys) + torch.tensor(number + 1, device=keys.device) * _GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask drops the copies of the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _systematic(w: Tensor, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    k = min(n, w.shape[-1])
    top, top_index = w.topk(k, dim=-1)  # (B, k)
    others = w.scatter(-1, top_index, 0.0)
    # rest[:, j] is what remains when the j largest are gone; summed upwards, so no cancellation. (B, k + 1)
    rest = torch.cat([top.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(top[:, :1])], -1)
    rest = rest + others.sum(-1, keepdim=True)
    left = n - torch.arange(k, device=w.device)
    certain = ((left * top >= rest[:, :-1] * _NEARLY_CERTAIN) & (top > 0)).cumprod(-1).bool()
    c = certain.sum(-1, keepdim=True)  # (B, 1) units taken for certain
    rest = rest.gather(-1, c)

    pool = others.scatter(-1, top_index, top.masked_fill(certain, 0.0))
    cumulated = pool.cumsum(-1)
    slot = torch.arange(n, device=w.device).expand(w.shape[0], n)
    step = cumulated[:, -1:] / (n - c).clamp_min(1)
    points = (noise[:, :1] + slot - c) * step
    drawn = _locate(cumulated, points, pool)
    z = rest / ((n - c) * pool.gather(-1, drawn))
    z = torch.where(rest > 0, z, 0.0)

    sure = torch.nn.functional.pad(top_index, (0, n - k))
    return torch.where(slot < c, sure, drawn), torch.where(slot < c, 1.0, z)


def _desraj(w: Tensor, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    k = min(n, w.shape[-1])
    gumbel = -torch.log(-torch.log(noise.clamp_min(2.0**-60)))
    indices = (w.log() + gumbel).topk(k, dim=-1).indices  # in the order drawn
    drawn = w.gather(-1, indices)
    others = w.scatter(-1, indices, 0.0).sum(-1, keepdim=True)
    # m[:, j] is the weight not drawn before the j-th draw.
    m = drawn.flip(-1).cumsum(-1).flip(-1) + others
    later = k - 1 - torch.arange(k, device=w.device)
    z = (m / drawn + later) / k
    taken_all = (w > 0).sum(-1, keepdim=True) <= n
    z = torch.where(taken_all, 1.0, z).masked_fill(drawn == 0, 0.0)
    pad = (0, n - k)
    return torch.nn.functional.pad(indices, pad), torch.nn.functional.pad(z, pad)


def _multinomial(w: Tensor, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    cumulated = w.cumsum(-1)
    total = cumulated[:, -1:]
    indices = _locate(cumulated, noise * total, w)
    z = total / (n * w.gather(-1, indices))
    few = (w > 0).sum(-1, keepdim=True) <= n
    if not bool(few.any()):
        return indices, z
    every, ones = _desraj(w, n, torch.zeros_like(w))
    return torch.where(few, every, indices), torch.where(few, ones, z)


def _locate(cumulated: Tensor, points: Tensor, w: Tensor) -> Tensor:
    """Units (B, n) in whose stretch of the (B, K) cumulated weights the (B, n) points fall."""
    found = torch.searchsorted(cumulated, points.contiguous(), right=True).clamp_max(w.shape[-1] - 1)
    if bool((w.gather(-1, found) > 0).all()):
        return found
    # Rounding may put a point past the total, or a parallel sum into a stretch of no length: the unit before it.
    units = torch.arange(w.shape[-1], device=w.device).expand_as(w)
    drawable = torch.where(w > 0, units, 0).cummax(-1).values
    return drawable.gather(-1, found)


def _sort(indices: Tensor, z: Tensor, population: int) -> tuple[Tensor, Tensor]:
    # Empty slots last, as repeats of the first drawn index.
    place, order = torch.where(z > 0, indices, population).sort(-1)
    z = z.gather(-1, order)
    return torch.where(z > 0, place, place[:, :1]), z


_SAMPLERS: dict[Method, Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]] = {
    "systematic": _systematic,
    "desraj": _desraj,
    "multinomial": _multinomial,
}
