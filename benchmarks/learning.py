"""What each choice does to learning: test error at equal patches and epochs, and epochs to 90 % accuracy.

Tasks. *mnist*: Megapixel MNIST at 384 x 384 with 8 noise patches; one level, 10 patches of 50 pixels out of 2304
cells. *signs*: the scenes of ``make demo``, 1024 x 1024; 8 regions, then 8 patches of 64 pixels out of 4096 leaves.
*needles*: one digit of a class among 60 scraps of digits, 512 x 512, two levels.
Arms differ from ``default`` in what their name says and in nothing else: within a seed they start from the same
weights (but ``uniform``, which has no attention) and see the same images in the same order, by the course of training
of `pipeline.course`. Images are the same for all seeds, and held in memory.

"epochs to 90 %" is the first epoch in which the training accuracy, over the draws that trained, is 90 % or more. The
test draws once per image, as the paper does. The authors' gradient is for one level, so only *mnist* has such an arm.

A run is written to the result file when it ends, and a rerun does only what is missing. All is done in one thread; to
let glibc keep freed memory takes a third off the time: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592.

    python benchmarks/learning.py [--digits ../shared/data/mnist] [--tasks mnist signs] [--arms default ...]
                                  [--results FILE] [--show] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from authors_gradient import AuthorsATS
from numpy.typing import NDArray
from torch import Tensor

from nested_ats import (
    ArrayImage,
    LevelConfig,
    ModelConfig,
    NestedATS,
    UniformConfig,
    UniformSampling,
    attention_sampling_loss,
    predict,
)
from nested_ats.base import SamplingModel
from pipeline.config import DEFAULT_LEVELS, TrainConfig
from pipeline.course import PAPERS_COURSE, Kept, clip, entropy_weight, learning_rate, more_samples
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.slides import draw_key
from pipeline.synthetic_mnist import load_pools, mnist_scene
from pipeline.synthetic_signs import LABELS, sign_scene
from pipeline.train import versions

SEEDS = (0, 1, 2)
FIRST_IMAGES = 16  # by which features are standardised
RESULTS = Path(__file__).parent / "results" / "learning_cpu.json"


@dataclass(frozen=True)
class Task:
    """A data set, the model of its ``default`` arm, and how long to train."""

    model: ModelConfig
    channels: int
    classes: int
    size: int  # side of an image in pixels
    train: int
    test: int
    batch: int
    epochs: int

    @property
    def coarsest(self) -> int:
        """Index of the level that the model sees first."""
        return int(math.log2(self.model.downsamples[0]))


_LEVEL = LevelConfig(downsample=4, stride=2, samples=10, channels=(8, 8))
_MNIST = ModelConfig(levels=(_LEVEL,), patch_size=50, mean=0.13, std=0.31)
_NEEDLES = ModelConfig(
    levels=(
        LevelConfig(downsample=8, stride=1, group=8, samples=8),
        LevelConfig(downsample=2, size=32, stride=4, samples=8),
    ),
    patch_size=36,
    mean=0.13,
    std=0.31,
)
_SIGNS = ModelConfig(levels=DEFAULT_LEVELS)
TASKS = {
    "mnist": Task(_MNIST, channels=1, classes=10, size=384, train=2000, test=500, batch=32, epochs=30),
    "needles": Task(_NEEDLES, channels=1, classes=10, size=512, train=2000, test=500, batch=32, epochs=30),
    "signs": Task(_SIGNS, channels=3, classes=4, size=1024, train=700, test=150, batch=16, epochs=45),
}
UNIFORM, AUTHORS = "uniform", "desraj, authors' gradient"


@dataclass(frozen=True)
class Arm:
    """What is changed in the model and in the training."""

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("mnist", "signs", "needles")


ARMS = {
    "default": Arm(),
    "independent levels": Arm({"attention": "independent"}, tasks=("signs", "needles")),
    "features not scaled": Arm({"scale": 1.0}),
    "features standardised": Arm({"standardise": True}),
    "systematic": Arm({"method": "systematic"}),
    "desraj": Arm({"method": "desraj"}),
    "multinomial": Arm({"method": "multinomial"}),
    "as many samples early": Arm(train={"early_samples": 1}),
    "constant learning rate": Arm(train={"schedule": "constant", "warmup": 0.0}),
    "last weights": Arm(train={"average": 0.0}),
    "entropy weight stays": Arm(train={"entropy_fade": 0.0}),
    "gradient not clipped": Arm(train={"clip": 0.0}),
    "the paper's training": Arm({"attention": "independent", "scale": 1.0, "method": "multinomial"}, PAPERS_COURSE),
    AUTHORS: Arm({"method": "desraj", "scale": 1.0}, PAPERS_COURSE, tasks=("mnist",)),
    UNIFORM: Arm(),
}


class ByteImage(ArrayImage):
    """An `ArrayImage` whose levels are bytes, as those of a pyramid on disk are: a quarter of the memory."""

    def __init__(self, levels: list[Tensor]) -> None:
        self._levels = levels
        self._background = 0

    def fill(self, level: int, pixels: Tensor) -> None:
        """Set a level from (C, H, W) pixels in [0, 1]."""
        self._levels[level].copy_((pixels * 255).round())


@dataclass(frozen=True)
class Data:
    """Images and (N,) labels, those to train on first."""

    images: list[ByteImage]
    labels: Tensor
    train: int


def make_data(name: str, task: Task, digits: Path | None) -> Data:
    """Make the images of a task, the same every time."""
    render = {"mnist": mnist_scenes, "signs": sign_scenes, "needles": needle_scenes}[name](task, digits)
    count, sides = task.train + task.test, [task.size >> level for level in range(task.coarsest + 1)]
    # One block a level, and rendered first: what is cached then, between the floats of the levels, would leave the
    # heap in pieces.
    blocks = [torch.empty(count, task.channels, side, side, dtype=torch.uint8) for side in sides]
    labels = torch.tensor([render(index, pixels.numpy()) for index, pixels in enumerate(blocks[0])])
    images = [ByteImage([block[index] for block in blocks]) for index in range(count)]
    for image in images:
        exact = ArrayImage(image.read(0, torch.tensor([[0, 0, task.size, task.size]]))[0], levels=len(sides))
        for level, side in enumerate(sides[1:], start=1):
            image.fill(level, exact.read(level, torch.tensor([[0, 0, side, side]]))[0])
    return Data(images, labels, task.train)


Render = Callable[[int, NDArray[np.uint8]], int]  # fills the (C, H, W) pixels of a number's image, returns its class


def mnist_scenes(task: Task, digits: Path | None) -> Render:
    """Scenes of digits, of which the first four fifths are for training images and the others for test images."""
    files = [digits / f"t10k-{kind}-ubyte.gz" if digits else None for kind in ("images-idx3", "labels-idx1")]
    pools = load_pools(*files)

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        pool = pools[index >= task.train]
        scene = mnist_scene(index, seed=0, pool=pool, size=task.size, noise=8)
        pixels[0] = scene.render(pool)
        return int(scene.label)

    return render


def sign_scenes(task: Task, digits: Path | None) -> Render:
    """Scenes whose labels go round."""
    del digits

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        label = (index if index < task.train else index - task.train) % len(LABELS)
        scene = sign_scene(index, seed=0, size_yx=(task.size, task.size), label=LABELS[label])
        for y in range(0, task.size, 64):
            pixels[:, y : y + 64] = scene.render(y, 0, 64, task.size).transpose(2, 0, 1)
        return label

    return render


def needle_scenes(task: Task, digits: Path | None) -> Render:
    """One whole digit, whose class is the label, among scraps of 14 x 14 pixels of others."""
    files = [digits / f"t10k-{kind}-ubyte.gz" if digits else None for kind in ("images-idx3", "labels-idx1")]
    pools = load_pools(*files)

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        rng = np.random.default_rng([1, index])
        pool = pools[index >= task.train]
        canvas = pixels[0]
        canvas[:] = 0
        for _ in range(60):
            scrap = pool.images[rng.integers(len(pool.images))]
            y, x = rng.integers(scrap.shape[0] - 14, size=2)
            top, left = rng.integers(task.size - 14, size=2)
            canvas[top : top + 14, left : left + 14] = scrap[y : y + 14, x : x + 14]
        chosen = int(rng.integers(len(pool.images)))
        digit = pool.images[chosen]
        top, left = rng.integers(task.size - len(digit), size=2)
        canvas[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
        return int(pool.labels[chosen])

    return render


def make_model(arm: str, task: Task) -> SamplingModel:
    """Model of an arm, with weights by torch's seed."""
    config = replace(task.model, **ARMS[arm].model)
    shapes = {"in_channels": task.channels, "classes": task.classes}
    if arm == UNIFORM:
        last = config.levels[-1]
        pixels = {"patch_size": config.patch_size, "mean": config.mean, "std": config.std}
        return UniformSampling(UniformConfig(samples=last.samples, cell=last.extent_l0, **pixels), **shapes)
    return (AuthorsATS if arm == AUTHORS else NestedATS)(config, **shapes)


