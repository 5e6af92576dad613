"""``draw`` alone: 32 lists of K cells, 32 units each, every method, against ``torch.multinomial``.

The peer draws iid (with replacement) or one by one (without), from the same weights, but keyed by the state of a
generator instead of by image, and without z. Medians of several runs.

    python benchmarks/sampling_draw.py [--cells 10000 1000000] [--repeats 9] [--device cpu]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from nested_ats import draw
from nested_ats.sampling import METHODS
from pipeline.interrupt import run_main

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, UNITS = 32, 32


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'K':>8}  {'way':24}{'ms':>9}{'of torch.multinomial, same replacement':>42}")
    for cells in args.cells:
        weights = torch.randn(BATCH, cells, device=args.device).softmax(-1)
        keys = torch.arange(BATCH, device=args.device)
        peers = {
            replacement: seconds(
                partial(torch.multinomial, weights, UNITS, replacement=replacement), args.repeats, args.device
            )
            for replacement in (True, False)
        }
        for method in METHODS:
            took = seconds(partial(draw, weights, UNITS, method=method, keys=keys), args.repeats, args.device)
            ratio = took / peers[method == "multinomial"]
            print(f"{cells:8}  {method:24}{1e3 * took:9.2f}{ratio:41.2f}x")
        for replacement, took in peers.items():
            print(f"{cells:8}  {'torch, ' + ('with' if replacement else 'without'):24}{1e3 * took:9.2f}{1:41.2f}x")


if __name__ == "__main__":
    run_main(main)
