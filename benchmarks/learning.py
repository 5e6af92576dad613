"""What each choice does to learning: test error at equal patches and epochs, and epochs to 90 % accuracy.

Tasks. *mnist*: Megapixel MNIST at 384 x 384 with 8 noise patches; one level, 10 patches of 50 pixels out of 2304
cells. *signs*: the scenes of ``make demo``, 1024 x 1024; 8 regions, then 8 patches of 64 pixels out of 4096 leaves.
*needles*: one digit of a class among 15 scraps of digits, 256 x 256, two levels. *colon*: the 100 published images of
500 x 500 pixels, enlarged twice, in ten folds, by a frozen MobileNetV2; 25 of 64 tiles of 128 pixels. *slides*: sixty
slides with planted nests (`examples/sixty_slides.py`) in three folds, by the same network, as examples/histology.yaml
has it.
Arms differ from ``default`` in what their name says and in nothing else: within a seed they start from the same
weights (but ``uniform``, which has no attention) and see the same images in the same order, by the course of training
of `pipeline.training.course`. Images are the same for all seeds, and held in memory.

"epochs to 90 %" is the first epoch in which the training accuracy, over the draws that trained, is 90 % or more, in
the median fold. The test draws once per image, as the paper does, and four times, as `predict` does; folds are
pooled. The authors' gradient is for one level, so only *mnist* has such an arm.

A run is written to the result file when it ends, and a rerun does only what is missing. Each takes one thread; to
let glibc keep freed memory takes a third off the time: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592.

    python benchmarks/learning.py [--digits ../shared/data/mnist] [--colon .../Classification] [--slides FOLDER]
                                  [--weights mobilenet_v2-b0353104.pth] [--tasks mnist signs] [--arms default ...]
                                  [--seeds 0 1 2] [--device cuda] [--jobs 2] [--results FILE] [--show] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from authors_gradient import AuthorsATS
from estimators import ControlledATS, RememberingATS
from learning_data import Data, Places, Task, make_data
from sklearn.metrics import roc_auc_score
from torch import Tensor

from nested_ats import (
    LevelConfig,
    ModelConfig,
    NestedATS,
    UniformConfig,
    UniformSampling,
    attention_sampling_loss,
    predict,
)
from nested_ats.config import PatchConfig
from nested_ats.models.patches import SamplingModel
from pipeline.config import DEFAULT_LEVELS, TrainConfig
from pipeline.data.augment import AugmentedImage
from pipeline.data.features import DiskFeatures
from pipeline.data.slides import draw_key
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.training.course import PAPERS_COURSE, KeptWeights, clip, entropy_weight, learning_rate, more_samples
from pipeline.training.train import versions

SEEDS = (0, 1, 2)
DRAWS = (1, 4)  # of a test image: as in the paper, and as `nested-ats predict` does by default
FIRST_IMAGES = 16  # by which features are standardised
RESULTS = Path(__file__).parent / "results" / "learning_cpu.json"

_LEVEL = LevelConfig(downsample=4, stride=2, samples=10, channels=(8, 8))
_MNIST = ModelConfig(levels=(_LEVEL,), patch_size=50, mean=0.13, std=0.31)
_NEEDLES = ModelConfig(
    levels=(
        LevelConfig(downsample=4, stride=2, group=4, samples=8),
        LevelConfig(downsample=2, size=16, stride=4, samples=8),
    ),
    patch_size=48,
    mean=0.13,
    std=0.31,
)
_SIGNS = ModelConfig(levels=DEFAULT_LEVELS)
# The encoder of these is named when a model is made: where its weights lie is not a setting.
_FROZEN: dict[str, Any] = {"trainable": "none", "standardise": True}
_COLON = ModelConfig(
    levels=(LevelConfig(downsample=8, stride=16, samples=25, channels=(16, 16)),), patch_size=128, **_FROZEN
)
_SLIDES = ModelConfig(  # of examples/histology.yaml
    levels=(
        LevelConfig(downsample=16, stride=4, group=4, samples=16),
        LevelConfig(downsample=4, size=64, stride=16, samples=32),
    ),
    **_FROZEN,
)
_FEW = {"learning_rate": 3e-3}
TASKS = {
    "mnist": Task(_MNIST, channels=1, classes=10, size=384, train=2000, test=500, batch=32, epochs=30),
    "needles": Task(_NEEDLES, channels=1, classes=10, size=256, train=2000, test=500, batch=32, epochs=30),
    "signs": Task(_SIGNS, channels=3, classes=4, size=1024, train=700, test=150, batch=16, epochs=45),
    "colon": Task(
        _COLON,
        channels=3,
        classes=2,
        size=1000,
        train=100,
        test=0,
        batch=4,
        epochs=20,
        folds=10,
        background=1.0,
        course=_FEW,
    ),
    "slides": Task(
        _SLIDES,
        channels=3,
        classes=2,
        size=4096,
        train=60,
        test=0,
        batch=4,
        epochs=40,
        folds=3,
        background=1.0,
        course=_FEW,
    ),
}
TRAINED, FROZEN = ("mnist", "signs", "needles"), ("colon", "slides")  # encoders
UNIFORM, AUTHORS = "uniform", "desraj, authors' gradient"
CONTROLLED, REMEMBERING, ONE_REMEMBERING = "control variate", "memory of features", "one level, memory of features"
_ONE_LEVEL = (LevelConfig(downsample=8, stride=8, samples=32, channels=(16, 16)),)


ESTIMATORS: dict[str, type[NestedATS]] = {
    AUTHORS: AuthorsATS,
    CONTROLLED: ControlledATS,
    REMEMBERING: RememberingATS,
    ONE_REMEMBERING: RememberingATS,
}


class Place(NamedTuple):
    """Where data lie and where it is computed."""

    data: Places
    weights: Path | None  # of torchvision's MobileNetV2
    device: str
    features: Path  # folder of what the frozen network makes of patches


@dataclass(frozen=True)
class Arm:
    """What is changed in the model and in the training."""

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = (*TRAINED, *FROZEN)


ARMS = {
    "default": Arm(),
    "independent levels": Arm({"attention": "independent"}, tasks=("signs", "needles", "slides")),
    "features not scaled": Arm({"scale": 1.0}),
    "features standardised": Arm({"standardise": True}, tasks=TRAINED),
    "features as they are": Arm({"standardise": False}, tasks=FROZEN),
    "one level": Arm({"levels": _ONE_LEVEL}, tasks=("slides",)),
    CONTROLLED: Arm(),
    REMEMBERING: Arm(tasks=("colon",)),
    ONE_REMEMBERING: Arm({"levels": _ONE_LEVEL}, tasks=("slides",)),
    "tissue prior": Arm({"prior": "tissue"}, tasks=("slides",)),
    "encoder trained": Arm({"trainable": "all", "standardise": False}, {"learning_rate": 1e-4}, tasks=("colon",)),
    "encoder from nothing": Arm(
        {"encoder": "resnet16", "trainable": "all", "standardise": False},
        {"learning_rate": 1e-3},
        tasks=("colon",),
    ),
    "systematic": Arm({"method": "systematic"}),
    "desraj": Arm({"method": "desraj"}),
    "multinomial": Arm({"method": "multinomial"}),
    "learning rate 3e-3": Arm(train={"learning_rate": 3e-3}, tasks=TRAINED),
    "learning rate 1e-3": Arm(train={"learning_rate": 1e-3}, tasks=FROZEN),
    "weight decay 0.05": Arm(train={"weight_decay": 0.05}),
    "moved": Arm(train={"augment": {"translation": 0.1}}, tasks=TRAINED),
    "turned": Arm(train={"augment": {"flip": True}}, tasks=FROZEN),
    "turned, scale 24, entropy weight .1": Arm(
        {"scale": 24.0}, {"augment": {"flip": True}, "entropy_weight": 0.1, "entropy_fade": 0.0}, tasks=("colon",)
    ),
    "resnet8": Arm({"encoder": "resnet8"}, tasks=TRAINED),
    "as many samples early": Arm(train={"early_samples": 1}),
    "constant learning rate": Arm(train={"schedule": "constant", "warmup": 0.0}),
    "last weights": Arm(train={"average": 0.0}),
    "entropy weight stays": Arm(train={"entropy_fade": 0.0}),
    "gradient not clipped": Arm(train={"clip": 0.0}),
    "the paper's training": Arm({"attention": "independent", "scale": 1.0, "method": "multinomial"}, PAPERS_COURSE),
    AUTHORS: Arm({"method": "desraj", "scale": 1.0}, PAPERS_COURSE, tasks=("mnist",)),
    UNIFORM: Arm(),
}


def make_model(arm: str, task: Task, weights: Path | None) -> SamplingModel:
    """Model of an arm, with weights by torch's seed."""
    changes = ARMS[arm].model
    if task.model.trainable == "none" and "encoder" not in changes:
        encoder = {"name": "mobilenet_v2", "weights": str(weights)}
        changes = {"encoder": encoder, "mean": None, "std": None, **changes}  # and its pixels as it was trained with
    config = replace(task.model, **changes)
    shapes: dict[str, Any] = {"in_channels": task.channels, "classes": task.classes}
    if arm == UNIFORM:
        last = config.levels[-1]
        common = {each.name: getattr(config, each.name) for each in fields(PatchConfig) if each.name != "kind"}
        return UniformSampling(UniformConfig(samples=last.samples, cell=last.extent_l0, **common), **shapes)
    return ESTIMATORS.get(arm, NestedATS)(config, **shapes)