def run(arm: str, task: Task, data: Data, seed: int, title: str) -> dict[str, Any]:
    """Train and test one arm with one seed."""
    began = time.process_time()
    torch.manual_seed(seed)
    model = make_model(arm, task)
    course = TrainConfig(epochs=task.epochs, batch_size=task.batch, **ARMS[arm].train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.learning_rate, weight_decay=0.0, eps=1e-6)
    if ARMS[arm].model.get("standardise"):
        look_first(model, course, data, seed)
    kept = Kept(model, course.average)
    curve = []
    for epoch in range(task.epochs):
        curve.append(train_epoch(model, optimizer, kept, course, data, seed, epoch))
        print(f"{title}, epoch {epoch + 1}: {curve[-1]}", flush=True)
    kept.use_best()
    return {
        "test_error": round(test_error(model, task, data, seed), 4),
        "epochs_to_90": next((n for n, point in enumerate(curve, start=1) if point["accuracy"] >= 0.9), None),
        "cpu_seconds": round(time.process_time() - began, 1),
        "curve": {name: [point[name] for point in curve] for name in curve[0]},
    }


@torch.no_grad()
def look_first(model: SamplingModel, course: TrainConfig, data: Data, seed: int) -> None:
    """Set how features are standardised, by patches of the first training images."""
    with model.gather_moments() as moments:
        for row in range(FIRST_IMAGES):
            model([data.images[row]], torch.tensor([draw_key(seed, "first look", row)]), more=course.early_samples)
    model.standardise_by(moments)


