"""Attention sampling against Deep MIL and CNNs at the paper's three image sizes (sections 4.2 to 4.4, appendix H).

Time of forward and backward pass, patch extraction included, and peak memory for training with Adam, of one image
(section 4.1.2); the paper's own figures stand beside ours. Theirs are from TensorFlow on a GPU, so ratios are what to
compare. The optimizer does not run: the parameters and its two numbers for each are added to what a step allocates.
Images are noise, in pyramids of ours on disk (page cache warm); the view that attention looks at is of the paper's
size. The networks are ours: group for batch normalisation, and the strides of ResNet-16, which the paper leaves open.

    python benchmarks/cost_models.py [--tasks mnist colon speed] [--repeats 5] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nested_ats import CNNConfig, DeepMILConfig, LevelConfig, ModelConfig, build_model, step_cost
from pipeline.data.slides import SlideImage
from pipeline.interrupt import run_main
from storage import Slide, processors, write_pyramid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from nested_ats import AnyConfig


@dataclass(frozen=True)
class Paper:
    """What the paper's tables 1 and 2 give."""

    milliseconds: float
    megabytes: float


@dataclass(frozen=True)
class Method:
    """One line of a table."""

    name: str
    config: AnyConfig
    paper: Paper | None = None  # none for Megapixel MNIST, where there is no table


@dataclass(frozen=True)
class Task:
    """One of the paper's data sets; the first method is what the others are compared with."""

    title: str
    shape: tuple[int, int, int]  # (C, H, W)
    view: tuple[int, int]  # of the coarse view
    classes: int
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Figures:
    """What a method costs for one image."""

    seconds: float
    step_bytes: int  # peak beyond what is held between steps
    held_bytes: int  # parameters and Adam's moments

    @property
    def peak_bytes(self) -> int:
        """For training."""
        return self.step_bytes + self.held_bytes


class Views:
    """A ``nested_ats`` image of the levels of a slide and of one more, a slide that shows it at any other size."""

    def __init__(self, slide: Slide, view: Slide) -> None:
        full, small = SlideImage(slide), SlideImage(view)
        self._reads = [(full, level) for level in range(len(full.shapes))] + [(small, 0)]
        self.shapes = [image.shapes[level] for image, level in self._reads]
        self.downsamples = [*full.downsamples, slide.shape_yx[0] / view.shape_yx[0]]

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """(N, C, h, w) pixels."""
        image, own = self._reads[level]
        return image.read(own, boxes)


def sampling(n: int, downsample: float, *, channels: tuple[int, ...], stride: int, **patches: Any) -> ModelConfig:
    """Return the paper's model: one level of attention, N patches."""
    level = LevelConfig(downsample=downsample, samples=n, channels=channels, stride=stride)
    return ModelConfig(levels=(level,), **patches)


MNIST: dict[str, Any] = {
    "downsample": 1500 / 180,
    "channels": (8, 8),
    "stride": 1,
    "patch_size": 50,
    "encoder": "lenet",
}
COLON: dict[str, Any] = {
    "downsample": 500 / 100,
    "channels": (8, 8),
    "stride": 1,
    "patch_size": 27,
    "encoder": "ilse",
}
SPEED: dict[str, Any] = {
    "downsample": 960 / 288,
    "channels": (8, 16, 32),
    "stride": 8,
    "patch_size": 100,
    "encoder": "resnet8",
}

