"""Variance of F_hat and of its gradient, relative to iid sampling over all leaves (the paper's equation 4).

A tree of 64 regions of 64 leaves, features correlated within a region, 32 patches: flat over all 4096 leaves, or 16
regions and then 32 patches drawn jointly from theirs. "naive" is an independent Des Raj estimator in each of 8
regions, 4 patches each. The gradient is that of a fixed linear function of F_hat by the logits of both levels. Fields
show what a method makes of a pattern along the curve: 8, 16 or 32 of the 64 x 64 cells of a checkerboard and of a
smooth field under even attention, against the variance of as many iid draws. Seeds are fixed: the numbers repeat.

    python benchmarks/sampling_variance.py [--draws 4000]
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nested_ats.cells import curve_order
from nested_ats.estimators import expectation
from nested_ats.phases import Phase, Population, draw_phase
from nested_ats.sampling import Draw, Method, draw, fold_in
from pipeline.interrupt import run_main

R, C, D = 64, 64, 16  # regions, leaves of each, features
PATCHES, REGIONS = 32, 16
BATCH = 500
ENTROPIES = {"flat": 7.5, "medium": 5.9, "peaked": 4.1, "very peaked": 3.1}  # nats, of all leaves


class Tree(NamedTuple):
    """Logits (R,) and (R, C), and features (R, C, D) of unit length."""

    outer: Tensor
    inner: Tensor
    features: Tensor


def make_tree(entropy: float) -> Tree:
    """Return the tree whose attention has that entropy, found by scaling one set of random logits."""
    rng = torch.Generator().manual_seed(0)
    outer, inner = torch.randn(R, generator=rng), torch.randn(R, C, generator=rng)
    features = torch.randn(R, 1, D, generator=rng) + 0.7 * torch.randn(R, C, D, generator=rng)
    low, high = 0.0, 10.0
    for _ in range(50):
        scale = (low + high) / 2
        p = leaves(Tree(outer * scale, inner * scale, features)).exp()
        low, high = (scale, high) if -(p * p.clamp_min(1e-300).log()).sum() > entropy else (low, scale)
    return Tree(outer * scale, inner * scale, torch.nn.functional.normalize(features.relu(), dim=-1))


def leaves(tree: Tree) -> Tensor:
    """Log-attention of all leaves, (R, C)."""
    return tree.outer.log_softmax(-1)[..., :, None] + tree.inner.log_softmax(-1)


def phase(log_attention: Tensor, before: Phase | None, n: int, method: Method, keys: Tensor) -> Phase:
    """Draw n units from (B, views, k) cells."""

    def sampler(weights: Tensor, n: int, keys: Tensor) -> Draw:
        return draw(weights, n, method=method, keys=keys)

    ones = torch.ones(len(keys), 1)
    attention, z = (ones, ones) if before is None else (before.attention, before.z)
    nowhere = torch.zeros(1, 1, 1, 2).expand(*log_attention.shape, 2)
    return draw_phase(Population(log_attention, nowhere, 1.0), attention, z, sampler, n, keys)


def flat(tree: Tree, method: Method, keys: Tensor) -> Tensor:
    """F_hat (B, D) of 32 of all leaves."""
    drawn = phase(leaves(tree).flatten(-2)[:, None], None, PATCHES, method, keys)
    return expectation(drawn.attention, tree.features.flatten(0, 1)[drawn.drawn.indices], drawn.z)


def nested(tree: Tree, method: Method, keys: Tensor) -> Tensor:
    """F_hat (B, D) of 16 regions, then 32 of their leaves, drawn jointly."""
    first = phase(tree.outer.log_softmax(-1)[:, None], None, REGIONS, method, fold_in(keys, 0))
    regions = first.drawn.indices
    opened = tree.inner.log_softmax(-1).gather(1, regions[..., None].expand(-1, -1, C))
    last = phase(opened, first, PATCHES, method, fold_in(keys, 1))
    own = regions.gather(1, last.drawn.indices // C)
    return expectation(last.attention, tree.features[own, last.drawn.indices % C], last.z)


def naive(tree: Tree, method: Method, keys: Tensor) -> Tensor:
    """F_hat (B, D) of 8 regions with an independent estimator of 4 leaves in each."""
    first = phase(tree.outer.log_softmax(-1)[:, None], None, 8, method, fold_in(keys, 0))
    regions = first.drawn.indices
    opened = tree.inner.log_softmax(-1).gather(1, regions[..., None].expand(-1, -1, C))
    own = fold_in(keys, 1)[:, None] + torch.arange(8)
    parts = phase(opened.flatten(0, 1)[:, None], None, 4, method, fold_in(own.flatten(), 2))
    features = tree.features[regions.flatten()[:, None], parts.drawn.indices]
    within = expectation(parts.attention, features, parts.z).unflatten(0, (-1, 8))
    return expectation(first.attention, within, first.z)


WAYS: dict[str, tuple[Callable[[Tree, Method, Tensor], Tensor], Method]] = {
    "iid, flat": (flat, "multinomial"),
    "Des Raj, flat": (flat, "desraj"),
    "systematic, flat": (flat, "systematic"),
    "pivotal, flat": (flat, "pivotal"),
    "naive, 8 x 4": (naive, "desraj"),
    "iid, 16 then 32": (nested, "multinomial"),
    "Des Raj, 16 then 32": (nested, "desraj"),
    "systematic, 16 then 32": (nested, "systematic"),
    "pivotal, 16 then 32": (nested, "pivotal"),
}


def variances(tree: Tree, way: str, draws: int) -> tuple[float, float]:
    """Total variance of F_hat and of its gradient."""
    estimate, method = WAYS[way]
    toward = torch.randn(D, generator=torch.Generator().manual_seed(3))
    values, gradients = [], []
    for start in range(0, draws, BATCH):
        keys = torch.arange(start, start + BATCH) * 7919 + 13
        outer = tree.outer.expand(BATCH, R).clone().requires_grad_()
        inner = tree.inner.expand(BATCH, R, C).clone().requires_grad_()
        value = estimate(Tree(outer, inner, tree.features), method, keys)
        by_outer, by_inner = torch.autograd.grad((value @ toward).sum(), [outer, inner])
        values.append(value.detach())
        gradients.append(torch.cat([by_outer, by_inner.flatten(1)], 1))
    return float(torch.cat(values).var(0).sum()), float(torch.cat(gradients).var(0).sum())


def field_ratio(field: Tensor, n: int, method: Method, draws: int) -> float:
    """Variance of the mean of n cells of a (64, 64) field under even attention, relative to n iid draws."""
    values = field.flatten()[curve_order(*field.shape)]
    even = torch.ones(1, len(values)).expand(BATCH, -1)
    means = []
    for start in range(0, draws, BATCH):
        drawn = draw(even, n, method=method, keys=torch.arange(start, start + BATCH))
        means.append((drawn.z * values[drawn.indices]).sum(-1) / len(values))
    return float(torch.cat(means).var() / (values.var() / n))


def show_fields(draws: int) -> None:
    """Print what patterns do to the variance under even attention."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    fields = {"checkerboard": (y + x) % 2, "smooth": torch.sin(x / 10) + torch.cos(y / 13)}
    print("\nvariance under even attention, relative to as many iid draws")
    columns = [(name, n) for name in fields for n in (8, 16, 32)]
    print(f"{'method':24}" + "".join(f"{name + ', ' + str(n):>18}" for name, n in columns))
    for method in ("pivotal", "systematic"):
        ratios = [field_ratio(fields[name], n, method, draws) for name, n in columns]
        print(f"{method:24}" + "".join(f"{ratio:18.2f}" for ratio in ratios))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print(f"{platform.machine()}, torch {torch.__version__}, {args.draws} draws")
    trees = {name: make_tree(entropy) for name, entropy in ENTROPIES.items()}
    found = {(way, name): variances(tree, way, args.draws) for way in WAYS for name, tree in trees.items()}
    for what, title in enumerate(("F_hat", "gradient")):
        print(f"\nvariance of {title}, relative to iid sampling over all leaves, {PATCHES} patches")
        print(f"{'attention':24}" + "".join(f"{name:>13}" for name in ENTROPIES))
        print(f"{'entropy, nats':24}" + "".join(f"{entropy:13.1f}" for entropy in ENTROPIES.values()))
        for way in WAYS:
            ratios = [found[way, name][what] / found["iid, flat", name][what] for name in ENTROPIES]
            print(f"{way:24}" + "".join(f"{ratio:13.3f}" for ratio in ratios))
    show_fields(args.draws)


if __name__ == "__main__":
    run_main(main)