def run(arm: str, task: Task, data: Data, seed: int, place: Place, title: str) -> dict[str, Any]:
    """Train and test one arm with one seed, in every fold."""
    began = time.monotonic()
    curves, tests = zip(
        *(train(arm, task, data, fold, seed, place, title) for fold in range(len(data.folds))), strict=True
    )
    reached = [next((n for n, each in enumerate(curve, 1) if each["accuracy"] >= 0.9), math.inf) for curve in curves]
    found: dict[str, Any] = {
        "epochs_to_90": None if (middle := statistics.median_high(reached)) == math.inf else middle,
        "seconds": round(time.monotonic() - began, 1),
        "curve": {
            name: [round(statistics.mean(each[name] for each in epoch), 4) for epoch in zip(*curves, strict=True)]
            for name in curves[0][0]
        },
    }
    for draws in DRAWS:
        scores = {row: values for test in tests for row, values in test[draws].items()}
        labels = data.labels[list(scores)].tolist()
        wrong = sum(int(np.argmax(values)) != label for values, label in zip(scores.values(), labels, strict=True))
        found[f"test_error_{draws}"] = round(wrong / len(scores), 4)
        if task.classes == 2:
            found[f"auc_{draws}"] = round(float(roc_auc_score(labels, [values[1] for values in scores.values()])), 4)
    return found