TASKS = {
    "mnist": Task(
        "Megapixel MNIST, 1500 x 1500",
        (1, 1500, 1500),
        (180, 180),
        10,
        (
            Method("ATS-10", sampling(10, **MNIST)),
            Method("ATS-5", sampling(5, **MNIST)),
            Method("ATS-50", sampling(50, **MNIST)),
            Method("CNN 1", CNNConfig(encoder="resnet16")),
        ),
    ),
    "colon": Task(
        "colon cancer, 500 x 500",
        (3, 500, 500),
        (100, 100),
        2,
        (
            Method("ATS-10", sampling(10, **COLON), Paper(1.8, 21)),
            Method("ATS-50", sampling(50, **COLON), Paper(4.5, 26)),
            Method("CNN 0.5", CNNConfig(encoder="resnet8", downsample=2), Paper(4.8, 65)),
            Method("CNN 1", CNNConfig(encoder="resnet8"), Paper(18.7, 250)),
            Method("Deep MIL", DeepMILConfig(encoder="ilse", patch_size=27, stride=10), Paper(48.5, 644)),
        ),
    ),
    "speed": Task(
        "speed limits, 960 x 1280",
        (3, 960, 1280),
        (288, 384),
        4,
        (
            Method("ATS-5", sampling(5, **SPEED), Paper(8.5, 86)),
            Method("ATS-10", sampling(10, **SPEED), Paper(10.3, 118)),
            Method("CNN 0.3", CNNConfig(encoder="resnet16", downsample=960 / 288), Paper(6.6, 86)),
            Method("CNN 0.5", CNNConfig(encoder="resnet16", downsample=2), Paper(15.6, 239)),
            Method("CNN 1", CNNConfig(encoder="resnet16"), Paper(64.2, 958)),
            Method("Deep MIL", DeepMILConfig(encoder="resnet8", patch_size=100, stride=80), Paper(97.2, 1497)),
        ),
    ),
}


def measure(task: Task, repeats: int, device: str) -> list[Figures]:
    """Cost of every method of a task, in order."""
    rng = np.random.default_rng(0)
    costs: list[Figures] = []
    with tempfile.TemporaryDirectory() as name:
        full, view = Path(name, "full.zarr"), Path(name, "view.zarr")
        write_pyramid(full, rng.integers(0, 256, task.shape, np.uint8))
        write_pyramid(view, rng.integers(0, 256, (task.shape[0], *task.view), np.uint8))
        with Slide(full) as slide, Slide(view) as small:
            image = Views(slide, small)
            for method in task.methods:
                torch.manual_seed(0)
                model = build_model(method.config, in_channels=task.shape[0], classes=task.classes)
                cost = step_cost(model.to(device), [image], repeats=repeats)
                held = 3 * sum(parameter.nbytes for parameter in model.parameters())
                costs.append(Figures(cost.seconds, cost.peak_bytes, held))
    return costs


def print_table(task: Task, costs: Sequence[Figures]) -> None:
    """Print costs and their ratios to the first method, and the paper's."""
    base, paper_base = costs[0], task.methods[0].paper
    print(f"\n{task.title}; in brackets: of {task.methods[0].name}")
    print(f"{'method':10}{'ms':>10}{'':10}{'MB':>9}{'':10}{'paper ms':>10}{'':10}{'MB':>7}")
    for method, cost in zip(task.methods, costs, strict=True):
        line = (
            f"{method.name:10}{cost.seconds * 1e3:10.1f} ({cost.seconds / base.seconds:6.2f}) "
            f"{cost.peak_bytes / 1e6:9.1f} ({cost.peak_bytes / base.peak_bytes:6.2f}) "
        )
        if method.paper and paper_base:
            line += (
                f"{method.paper.milliseconds:10.1f} ({method.paper.milliseconds / paper_base.milliseconds:6.2f}) "
                f"{method.paper.megabytes:7.0f} ({method.paper.megabytes / paper_base.megabytes:6.2f})"
            )
        print(line.rstrip())


def figures(task: Task, costs: Sequence[Figures]) -> dict[str, Any]:
    """Return the figures of a task as plain values."""
    return {
        method.name: asdict(cost) | {"paper": asdict(method.paper) if method.paper else None}
        for method, cost in zip(task.methods, costs, strict=True)
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    machine = f"{name}, {processors()} processors, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numcodecs", "numpy"))
    print(machine, versions, sep="\n")
    tables = {}
    for key in args.tasks:
        costs = measure(TASKS[key], args.repeats, args.device)
        print_table(TASKS[key], costs)
        tables[key] = figures(TASKS[key], costs)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "versions": versions} | tables, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
