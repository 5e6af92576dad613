"""What a training step costs on scenes from 1 megapixel to 4 gigapixels, and on all patches as far as that goes.

The model is the default one, its depth chosen by the rule of `nested_ats.levels_for`. Weights are untrained, so that
attention is nearly even and draws go everywhere: the worst case for reading. A step is forward, loss and backward on
one scene (no optimizer), and opens the slide anew, so that metadata and shard indexes are read within it. The page
cache is warm. Sizes take turns. Peak memory is torch's, beyond what it held before; "resident" is what a process of
its own grew by while it opened the slide and made steps (Linux).

Scenes are pyramids of ours on disk, with every shard there: one block of noise repeated, equal shards hard links to
one file. Deep MIL sees all patches of a grid without overlap; sizes that would pass the limits are not run.

    python benchmarks/cost_size.py [--sides 1024 4096 8192 32768 65536] [--repeats 25] [--mil-seconds 90]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from nested_ats import DeepMIL, DeepMILConfig, ModelConfig, NestedATS, levels_for
from nested_ats.profiling import peak_bytes, training_step
from pipeline.data.slides import SlideImage
from pipeline.interrupt import run_main
from storage import Slide, processors, write_pyramid
from storage.format.ome_zarr import LevelInfo, metadata_files, parse_pyramid, with_shards
from storage.format.shard import encode_shard
from storage.images.halving import downsample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nested_ats import ImageModel

BLOCK = 4096  # pixels, side of what is repeated; a multiple of a shard
SMALLEST, PATCH = 64, 64  # pixels: sides of the last level of a pyramid, and of a patch
REFERENCE = 8192  # pixels, side of the scene that the others are compared with
CPU = torch.device("cpu")


@dataclass
class Step:
    """What one size costs; bytes and seconds."""

    side: int
    downsamples: tuple[float, ...]  # of the attention's levels
    seconds: float
    opening: float  # of these seconds
    peak: int
    resident: int
    read: float
    metadata: int  # of what was read
    requests: float


@dataclass
class AllPatches:
    """What Deep MIL costs at one size; bytes and seconds."""

    side: int
    patches: int
    seconds: float
    peak: int


def write_tiled(target: Path, side: int, block: int = BLOCK) -> Path:
    """Write the pyramid of a scene of `side` pixels, a multiple of the block's side, which it repeats."""
    period = min(side, block)
    pixels = np.random.default_rng(0).integers(0, 256, (3, period, period), np.uint8)
    write_pyramid(target.with_suffix(".one"), pixels[:, :64, :64])  # for its layout and metadata
    info = parse_pyramid(lambda key: (target.with_suffix(".one") / key).read_bytes(), str(target))
    levels: list[LevelInfo] = []
    while not levels or levels[-1].shape[1] > SMALLEST:
        scale, size = 2 ** len(levels), side >> len(levels)
        level = replace(
            info.levels[0],
            path=str(len(levels)),
            shape=(3, size, size),
            scale_yx=(float(scale), float(scale)),
            translation_yx=((scale - 1) / 2, (scale - 1) / 2),
        )
        levels.append(_write_level(target, level, pixels))
        pixels = downsample(pixels)
    for key, data in metadata_files(replace(info, levels=tuple(levels))).items():
        (target / key).write_bytes(data)
    return target


def _write_level(target: Path, level: LevelInfo, block: NDArray[np.uint8]) -> LevelInfo:
    """Write the shards of a level that repeats `block`, each kind once, and return it with their table."""
    period, shard = block.shape[1], level.layout.shard
    kinds: dict[tuple[int, ...], tuple[Path, tuple[int, int, int]]] = {}
    table = []
    for row, column in np.ndindex(level.shard_grid):
        file = target / level.shard_key(row, column)
        file.parent.mkdir(parents=True, exist_ok=True)
        h, w = level.shard_shape(row, column)
        kind = (row * shard % period, column * shard % period, h, w)
        if kind in kinds:
            os.link(kinds[kind][0], file)
        else:
            y, x = (np.arange(start, start + length) % period for start, length in zip(kind[:2], (h, w), strict=True))
            encoded = encode_shard(block[:, y[:, None], x], level.layout)
            file.write_bytes(b"".join(encoded.pieces))
            kinds[kind] = file, (encoded.length, encoded.crc32, int.from_bytes(encoded.pieces[-1], "little"))
        table.append(kinds[kind][1])
    return with_shards(level, *zip(*table, strict=True))


def make_model(side: int) -> NestedATS:
    """Return the default model with the levels of the rule."""
    torch.manual_seed(0)
    levels = levels_for((side, side), patch_size=PATCH)
    return NestedATS(ModelConfig(levels=levels, patch_size=PATCH), in_channels=3, classes=4)


def measure_steps(paths: dict[int, Path], repeats: int) -> list[Step]:
    """Measure a training step on every scene, in turns."""
    models = {side: make_model(side) for side in paths}
    runs: dict[int, list[tuple[float, float, int, int, int]]] = {side: [] for side in paths}
    for number in range(repeats + 1):
        for side, path in paths.items():
            models[side].zero_grad()
            started = time.perf_counter()
            with Slide(path) as slide:
                opening, metadata = time.perf_counter() - started, slide.statistics.bytes_read
                training_step(models[side], [SlideImage(slide)], number)
                seconds, read = time.perf_counter() - started, slide.statistics
            runs[side].append((seconds, opening, read.bytes_read, metadata, read.requests))
    steps = []
    for side, path in paths.items():
        seconds, opening, read_bytes, metadata, requests = map(median, zip(*runs[side][1:], strict=True))
        downsamples = tuple(level.downsample for level in models[side].config.levels)
        peak, grown = peak_of_step(models[side], path), resident(side, path)
        steps.append(Step(side, downsamples, seconds, opening, peak, grown, read_bytes, int(metadata), requests))
    return steps