def train(
    arm: str, task: Task, data: Data, fold: int, seed: int, place: Place, title: str
) -> tuple[list[dict[str, float]], dict[int, dict[int, list[float]]]]:
    """Train on all but one fold; the means of each epoch, and by `DRAWS` the probabilities of each row."""
    rows, held = data.folds[fold]
    torch.manual_seed(seed)
    model = make_model(arm, task, place.weights).to(place.device)
    model.store = DiskFeatures(place.features, 2**33)
    course = TrainConfig(epochs=task.epochs, batch_size=task.batch, **task.course | ARMS[arm].train)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=course.learning_rate, weight_decay=course.weight_decay, eps=1e-6)
    if model.config.standardise:
        look_first(model, course, data, rows, seed)
    kept = KeptWeights(model, course.average)
    curve = []
    for epoch in range(task.epochs):
        told = train_epoch(model, optimizer, kept, course, data, rows, seed, epoch)
        curve.append(told | getattr(model, "told", {}))  # what an estimator knows of itself
        print(f"{title}, fold {fold + 1}, epoch {epoch + 1}: {curve[-1]}", flush=True)
    kept.use_best()
    return curve, {draws: test(model, task, data, held, seed, draws) for draws in DRAWS}


@torch.no_grad()
def look_first(model: SamplingModel, course: TrainConfig, data: Data, rows: Tensor, seed: int) -> None:
    """Set how features are standardised, by patches of the first training images."""
    with model.gather_moments() as moments:
        for row in rows[:FIRST_IMAGES].tolist():
            model([data.images[row]], torch.tensor([draw_key(seed, "first look", row)]), more=course.early_samples)
    model.standardise_by(moments)


