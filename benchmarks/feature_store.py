"""Epochs with a frozen encoder: features kept in a store, against encoding anew, and extracting all tiles first.

Sixteen pyramids of 1024 x 1024 pixels, MobileNetV2 at 64 pixels, 32 patches a slide and epoch, one attention map.
*cells of a patch*: what is drawn lies on a grid of patches, 256 a slide; *built-in levels*: on the grid of the finest
attention map, 4096 a slide, where a patch seldom comes again before the attention has settled. The peer encodes every
tile once, and then trains gated attention (Ilse et al. 2018) over the features of all of them, held in memory.

    python benchmarks/feature_store.py [--weights ../shared/data/weights/mobilenet_v2-b0353104.pth] [--epochs 6]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nested_ats import build_model, levels_for
from nested_ats.cells import image_cells
from nested_ats.models.patches import PatchModel
from pipeline.config import Config, parse_config
from pipeline.data.features import DiskFeatures
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.interrupt import run_main
from pipeline.runs import read_metrics
from pipeline.training.train import train
from storage import Slide, write_pyramid

SLIDES, SIDE, PATCH, SAMPLES, BATCH = 16, 1024, 64, 32, 4
WIDTH = 1281  # numbers of a patch in the store


def make_slides(folder: Path) -> list[Entry]:
    """Pyramids of coloured noise of two kinds."""
    rng, entries = np.random.default_rng(0), []
    for number in range(SLIDES):
        grain = (4, 16)[number % 2]
        small = rng.integers(0, 256, (3, SIDE // grain, SIDE // grain), dtype=np.uint8)
        path = folder / f"{number}.ome.zarr"
        write_pyramid(path, small.repeat(grain, 1).repeat(grain, 2), mpp=0.5)
        entries.append(Entry(slide_id=str(number), path=str(path), label=str(grain), split="train"))
    return entries


def configure(weights: Path | None, epochs: int, folder: Path | None, *, fine: bool = False) -> Config:
    """A frozen MobileNetV2 under one level of attention, whose cells are a patch or as the built-in levels' are."""
    patch_cells = {"downsample": 8, "stride": PATCH // 8, "samples": SAMPLES}
    built_in = [asdict(level) for level in levels_for((SIDE, SIDE), samples=SAMPLES)]
    values: dict[str, Any] = {
        "model": {
            "levels": built_in if fine else [patch_cells],
            "patch_size": PATCH,
            "encoder": {"name": "mobilenet_v2"} | ({"weights": str(weights.absolute())} if weights else {}),
            "trainable": "none",
        },
        "train": {"epochs": epochs, "batch_size": BATCH, "early_samples": 1},
        "data": {"features": folder and {"folder": str(folder)}},
    }
    return parse_config(values, "benchmark")


def run(entries: list[Entry], config: Config, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each epoch, and the share of its patches that were in the store."""
    train(entries, config, folder)
    lines = read_metrics(folder)
    return [line["seconds"] for line in lines], [line.get("stored", 0.0) for line in lines]


def extract(entries: list[Entry], config: Config) -> tuple[float, list[torch.Tensor]]:
    """Seconds to encode every tile of every slide, and the features."""
    model = build_model(config.model, in_channels=3, classes=2).eval()
    assert isinstance(model, PatchModel)
    began, bags = time.perf_counter(), []
    with torch.no_grad():
        for entry in entries:
            with Slide(entry.path) as slide:
                image = SlideImage(slide)
                centers, _ = image_cells([image], float(PATCH))
                bags.append(model.encode([image], centers)[0])
    return time.perf_counter() - began, bags


def attend(bags: list[torch.Tensor], epochs: int) -> float:
    """Seconds of an epoch of gated attention over all features, the median."""
    width = bags[0].shape[1]
    tanh, gate = nn.Linear(width, 128), nn.Linear(width, 128)
    weigh, head = nn.Linear(128, 1), nn.Linear(width, 2)
    parameters = [p for part in (tanh, gate, weigh, head) for p in part.parameters()]
    optimizer, times = torch.optim.AdamW(parameters), []
    for _ in range(epochs):
        began = time.perf_counter()
        for start in range(0, len(bags), BATCH):
            bag = torch.stack(bags[start : start + BATCH])
            attention = weigh(tanh(bag).tanh() * gate(bag).sigmoid()).softmax(1)
            labels = torch.arange(start, start + len(bag)) % 2
            loss = nn.functional.cross_entropy(head((attention * bag).sum(1)), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def look_up(folder: Path, patches: int = 512) -> tuple[float, float]:
    """Seconds to put and to get the rows of so many patches of one slide, medians of nine slides."""
    store, puts, gets = DiskFeatures(folder, 10**9), [], []
    places = torch.arange(2 * patches).reshape(patches, 2)
    rows = torch.rand(patches, WIDTH)
    for name in "abcdefghi":
        began = time.perf_counter()
        store.put(name, places, rows)
        middle = time.perf_counter()
        store.get(name, places, WIDTH)
        puts.append(middle - began)
        gets.append(time.perf_counter() - middle)
    return statistics.median(puts), statistics.median(gets)


def main() -> None:
    """Print times, shares and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of MobileNetV2; without, random ones, which take as long")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = make_slides(folder)
        anew, _ = run(entries, configure(args.weights, args.epochs, None), folder / "anew")
        once, shares = run(entries, configure(args.weights, args.epochs, folder / "kept"), folder / "once")
        again, _ = run(entries, configure(args.weights, args.epochs, folder / "kept"), folder / "again")
        fine, few = run(entries, configure(args.weights, 2, folder / "fine", fine=True), folder / "built-in")
        extraction, bags = extract(entries, configure(args.weights, 1, None))
        epoch = attend(bags, args.epochs)
        put, get = look_up(folder / "rows")
    anew_each = statistics.median(anew)
    print(f"encoded anew: {anew_each:.2f} s an epoch")
    for number, (seconds, share) in enumerate(zip(once, shares, strict=True), start=1):
        print(f"  store, epoch {number}: {seconds:.2f} s, {seconds / anew_each:.2f}x; {share:.0%} of patches stored")
    print(f"  store, second run: {statistics.median(again):.2f} s, {statistics.median(again) / anew_each:.2f}x")
    print(f"  built-in levels, epoch 2: {fine[1]:.2f} s; {few[1]:.0%} of patches stored")
    total = extraction + args.epochs * epoch
    print(f"extract first: {extraction:.2f} s, then {epoch:.2f} s an epoch, {args.epochs} epochs in {total:.2f} s")
    print(
        f"  store, {args.epochs} epochs: {sum(once):.2f} s, {sum(once) / total:.2f}x; anew {sum(anew) / total:.2f}x"
    )
    tile = extraction / (len(bags) * len(bags[0]))
    print(f"512 patches: put {1e3 * put:.1f} ms, get {1e3 * get:.1f} ms; encoding them {512e3 * tile:.0f} ms")
    print(f"  get is {get / (512 * tile):.4f}x of encoding, put {put / (512 * tile):.4f}x")


if __name__ == "__main__":
    run_main(main)
