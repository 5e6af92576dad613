"""Do error bars hold? Coverage of intervals at equal cost, and wrong stops of ``--target-error``.

Slides are trees of 64 regions of 64 leaves, as in `sampling_variance`: features of the slide, its regions and its
leaves, attention of four entropies. 64 regions and 128 patches (``--budget``) are drawn of each, in 1, 2, 3, 4 or 8
draws. Heads are scaled until the true logits of the classes scatter over the slides by 1 (mild), 4 (steep) or 16
(saturated).

Coverage is the share of slides and classes whose interval holds what the model that draws nothing would say; "old" is
the probability +-1.96 standard errors. A wrong stop claims an error of at most 0.02 before the budget of 32 draws (of
16 regions and 32 patches) is spent, and is wrong by more than 0.25; "old" stops by the standard error. Seeds are
fixed: the numbers repeat.

    python benchmarks/interval_coverage.py [--method systematic] [--repeats 24] [--budget 64 128]
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import NamedTuple

import torch
from sampling_variance import ENTROPIES, C, R, phase
from torch import Tensor, nn

from nested_ats.estimators import expectation
from nested_ats.evaluation import Head, estimate, expected_error
from nested_ats.sampling import METHODS, Method, fold_in
from pipeline.interrupt import run_main

D, TREES = 8, 48
REGIONS, PATCHES = 64, 128  # of one prediction, shared by its draws; the default model has 32 and 32
DRAWS = (1, 2, 3, 4, 8)
HEADS = {"mild": 1.0, "steep": 4.0, "saturated": 16.0}
CLASSES = (2, 5)
TARGET, LEAST, BUDGET, WRONG = 0.02, 4, 32, 0.25


class Forest(NamedTuple):
    """Log-attention (T, R) and (T, R, C), features (T, R, C, D), and the F of each tree (T, D)."""

    outer: Tensor
    inner: Tensor
    features: Tensor
    truth: Tensor


def make_forest(entropy: float) -> Forest:
    """Return trees whose attention has that entropy on average, found by scaling random logits."""
    rng = torch.Generator().manual_seed(0)
    outer, inner = torch.randn(TREES, R, generator=rng), torch.randn(TREES, R, C, generator=rng)
    sizes = {(1, 1): 0.3, (R, 1): 1.0, (R, C): 0.7}
    parts = [size * torch.randn(TREES, *shape, D, generator=rng) for shape, size in sizes.items()]
    features = nn.functional.normalize((parts[0] + parts[1] + parts[2]).relu(), dim=-1)
    low, high = 0.0, 10.0
    for _ in range(30):
        scale = (low + high) / 2
        regions, cells = (outer * scale).log_softmax(-1), (inner * scale).log_softmax(-1)
        leaves = regions[..., None] + cells
        mean = -(leaves.exp() * leaves).sum((1, 2)).mean()
        low, high = (scale, high) if mean > entropy else (low, scale)
    return Forest(regions, cells, features, (leaves.exp()[..., None] * features).sum((1, 2)))


def f_hat(forest: Forest, trees: Tensor, budget: tuple[int, int], keys: Tensor, method: Method) -> Tensor:
    """One draw of regions, then of leaves, from each of (B,) trees: (B, D)."""
    first = phase(forest.outer[trees][:, None], None, budget[0], method, fold_in(keys, 0))
    regions = first.drawn.indices
    last = phase(forest.inner[trees[:, None], regions], first, budget[1], method, fold_in(keys, 1))
    own = regions.gather(1, last.drawn.indices // C)
    return expectation(last.attention, forest.features[trees[:, None], own, last.drawn.indices % C], last.z)


def f_hats(forest: Forest, trees: Tensor, budget: tuple[int, int], draws: int, method: Method) -> Tensor:
    """Independent draws, (M, B, D)."""
    keys = torch.arange(len(trees)) * BUDGET + draws * 10**9
    return torch.stack([f_hat(forest, trees, budget, keys + number, method) for number in range(draws)]).double()


def make_head(truth: Tensor, classes: int, scale: float) -> nn.Linear:
    """Linear head under which the logits of the (T, D) features scatter by `scale` around zero."""
    rng = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, D, generator=rng, dtype=torch.float64)
    weight = weight - weight.mean(0)
    logits = truth.double() @ weight.T
    head = nn.Linear(D, classes, dtype=torch.float64).requires_grad_(False)
    size = scale / logits.std(0).mean()
    head.weight.copy_(weight * size)
    head.bias.copy_(-logits.mean(0) * size)
    return head


def coverage(head: Head, features: Tensor, truth: Tensor) -> tuple[float, float, float, float]:
    """Root mean square error of the probabilities; coverage of the old and the new interval, and its mean width."""
    found, wanted = estimate(head, features), head(truth).softmax(-1)
    off = (found.answers - wanted).abs()
    old = (off <= 1.96 * found.standard_error).double().mean()
    new = ((found.low <= wanted) & (wanted <= found.high)).double().mean()
    return float(off.square().mean().sqrt()), float(old), float(new), float((found.high - found.low).mean())


def stops(head: Head, features: Tensor, truth: Tensor) -> dict[str, tuple[float, float, float]]:
    """Share of wrong stops, draws used and coverage of the interval at the end: by the old rule and the new one."""
    wanted = head(truth).softmax(-1)
    going = {rule: torch.ones(len(truth), dtype=torch.bool) for rule in ("old", "new")}
    ends = {rule: torch.zeros(len(truth), 3, dtype=torch.float64) for rule in going}
    for draws in range(LEAST, BUDGET + 1):
        drawn = features[:draws]
        found = estimate(head, drawn)
        wrong = ((found.answers - wanted).abs().amax(-1) > WRONG) & (draws < BUDGET)
        holds = ((found.low <= wanted) & (wanted <= found.high)).double().mean(-1)
        now = torch.stack([wrong.double(), torch.full_like(holds, draws), holds], -1)
        for rule, error in (("old", found.standard_error), ("new", expected_error(head, drawn))):
            done = going[rule] & ((error.amax(-1) <= TARGET) | (draws == BUDGET))
            ends[rule][done] = now[done]
            going[rule] &= ~done
    return {rule: tuple(each.mean(0).tolist()) for rule, each in ends.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="pivotal")
    parser.add_argument("--repeats", type=int, default=24, help="predictions of each of the trees")
    parser.add_argument("--budget", type=int, nargs=2, default=(REGIONS, PATCHES), help="regions and patches")
    args = parser.parse_args()
    regions, patches = args.budget
    torch.set_num_threads(1)
    began = time.monotonic()
    trees = torch.arange(TREES).repeat(args.repeats)
    print(f"{platform.machine()}, torch {torch.__version__}, {args.method}, {len(trees)} predictions a cell\n")
    cells = {}
    for name, entropy in ENTROPIES.items():
        forest = make_forest(entropy)
        truth = forest.truth[trees].double()
        shared = {m: f_hats(forest, trees, (regions // m, patches // m), m, args.method) for m in DRAWS}
        many = f_hats(forest, trees, (16, 32), BUDGET, args.method)
        for classes in CLASSES:
            for kind, scale in HEADS.items():
                head = make_head(forest.truth, classes, scale)
                cells[classes, name, kind] = (
                    [coverage(head, shared[m], truth) for m in DRAWS],
                    stops(head, many, truth),
                )
    print(f"{regions} regions and {patches} patches in M draws: root mean square error, coverage old, new, width")
    print_coverage({where: found for where, (found, _) in cells.items()})
    print_stops({where: found for where, (_, found) in cells.items()})
    print(f"\n{time.monotonic() - began:.0f} s")


Where = tuple[int, str, str]


def print_coverage(cells: dict[Where, list[tuple[float, float, float, float]]]) -> None:
    """Print one line a population and head, four numbers for each number of draws, and their means and ranges."""
    print(f"{'':26}M = 1" + "".join(f"{f'M = {m}':>26}" for m in DRAWS[1:]))
    for where, found in cells.items():
        print(_label(where) + f"{found[0][0]:7.4f}" + "".join(_four(each) for each in found[1:]))
    every = torch.tensor(list(cells.values()), dtype=torch.float64)  # (lines, draws, 4)
    print(f"{'mean':24}{every[:, 0, 0].mean():7.4f}" + "".join(_four(each) for each in every[:, 1:].mean(0).tolist()))
    for kind, limit in (("least", every.amin(0)), ("most", every.amax(0))):
        print(f"{kind:24}{limit[0, 0]:7.4f}" + "".join(_four(each) for each in limit[1:].tolist()))
    print("error relative to one draw, geometric mean: ", end="")
    print(", ".join(f"M = {m} {r:.2f}" for m, r in zip(DRAWS, _geometric(every[..., 0], 0), strict=True)))
    print("width relative to four draws, geometric mean: ", end="")
    print(", ".join(f"M = {m} {r:.2f}" for m, r in zip(DRAWS[1:], _geometric(every[:, 1:, 3], 2), strict=True)))


def _geometric(values: Tensor, base: int) -> list[float]:
    """Geometric mean over lines of (lines, draws) values, relative to those of one column."""
    ratios: list[float] = (values / values[:, base : base + 1]).log().mean(0).exp().tolist()
    return ratios


def print_stops(cells: dict[Where, dict[str, tuple[float, float, float]]]) -> None:
    """Print one line a population and head, and the means by head."""
    print(f"\nstops at {TARGET}, {LEAST} to {BUDGET} draws of (16, 32): wrong, draws, coverage of the interval then")
    print(f"{'':24}{'old':>22}{'new':>24}")
    groups = {kind: [found for where, found in cells.items() if where[2] == kind] for kind in HEADS}
    lines = [(_label(where), [found]) for where, found in cells.items()]
    lines += [(f"{'mean, ' + kind:24}", found) for kind, found in groups.items()]
    for label, found in lines:
        text = ""
        for rule in ("old", "new"):
            wrong, draws, holds = torch.tensor([each[rule] for each in found]).mean(0).tolist()
            text += f"{wrong:10.2%}{draws:7.1f}{holds:7.3f}"
        print(label + text)


def _label(where: Where) -> str:
    classes, name, kind = where
    return f"{classes} {name + ', ' + kind:22}"


def _four(found: tuple[float, float, float, float]) -> str:
    error, old, new, width = found
    return f"{error:9.4f}{old:6.3f}{new:6.3f}{width:6.3f}"[1:]


if __name__ == "__main__":
    run_main(main)