def peak_of_step(model: ImageModel, path: Path) -> int:
    """Peak memory that torch allocates in a training step."""
    model.zero_grad()
    with Slide(path) as slide:
        image = SlideImage(slide)
        return peak_bytes(lambda: training_step(model, [image], 0), CPU)


def resident(side: int, path: Path) -> int:
    """Bytes by which a fresh process grows at most."""
    command = [sys.executable, __file__, "--resident", str(path), "--sides", str(side)]
    # Whatever is freed goes back to the system at once, so that steps before do not hide what a step needs.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    # In a session of its own Ctrl-C reaches this process alone, which then ends it.
    done = subprocess.run(
        command, env=os.environ | fixed, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True
    )
    return int(done.stdout)


def grow(side: int, path: Path, steps: int = 5) -> int:
    """Bytes by which this process grows at most while it opens a slide and makes steps."""
    model = make_model(side)
    with Slide(path) as slide:  # what is loaded at first use is not the step's
        training_step(model, [SlideImage(slide)], 0)
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = psutil.Process().memory_info().rss
    with Slide(path) as slide:
        for number in range(1, steps + 1):
            model.zero_grad()
            training_step(model, [SlideImage(slide)], number)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before


def measure_all_patches(paths: dict[int, Path], limit: float) -> list[AllPatches]:
    """Measure Deep MIL from the smallest scene on, as far as a step takes `limit` seconds and memory suffices."""
    torch.manual_seed(0)
    model = DeepMIL(DeepMILConfig(patch_size=PATCH, stride=PATCH), in_channels=3, classes=4)
    done: list[AllPatches] = []
    for side, path in paths.items():
        if done:
            larger = (side / done[-1].side) ** 2
            if done[-1].seconds * larger > limit or done[-1].peak * larger > 0.7 * psutil.virtual_memory().available:
                break
        with Slide(path) as slide:
            image = SlideImage(slide)
            seconds = []
            for number in range(1 if done else 2):  # the first step of all warms up
                model.zero_grad()
                started = time.perf_counter()
                training_step(model, [image], number)
                seconds.append(time.perf_counter() - started)
        done.append(AllPatches(side, (side // PATCH) ** 2, seconds[-1], peak_of_step(model, path)))
    return done


def print_tables(steps: Sequence[Step], patches: Sequence[AllPatches]) -> None:
    """Print the costs and their ratios to the reference."""
    base = next((step for step in steps if step.side == REFERENCE), steps[0])
    print(f"nested attention sampling, batch 1; in brackets: of the scene of {base.side} x {base.side}")
    ways = {"seconds": ("step ms", 1e3), "peak": ("peak MB", 1e-6), "resident": ("resident MB", 1e-6)}
    ways |= {"read": ("MB read", 1e-6)}
    print(f"{'side':>6}  {'levels':14}{''.join(f'{title:>16}' for title, _ in ways.values())}  requests  of ms open")
    for step in steps:
        cells = [
            f"{getattr(step, name) * unit:9.1f} ({getattr(step, name) / getattr(base, name):4.2f})"
            for name, (_, unit) in ways.items()
        ]
        levels = ", ".join(f"{scale:g}" for scale in step.downsamples)
        print(f"{step.side:6}  {levels:14}{''.join(cells)}{step.requests:10.0f}{step.opening * 1e3:12.1f}")
    if patches:
        print("Deep MIL over all patches, as far as it can go; in brackets: of sampling at the same side")
        print(f"{'side':>6}{'patches':>9}{'step ms':>20}{'peak MB':>20}")
    for each in patches:
        own = next(step for step in steps if step.side == each.side)
        print(
            f"{each.side:6}{each.patches:9}{each.seconds * 1e3:11.0f} ({each.seconds / own.seconds:6.1f})"
            f"{each.peak * 1e-6:11.0f} ({each.peak / own.peak:6.1f})"
        )


def main() -> None:
    """Make the scenes, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 4096, 8192, 32768, 65536], help="powers of 2")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--mil-seconds", type=float, default=90, help="longest step of Deep MIL; 0: none is made")
    parser.add_argument("--folder", type=Path, help="where scenes are made for a while; they need 0.7 GB")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--resident", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        print(grow(args.sides[0], args.resident))
        return
    machine = f"{platform.machine()}, {processors()} processors, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numcodecs", "numpy"))
    print(machine, versions, sep="\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        paths = {side: write_tiled(Path(name, f"{side}.zarr"), side) for side in sorted(args.sides)}
        steps = measure_steps(paths, args.repeats)
        patches = measure_all_patches(paths, args.mil_seconds) if args.mil_seconds else []
    print_tables(steps, patches)
    if args.json:
        tables = {"sampling": [asdict(step) for step in steps], "deep_mil": [asdict(each) for each in patches]}
        args.json.write_text(json.dumps({"machine": machine, "versions": versions} | tables, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