def train_epoch(
    model: SamplingModel,
    optimizer: torch.optim.Optimizer,
    kept: Kept,
    course: TrainConfig,
    data: Data,
    seed: int,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images; means over it."""
    model.train()
    count = data.train
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(draw_key(seed, epoch) >> 1))
    sums = torch.zeros(3)
    batches = shuffled.split(course.batch_size)
    for step, rows in enumerate(batches):
        progress = (epoch + (step + 0.5) / len(batches)) / course.epochs
        keys = torch.tensor([draw_key(seed, epoch, row) for row in rows.tolist()])
        output = model([data.images[row] for row in rows.tolist()], keys, more=more_samples(course, progress))
        labels = data.labels[rows]
        loss, cross_entropy = attention_sampling_loss(
            output.logits, labels, output.entropy, entropy_weight=entropy_weight(course, progress)
        )
        optimizer.zero_grad()
        loss.mean().backward()
        clip(list(model.parameters()), course.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(course, progress)
        optimizer.step()
        kept.update()
        correct = output.logits.argmax(-1) == labels
        sums += torch.stack([part.detach().sum() for part in (correct, cross_entropy, output.entropy)])
    means = (sums / count).tolist()
    return {name: round(mean, 4) for name, mean in zip(("accuracy", "cross_entropy", "entropy"), means, strict=True)}


def test_error(model: SamplingModel, task: Task, data: Data, seed: int) -> float:
    """Share of the test images that one draw misclassifies."""
    model.eval()
    wrong = 0
    for rows in torch.arange(task.train, task.train + task.test).split(task.batch):
        keys = torch.tensor([[draw_key(seed, "test", row)] for row in rows.tolist()])
        found = predict(model, [data.images[row] for row in rows.tolist()], keys)
        wrong += int((found.probabilities.argmax(-1) != data.labels[rows]).sum())
    return wrong / task.test


def grid(names: Sequence[str], arms: Sequence[str], seeds: tuple[int, ...]) -> list[tuple[int, str, str]]:
    """Every (seed, task, arm) in the order in which they are run."""
    return [(seed, name, arm) for arm in arms for seed in seeds for name in names if name in ARMS[arm].tasks]


def run_missing(
    tasks: dict[str, Task],
    names: Sequence[str],
    arms: Sequence[str],
    seeds: tuple[int, ...],
    digits: Path | None,
    path: Path,
) -> None:
    """Do the runs that the result file lacks, and add each to it."""
    data = cache(lambda name: make_data(name, tasks[name], digits))
    settings = {name: asdict(task) for name, task in tasks.items()}
    settings |= {
        "digits": "MNIST t10k" if digits else "scikit-learn",
        "course": TrainConfig().model_dump(mode="json"),
    }
    settings = json.loads(json.dumps(settings))
    results = read(path) or {"settings": settings, "runs": []}
    if results["settings"] != settings:
        raise SystemExit(f"{path}: of other settings; give another --results")
    made_with = versions() | {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    done = {(each["seed"], each["task"], each["arm"]) for each in results["runs"]}
    for seed, name, arm in grid(names, arms, seeds):
        if (seed, name, arm) in done:
            continue
        title = f"{name}, {arm}, seed {seed}"
        found = run(arm, tasks[name], data(name), seed, title)
        print(f"{title}: test error {found['test_error']:.1%}, {found['cpu_seconds']:.0f} s", flush=True)
        results["runs"].append({"seed": seed, "task": name, "arm": arm, **found, "versions": made_with})
        write_json(path, results)


def read(path: Path) -> dict[str, Any] | None:
    """Return what the result file holds."""
    return json.loads(path.read_text()) if path.exists() else None


def show(results: dict[str, Any]) -> None:
    """Print a table for each task: median over seeds, and range."""
    for name in TASKS:
        task = results["settings"][name]
        print(f"\n{name}: {task['train']} training and {task['test']} test images, {task['epochs']} epochs")
        print(f"{'arm':32}{'seeds':>6}{'test error':>24}{'epochs to 90 %':>20}{'CPU s':>8}")
        for arm in ARMS:
            runs = [each for each in results["runs"] if (each["task"], each["arm"]) == (name, arm)]
            if runs:
                errors = spread([100 * each["test_error"] for each in runs], "{:.1f}")
                epochs = spread([each["epochs_to_90"] or math.inf for each in runs], "{:.0f}")
                seconds = statistics.median(each["cpu_seconds"] for each in runs)
                print(f"{arm:32}{len(runs):6}{errors + ' %':>24}{epochs:>20}{seconds:8.0f}")
    print("\nmedian [range] over seeds; inf: never reached. Test: one draw an image.")
    for words in {", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in results["runs"]}:
        print(words)


def spread(values: list[float], form: str) -> str:
    """Median [range]."""
    middle, low, high = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def main() -> None:
    """Do the runs that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="folder of MNIST's t10k files; scikit-learn's digits without")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: few images, two epochs, one seed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tasks, seeds, path = TASKS, tuple(chosen.seeds), chosen.results
        if chosen.quick:
            tasks = {name: replace(task, train=64, test=32, epochs=2) for name, task in TASKS.items()}
            seeds, path = (0,), Path(folder) / "quick.json"
        if not chosen.show:
            path.parent.mkdir(parents=True, exist_ok=True)
            run_missing(tasks, chosen.tasks, chosen.arms, seeds, chosen.digits, path)
        print(f"\npython {' '.join(sys.argv)}")
        show(read(path) or {"settings": {name: asdict(task) for name, task in tasks.items()}, "runs": []})


if __name__ == "__main__":
    run_main(main, RESUMABLE)