def train_epoch(
    model: SamplingModel,
    optimizer: torch.optim.Optimizer,
    kept: KeptWeights,
    course: TrainConfig,
    data: Data,
    rows: Tensor,
    seed: int,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images; means over it."""
    model.train()
    device, coarsest = next(model.parameters()).device, max(model.config.downsamples)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(draw_key(seed, epoch) >> 1))
    shuffled = rows[order]
    sums = torch.zeros(3, device=device)
    batches = shuffled.split(course.batch_size)
    for step, batch in enumerate(batches):
        progress = (epoch + (step + 0.5) / len(batches)) / course.epochs
        keys = torch.tensor([draw_key(seed, epoch, row) for row in batch.tolist()])
        images = [
            AugmentedImage(
                data.images[row], course.augment, draw_key(seed, "augment", epoch, row), downsample=coarsest
            )
            for row in batch.tolist()
        ]
        output = model(images, keys, more=more_samples(course, progress))
        labels = data.labels[batch].to(device)
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
    means = (sums / len(shuffled)).tolist()
    return {name: round(mean, 4) for name, mean in zip(("accuracy", "cross_entropy", "entropy"), means, strict=True)}


def test(model: SamplingModel, task: Task, data: Data, held: Tensor, seed: int, draws: int) -> dict[int, list[float]]:
    """Probabilities by row, of so many draws."""
    model.eval()
    scores: dict[int, list[float]] = {}
    for rows in held.split(task.batch):
        keys = torch.tensor([[draw_key(seed, "test", row, draw) for draw in range(draws)] for row in rows.tolist()])
        found = predict(model, [data.images[row] for row in rows.tolist()], keys)
        scores |= dict(zip(rows.tolist(), found.probabilities.tolist(), strict=True))
    return scores


def grid(names: Sequence[str], arms: Sequence[str], seeds: tuple[int, ...]) -> list[tuple[int, str, str]]:
    """Every (seed, task, arm) in the order in which they are run."""
    return [(seed, name, arm) for arm in arms for seed in seeds for name in names if name in ARMS[arm].tasks]


def run_missing(
    tasks: dict[str, Task],
    names: Sequence[str],
    arms: Sequence[str],
    seeds: tuple[int, ...],
    place: Place,
    path: Path,
    jobs: int,
) -> None:
    """Do the runs that the result file lacks, so many at once, and add each to it."""
    settings: dict[str, Any] = {name: asdict(task) for name, task in tasks.items()}
    settings |= {
        "digits": "MNIST t10k" if place.data.digits else "scikit-learn",
        "course": TrainConfig().model_dump(mode="json"),
    }
    settings = json.loads(json.dumps(settings))
    results = read(path) or {"settings": settings, "runs": []}
    if results["settings"] != settings:
        raise SystemExit(f"{path}: of other settings; give another --results")
    done = {(each["seed"], each["task"], each["arm"]) for each in results["runs"]}
    missing = [each for each in grid(names, arms, seeds) if each not in done]
    made = {
        name: make_data(name, tasks[name], place.data, jobs) for name in dict.fromkeys(each[1] for each in missing)
    }
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), set_up, (tasks, made, place)) as pool:
        running = [pool.submit(run_one, *each) for each in missing]
        for ended in as_completed(running):
            results["runs"].append(ended.result())
            write_json(path, results)


_given: dict[str, Any] = {}  # of a process that runs arms; what was there before it was forked is shared


def set_up(tasks: dict[str, Task], made: dict[str, Data], place: Place) -> None:
    """Begin a process that runs arms."""
    torch.set_num_threads(1)
    _given.update(tasks=tasks, made=made, place=place)


def run_one(seed: int, name: str, arm: str) -> dict[str, Any]:
    """One run, as it is kept in the result file."""
    place = _given["place"]
    title = f"{name}, {arm}, seed {seed}"
    found = run(arm, _given["tasks"][name], _given["made"][name], seed, place, title)
    print(f"{title}: test error {found['test_error_1']:.1%}, {found['seconds']:.0f} s", flush=True)
    device = torch.cuda.get_device_name() if place.device == "cuda" else "CPU"
    made_with = versions() | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    return {"seed": seed, "task": name, "arm": arm, **found, "versions": made_with}


def read(path: Path) -> dict[str, Any] | None:
    """Return what the result file holds."""
    return json.loads(path.read_text()) if path.exists() else None


def show(results: dict[str, Any]) -> None:
    """Print a table for each task: median over seeds, and range."""
    for name in TASKS:
        task = results["settings"][name]
        images = f"{task['train']} images" + ("" if task["folds"] else f" to train on and {task['test']} to test on")
        print(f"\n{name}: {images}, {task['folds'] or 'no'} folds, {task['epochs']} epochs")
        print(f"{'arm':32}{'seeds':>6}{'test error':>20}{'four draws':>20}{'AUC':>24}{'epochs to 90 %':>16}{'s':>6}")
        for arm in ARMS:
            runs = [each for each in results["runs"] if (each["task"], each["arm"]) == (name, arm)]
            if runs:
                errors = [spread([100 * each[f"test_error_{draws}"] for each in runs], "{:.1f}") for draws in DRAWS]
                auc = spread([each[f"auc_{DRAWS[0]}"] for each in runs], "{:.3f}") if task["classes"] == 2 else ""
                epochs = spread([each["epochs_to_90"] or math.inf for each in runs], "{:.0f}")
                seconds = statistics.median(each["seconds"] for each in runs)
                cells = "".join(f"{each + ' %':>20}" for each in errors)
                print(f"{arm:32}{len(runs):6}{cells}{auc:>24}{epochs:>16}{seconds:6.0f}")
    print("\nmedian [range] over seeds; inf: never reached. Test and AUC: one draw an image, where not four.")
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
    parser.add_argument("--colon", type=Path, help="the published Classification folder")
    parser.add_argument("--slides", type=Path, help="what examples/sixty_slides.py wrote")
    parser.add_argument("--weights", type=Path, help="of torchvision's MobileNetV2, for colon and slides")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TRAINED))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: few images, two epochs, one seed")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tasks, seeds, path = TASKS, tuple(chosen.seeds), chosen.results
        if chosen.quick:
            tasks = {
                name: replace(task, epochs=2) if task.folds else replace(task, epochs=2, train=64, test=32)
                for name, task in TASKS.items()
            }
            seeds, path = (0,), Path(folder) / "quick.json"
        if not chosen.show:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = Places(chosen.digits, chosen.colon, chosen.slides)
            if chosen.weights is None and not {*FROZEN}.isdisjoint(chosen.tasks):
                parser.error("--weights is needed for colon and slides")
            place = Place(data, chosen.weights, chosen.device, Path(folder) / "features")
            run_missing(tasks, chosen.tasks, chosen.arms, seeds, place, path, chosen.jobs)
        print(f"\npython {' '.join(sys.argv)}")
        show(read(path) or {"settings": {name: asdict(task) for name, task in tasks.items()}, "runs": []})


if __name__ == "__main__":
    run_main(main, RESUMABLE)
