"""Whole training steps over one slide, its patches read by ``Slide``, tensorstore or zarr-python.

What decides between readers is not their speed alone but how long a step waits for them. Each step draws regions and
patches from 16 views of an 8192 x 8192 slide, as ``pipeline.training.trainer`` does (coarse views, regions and
patches read in threads), and ends with the optimizer's update; readers take turns. "reading" is the sum over threads.

    python benchmarks/storage_step.py [--size 8192] [--steps 15] [--pyramid PATH]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from storage_convert import make_slide

from nested_ats import LevelConfig, ModelConfig, NestedATS, attention_sampling_loss
from pipeline.interrupt import run_main
from storage import Slide, convert, processors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Reader = Callable[[int, NDArray[np.int64]], NDArray[np.generic]]

BATCH = 16


class Pyramid:
    """A ``nested_ats`` image over any function that reads boxes of a level; keeps time."""

    def __init__(self, slide: Slide, read: Reader) -> None:
        self.shapes = [level.shape_yx for level in slide.levels]
        self.downsamples = [level.downsample for level in slide.levels]
        self.seconds = 0.0
        self._read = read

    def read(self, level: int, boxes: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) pixels."""
        started = time.perf_counter()
        pixels = self._read(level, boxes.numpy())
        self.seconds += time.perf_counter() - started
        return torch.from_numpy(pixels)


def readers(path: Path, slide: Slide) -> dict[str, Reader]:
    """Functions from a level and (N, 4) boxes to (N, C, h, w) pixels, zero outside the image."""
    import tensorstore
    import zarr

    specs = [
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{i}"}} for i in range(len(slide.levels))
    ]
    stores = [tensorstore.open(spec).result() for spec in specs]
    arrays: list[Any] = [zarr.open_array(path / str(i), mode="r") for i in range(len(slide.levels))]

    def with_tensorstore(level: int, boxes: NDArray[np.int64]) -> NDArray[np.generic]:
        cuts = [_cut(box, slide.levels[level].shape_yx) for box in boxes.tolist()]
        reads = [stores[level][:, y0:y1, x0:x1].read() for _, (y0, y1, x0, x1) in cuts]
        return _paste([(place, read.result()) for (place, _), read in zip(cuts, reads, strict=True)], boxes)

    def with_zarr(level: int, boxes: NDArray[np.int64]) -> NDArray[np.generic]:
        cuts = [_cut(box, slide.levels[level].shape_yx) for box in boxes.tolist()]
        return _paste([(place, arrays[level][:, y0:y1, x0:x1]) for place, (y0, y1, x0, x1) in cuts], boxes)

    return {"Slide": slide.read_many, "tensorstore": with_tensorstore, "zarr": with_zarr}


def _cut(box: list[int], shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Where a box's inner part lies in the box, and in the image."""
    y, x, h, w = box
    y0, x0 = min(max(y, 0), shape[0]), min(max(x, 0), shape[1])
    return (y0 - y, x0 - x), (y0, max(y0, min(y + h, shape[0])), x0, max(x0, min(x + w, shape[1])))


def _paste(parts: list[tuple[tuple[int, int], NDArray[np.generic]]], boxes: NDArray[np.int64]) -> NDArray[np.generic]:
    h, w = boxes[0, 2:]
    out = np.zeros((len(parts), parts[0][1].shape[0], h, w), parts[0][1].dtype)
    for own, ((top, left), pixels) in zip(out, parts, strict=True):
        own[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return out


def make_model(patch: int) -> NestedATS:
    """Two levels: the image at downsample 16, regions of 64 x 64 at downsample 4; 64 patches a slide."""
    torch.manual_seed(0)
    levels = (
        LevelConfig(downsample=16, stride=8, samples=8, channels=(8, 8)),
        LevelConfig(downsample=4, size=64, stride=8, samples=8, channels=(8, 8)),
    )
    return NestedATS(ModelConfig(levels=levels, patch_size=patch), in_channels=3, classes=3)


def step(
    model: NestedATS, optimizer: torch.optim.Optimizer, image: Pyramid, number: int, threads: ThreadPoolExecutor
) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    views = list(threads.map(model.coarse_view, [image] * BATCH))
    keys = torch.arange(BATCH) + BATCH * number
    output = model([image] * BATCH, keys, views=views, readers=threads)
    labels = torch.arange(BATCH) % 3
    loss, _ = attention_sampling_loss(output.logits, labels, output.entropy, entropy_weight=0.01)
    optimizer.zero_grad()
    torch.autograd.backward(loss.mean())
    optimizer.step()
    return time.perf_counter() - started


def compare(path: Path, patch: int, steps: int) -> None:
    """Print the median step with each reader."""
    with Slide(path) as slide, ThreadPoolExecutor(8) as threads:
        images = {name: Pyramid(slide, read) for name, read in readers(path, slide).items()}
        models = {name: make_model(patch) for name in images}
        optimizers = {name: torch.optim.Adam(model.parameters()) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in images}
        for number in range(steps + 1):
            for name, image in images.items():
                if number == 1:
                    image.seconds = 0.0
                seconds[name].append(step(models[name], optimizers[name], image, number, threads))
    medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
    for name, median in medians.items():
        reading = images[name].seconds / steps
        ratio = median / medians["Slide"]
        print(f"{patch:6}{name:>13}{median:10.3f}{reading:11.3f}{ratio:10.2f}")


def main() -> None:
    """Make a pyramid if none is given, and print steps and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--pyramid", type=Path)
    args = parser.parse_args()
    packages = ("torch", "numcodecs", "tensorstore", "zarr", "numpy")
    print(f"{platform.machine()}, {processors()} processors")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as name:
        path = args.pyramid
        if path is None:
            path = Path(name, "slide.ome.zarr")
            make_slide(Path(name, "slide.tif"), args.size)
            convert(Path(name, "slide.tif"), path)
        print(f"{'patch':>6}{'reader':>13}{'s a step':>10}{'reading s':>11}{'of Slide':>10}")
        for patch in (64, 256):
            compare(path, patch, args.steps)


if __name__ == "__main__":
    run_main(main)
