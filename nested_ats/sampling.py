"""Draw a few units of a large population so that totals stay unbiased.

One rule serves every sampler: it returns units S and, for each, a number ``z`` with
``E[sum over S of z_i y_i] = sum of all y_i`` for every population ``y``. Whatever is built on that rule is
unbiased for the value, and automatic differentiation of ``sum stop_gradient(z_i) a_i f_i`` is unbiased for the
gradient, at any depth and without a hand-written backward pass (see `nested_ats.estimators`).

Shape letters: B batch, K units of the population, n units drawn.

The random numbers are a pure function of a key (SplitMix64), so that the same slide draws the same patches
whatever its batch and its worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nested_ats.errors import ImpossibleWeightsError

Method = Literal["pivotal", "systematic", "desraj", "multinomial"]
METHODS: tuple[Method, ...] = get_args(Method)

# SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers, whose products wrap as unsigned ones do.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# A unit this close to certain is taken for certain: below it, rounding could draw it twice.
_NEARLY_CERTAIN = 1 - 1e-9

_TINY = 1e-300  # divisor in place of a length of zero


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
    method: Method = "pivotal",
    keys: Tensor | None = None,
    noise: Tensor | None = None,
) -> Draw:
    """Draw `n` units of every row, with a probability that grows with their weight.

    Parameters
    ----------
    weights
        (B, K), non-negative, at least one positive in each row; they need not sum to one. Order matters to
        `pivotal` and `systematic`: neighbours in the list share a stratum, so list cells along a space-filling curve
        (`nested_ats.cells.curve_order`).
    n
        Units to draw, >= 1. A row with at most n positive weights gives them all, each with z = 1.
    method
        ``pivotal`` and ``systematic``: fixed size, without replacement, inclusion probability proportional to weight
        and capped at 1, z = 1 / probability. `systematic` (Madow 1949) takes points one step apart from one random
        start: what repeats at that step along the list, such as a checkerboard along a Hilbert curve, has many times
        the variance of independent draws. `pivotal` (Deville's systematic sampling, 1998: ordered pivotal sampling)
        takes a random place in each step and cannot resonate. ``desraj``: Gumbel top-n, the mean of the n Des Raj
        estimators; the last of them is the paper's equations 14-17. ``multinomial``: independent draws with
        replacement, z = 1 / (n a), the paper's equation 4.
    keys
        (B,) int64, one for each row: equal keys and weights draw equal units. By default torch draws them.
    noise
        (B, `noise_size(method, K, n)`) in [0, 1), the uniform numbers themselves instead of `keys`.

    Raises
    ------
    ImpossibleWeightsError
        A weight is negative, NaN or infinite, or a row has no positive one; it is a ValueError too.
    ValueError
        `n` is below 1, the method is unknown, or shapes are wrong.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    w = weights.detach()
    if w.dtype not in (torch.float32, torch.float64):
        w = w.to(torch.float32 if w.is_floating_point() else torch.float64)
    if w.ndim != 2 or not w.shape[-1] or (keys is not None and keys.shape != w.shape[:1]):
        raise ValueError(f"weights must be (B, K) with K > 0, and keys (B,), not {tuple(w.shape)}")
    line = _Line(w)
    # These check all four: a negative, a NaN or an infinite weight, and a row of zeros.
    if not bool(((w.amin(-1) >= 0) & (line.length[:, 0] > 0) & line.length[:, 0].isfinite()).all()):
        raise ImpossibleWeightsError("weights must be non-negative and finite, with a positive one in every row")
    size = noise_size(method, w.shape[-1], n)
    if noise is None:
        if keys is None:
            keys = torch.randint(-(2**63), 2**63 - 1, w.shape[:1], device=w.device)
        noise = uniform(keys, size)
    elif noise.shape != (len(w), size):
        raise ValueError(f"noise must be {(len(w), size)} for {method}, not {tuple(noise.shape)}")
    indices, z = _SAMPLERS[method](line, n, noise.double())
    indices, z = _sort(indices, z, w.shape[-1])
    if weights.is_floating_point():  # in bf16, sum z a would be off by a part in a thousand
        z = z.to(torch.promote_types(weights.dtype, torch.float32))
    return Draw(indices, z)


def noise_size(method: Method, population: int, n: int) -> int:
    """How many uniform numbers one row of `draw` takes."""
    return {"pivotal": n, "systematic": 1, "desraj": population, "multinomial": n}[method]


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


class _Line:
    """(B, K) weights laid end to end on a line, of which only the blocks that are asked for are looked into.

    A block of neighbours is as long as its sum in the weights' own precision; its units share that length in
    proportion, in double precision, when the block is opened. A million float32 weights are so summed once, and a
    unit's length, `locate`'s third result, is exactly its probability, however the block's sum was rounded.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.side = 2 ** max(4, round(math.log2(weights.shape[-1]) / 2))  # units in a block
        whole = weights.shape[-1] // self.side * self.side
        blocks = weights[:, :whole].reshape(len(weights), whole // self.side, self.side), weights[:, None, whole:]
        self.sums = torch.cat([each.sum(-1) for each in blocks], -1).double()  # (B, G)
        if not bool(self.sums.isfinite().all()):  # a sum overflows, or a weight is not finite
            self.sums = torch.cat([each.sum(-1, dtype=torch.float64) for each in blocks], -1)
        self._taken: Tensor | None = None  # (B, K) units that are no longer on the line

    @property
    def length(self) -> Tensor:
        """(B, 1)."""
        return self.sums.sum(-1, keepdim=True)

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """Take those units off the line that are certain to be among n drawn in proportion to weight.

        Returns
        -------
        indices, certain
            (B, k) the largest units in turn, k = min(n, K), and (B, 1) how many of these were taken.
        """
        k = min(n, self.weights.shape[-1])
        # A certain unit lies in one of the n longest blocks: n others as long would exceed the whole line.
        blocks = self.sums.topk(min(n, self.sums.shape[-1]), dim=-1).indices
        opened = self._open(blocks)  # (B, p, side)
        top, place = opened.flatten(1).topk(k, dim=-1)  # (B, k)
        others = opened.flatten(1).scatter(-1, place, 0.0)
        outside = self.sums.scatter(-1, blocks, 0.0).sum(-1, keepdim=True) + others.sum(-1, keepdim=True)
        # rest[:, j] is what remains when the j largest are gone; summed upwards, so no cancellation. (B, k)
        rest = top.flip(-1).cumsum(-1).flip(-1) + outside
        left = n - torch.arange(k, device=top.device)
        certain = ((left * top >= rest * _NEARLY_CERTAIN) & (top > 0)).cumprod(-1).bool()
        units = blocks.gather(-1, place // self.side) * self.side + place % self.side
        # A unit that is not certain may lie past the last one; the largest unit stands in for it from here on.
        units = torch.where(certain, units, units[:, :1])
        if bool(certain.any()):
            others = others.scatter(-1, place, top.masked_fill(certain, 0.0)).view_as(opened)
            self.sums = self.sums.scatter(-1, blocks, others.sum(-1))
            self._taken = torch.zeros_like(self.weights, dtype=torch.bool).scatter(
                -1, units, certain[:, :1].expand_as(units)
            )
        return units, certain.sum(-1, keepdim=True)

    def locate(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Units (B, p) in whose stretches (B, p) points fall, where these begin, and how long they are."""
        ends = self.sums.cumsum(-1)
        block = _stretch(ends, points, self.sums)
        length = self.sums.gather(-1, block)
        begin = ends.gather(-1, block) - length
        opened = self._open(block)  # (B, p, side)
        inner = opened.cumsum(-1)
        scale = inner[..., -1] / length.clamp_min(_TINY)  # from the block's own sum to its length on the line
        unit = _stretch(inner, ((points - begin) * scale)[..., None], opened)
        weight, end = opened.gather(-1, unit)[..., 0], inner.gather(-1, unit)[..., 0]
        per = 1 / scale.clamp_min(_TINY)
        return block * self.side + unit[..., 0], begin + (end - weight) * per, weight * per

    def _open(self, blocks: Tensor) -> Tensor:
        """Weights (B, p, side) of (B, p) blocks in double, zero where there is no unit or it was taken."""
        units = (blocks[..., None] * self.side + torch.arange(self.side, device=blocks.device)).flatten(1)
        inside = units < self.weights.shape[-1]
        units = units.clamp_max(self.weights.shape[-1] - 1)
        if self._taken is not None:
            inside &= ~self._taken.gather(-1, units)
        opened = self.weights.gather(-1, units).double().masked_fill(~inside, 0.0)
        return opened.reshape(*blocks.shape, self.side)


def _stretch(ends: Tensor, points: Tensor, lengths: Tensor) -> Tensor:
    """Indices (..., p) of the stretches of positive length in which points fall; ``ends`` are (..., K)."""
    found = torch.searchsorted(ends, points.contiguous(), right=True).clamp_max(ends.shape[-1] - 1)
    if bool((lengths.gather(-1, found) > 0).all()):
        return found
    # Rounding may put a point past the end or into a stretch of no length: take the one before it.
    places = torch.arange(ends.shape[-1], device=ends.device).expand_as(ends)
    return torch.where(lengths > 0, places, 0).cummax(-1).values.gather(-1, found)


def _systematic(line: _Line, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    sure, certain = line.take(n)
    left = n - certain  # (B, 1) units to draw from the line
    slot = torch.arange(n, device=noise.device)
    length = line.length
    indices, _, lengths = line.locate((noise[:, :1] + slot) * (length / left.clamp_min(1)))
    return _with_sure(indices, length / (left * lengths), sure, left, slot)


def _pivotal(line: _Line, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Deville's systematic sampling: one unit from each of n equal intervals of the line, by one number each.

    A unit across the border of two intervals may be drawn in either. Its chance in the second depends on whether it
    was drawn in the first, so that every unit keeps its inclusion probability.
    """
    sure, certain = line.take(n)
    left = n - certain  # (B, 1) intervals
    slot = torch.arange(n, device=noise.device)
    length = line.length
    step = (length / left.clamp_min(1)).clamp_min(_TINY)
    across, begin, lengths = line.locate(slot * step)  # the unit across the lower border of each interval
    before = (slot - begin / step).clamp(0.0, 1.0)  # its share of the interval before
    after = (lengths / step - before).clamp(0.0, 1.0).masked_fill(slot == 0, 0.0)  # and of this one
    ahead = torch.nn.functional.pad(before[:, 1:], (0, 1)).masked_fill(slot >= left - 1, 0.0)
    after_none = (after / (1 - before).clamp_min(_TINY)).clamp_max(1.0)  # its chance here if it was not drawn before
    first = noise < after_none
    free = after + ((noise - after_none) / (1 - after_none).clamp_min(_TINY)).clamp_min(0.0) * (1 - after)
    bound = after + noise * (1 - after)  # the place in the interval if it was drawn before
    upper = ahead > 0
    # Whether the unit across the upper border is drawn, given whether the one across the lower border was.
    drawn = _run(~first & upper & (free >= 1 - ahead), upper & (bound >= 1 - ahead))
    known = torch.nn.functional.pad(drawn[:, :-1], (1, 0))
    place = torch.where(known, bound, free)
    indices, _, found = line.locate((slot + place) * step)
    following = torch.roll(slot, -1)
    for chosen, unit, size in (
        (first & ~known, across, lengths),
        (drawn, across[:, following], lengths[:, following]),
    ):
        indices, found = torch.where(chosen, unit, indices), torch.where(chosen, size, found)
    indices, z = _with_sure(indices, length / (left * found), sure, left, slot)
    # In very rare draws rounding takes a unit across a border twice; these rows are drawn as by `systematic`.
    units, held = _sort(indices, z, line.weights.shape[-1])
    rows = ((units.diff(dim=-1) == 0) & (held[:, 1:] > 0)).any(-1)
    if bool(rows.any()):
        indices[rows], z[rows] = _systematic(_Line(line.weights[rows]), n, noise[rows])
    return indices, z


def _run(if_not: Tensor, if_so: Tensor) -> Tensor:
    """States (B, n) after each of n steps of a chain that starts in the state false.

    ``if_not`` and ``if_so`` are the state after each step, by the state before it. Steps are combined two by two,
    four by four and so on, so that the time is logarithmic in their number.
    """
    shift = 1
    while shift < if_not.shape[-1]:
        earlier_not = torch.nn.functional.pad(if_not[:, :-shift], (shift, 0), value=False)
        earlier_so = torch.nn.functional.pad(if_so[:, :-shift], (shift, 0), value=True)
        if_not, if_so = torch.where(earlier_not, if_so, if_not), torch.where(earlier_so, if_so, if_not)
        shift *= 2
    return if_not


def _with_sure(indices: Tensor, z: Tensor, sure: Tensor, left: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Put drawn units into the first `left` slots and the certain ones into the others."""
    place = (slot - left).clamp_min(0).clamp_max(sure.shape[-1] - 1)
    drawn = slot < left
    return torch.where(drawn, indices, sure.gather(-1, place)), torch.where(
        drawn & z.isfinite(), z, (~drawn).double()
    )


def _desraj(line: _Line, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    w = line.weights.double()
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


def _multinomial(line: _Line, n: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    indices, _, lengths = line.locate(noise * line.length)
    z = line.length / (n * lengths)
    few = (line.weights > 0).sum(-1, keepdim=True) <= n
    if not bool(few.any()):
        return indices, z
    every, ones = _desraj(line, n, torch.zeros_like(line.weights, dtype=torch.float64))
    return torch.where(few, every, indices), torch.where(few, ones, z)


def _sort(indices: Tensor, z: Tensor, population: int) -> tuple[Tensor, Tensor]:
    # Empty slots come last and repeat the first drawn index.
    place, order = torch.where(z > 0, indices, population).sort(-1)
    z = z.gather(-1, order)
    return torch.where(z > 0, place, place[:, :1]), z


_SAMPLERS: dict[Method, Callable[[_Line, int, Tensor], tuple[Tensor, Tensor]]] = {
    "pivotal": _pivotal,
    "systematic": _systematic,
    "desraj": _desraj,
    "multinomial": _multinomial,
}
