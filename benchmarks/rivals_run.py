"""Methods of `rivals.py`: how each is configured, trained and tested."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from rivals_data import TASKS, Task, make_images
from rivals_ips import IPS, Chunks, PatchEncoder, learn
from study import TILE
from study import configure as configure_study
from torch import Tensor, nn

from nested_ats.networks.encoders import build_encoder
from nested_ats.networks.presets import IMAGENET_MEAN, IMAGENET_STD
from pipeline.config import Config, parse_config, plain
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.results.intervals import area, area_interval, wilson
from pipeline.results.predict import predict
from pipeline.runs import read_metrics
from pipeline.sections import TrainConfig
from pipeline.training.course import PAPERS_COURSE
from pipeline.training.train import train
from storage import Slide

OURS, PRIOR, WARPED, CURRICULUM = "ours", "ours, prior", "ours, warped", "ours, curriculum"
PAPER, MIL, SELECTION, CNN = "the paper's", "Deep MIL", "IPS", "CNN"
NESTED = (OURS, PRIOR, WARPED, CURRICULUM)
METHODS = (*NESTED, PAPER, MIL, SELECTION, CNN)
KINDS = {**dict.fromkeys((*NESTED, PAPER), "ats"), MIL: "deepmil", CNN: "cnn"}
PATCH, FEATURES = 50, 32  # side of patches of digits in pixels, as in both papers, and channels of LeNet
MEAN, STD = 0.13, 0.31  # of MNIST's digits
BATCH = 32
# Two levels, as `levels_for` proposes for 3000 x 3000 pixels; a cell of the last map has 16 pixels, or 8.
_LEVELS = {
    "mnist": [
        {"downsample": 8, "stride": 2, "group": 4, "samples": 12},
        {"downsample": 2, "size": 32, "stride": 8, "samples": 10},
    ],
    "needles": [
        {"downsample": 4, "stride": 2, "group": 4, "samples": 16},
        {"downsample": 2, "size": 16, "stride": 4, "samples": 10},
    ],
}
_PAPERS_LEVEL = {  # the paper's view of a digit has 3 pixels; a scrap could not be told from it
    "mnist": {"downsample": 8, "stride": 1, "samples": 10},
    "needles": {"downsample": 4, "stride": 1, "samples": 10},
}
_CNN_DOWNSAMPLE = {  # to 256 to 750 pixels a side
    "mnist-1500": 4,
    "mnist-3000": 4,
    "needles-256": 1,
    "needles-1024": 2,
    "needles-2048": 4,
}
_PRIOR = {"prior": "valid", "nodata": 0.0, "min_tissue": 0.005}  # cells with something in them, as tissue on a slide
_WIDER = {"channels": [16, 32]}  # of the attention networks, which tell digits from noise
_DEEPER = {"channels": [16, 32, 32]}  # which see more of a digit from each place
_MOVED = {"translation": 0.011, "jitter": 0.16}  # so that a digit is not cut out in one way alone
# What a curriculum trains on before: as many smaller scenes, for so many epochs.
BEFORE = {"needles-1024": ("needles-256", 20), "needles-2048": ("needles-1024", 12)}
_PAPERS_MODEL = {"attention": "independent", "scale": 1.0, "method": "desraj"}


class Selecting(NamedTuple):
    """Settings of IPS for a kind of task."""

    patch: int  # pixels
    kept: int  # M
    chunk: int  # I
    batch: int
    learning_rate: float = 1e-3


SELECTING = {
    "mnist": Selecting(PATCH, 100, 100, 16),
    "needles": Selecting(PATCH, 100, 100, 16),
    "idrid": Selecting(TILE, 25, 50, 4, 3e-4),
}


def configure(name: str, method: str, seed: int, epochs: int, weights: Path, store: Path) -> Config:
    """Configuration of a method that the product trains."""
    if TASKS[name].kind == "idrid":
        return _configure_photographs(method, seed, epochs, weights, store)
    kind = TASKS[name].kind
    model: dict[str, Any] = {"kind": KINDS[method], "mean": MEAN, "std": STD, "features": FEATURES}
    course: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH}
    draws = 4 if method in NESTED else 1
    if method in NESTED:
        model |= {"patch_size": PATCH, "levels": _LEVELS[kind]}
        if method != OURS:
            attention = _DEEPER if method == WARPED else _WIDER
            model |= _PRIOR | {"levels": [level | attention for level in _LEVELS[kind]]}
            course |= {"batch_size": 16, "learning_rate": 2e-3, "early_samples": 2, "augment": _MOVED}
        if method == WARPED:
            course |= {"augment": _MOVED | {"warp": 0.15}, "weight_decay": 0.1, "entropy_fade": 0.0}
    elif method == PAPER:
        model |= {"patch_size": PATCH, "levels": [_PAPERS_LEVEL[kind]], **_PAPERS_MODEL}
        course |= PAPERS_COURSE
    elif method == MIL:
        # The activations of all patches of one image at a time, or of a part of them: those of 3600 take 10 GB.
        model |= {"patch_size": PATCH, "stride": PATCH, "recompute": max(TASKS[name].shape_yx) > 2000}
        course |= {"parts": BATCH}
    else:
        model |= {"encoder": "resnet16", "features": 16, "downsample": _CNN_DOWNSAMPLE[name]}
        course |= {"parts": 4}
    settings = {"seed": seed, "model": model, "train": course, "predict": {"draws": draws}}
    return parse_config(settings, f"{name}, {method}")


def _configure_photographs(method: str, seed: int, epochs: int, weights: Path, store: Path) -> Config:
    """As in `study.py`; what it does not have is its own method with changes."""
    known = {OURS: "ours", CNN: "CNN"}
    settings = plain(configure_study("idrid", known.get(method, "ours"), weights, store, epochs, seed))
    settings["predict"]["draws"] = 4 if method == OURS else 1
    if method == PAPER:
        settings["model"] |= {**_PAPERS_MODEL, "standardise": False}
        settings["train"] |= PAPERS_COURSE
    elif method == MIL:
        same = ("patch_size", "encoder", "trainable", "standardise")
        settings["model"] = {"kind": "deepmil", "stride": TILE} | {key: settings["model"][key] for key in same}
    return parse_config(settings, f"idrid, {method}")


class Test(NamedTuple):
    """What a method has answered."""

    rows: Sequence[Mapping[str, Any]]  # of each test image, as `predict` has it
    pixels: int  # that were read, of any level


def run(
    name: str, method: str, seed: int, epochs: int, entries: list[Entry], data: Path, folder: Path
) -> tuple[float, list[Test]]:
    """Train a method, or go on with it, and test it; return the seconds of training, and the tests."""
    if method == SELECTION:
        return by_selection(name, seed, epochs, entries, data, folder)
    return by_product(name, method, seed, epochs, entries, data, folder)


def folder_of(runs: Path, name: str, images: int, method: str, seed: int, epochs: int) -> Path:
    """Where a piece has its runs."""
    return runs / f"{name}-{images}-{method.replace(' ', '-')}-{seed}-{epochs}"


def by_product(
    name: str, method: str, seed: int, epochs: int, entries: list[Entry], data: Path, folder: Path
) -> tuple[float, list[Test]]:
    """`run` by `train` and `predict`, with the draws of the configuration, and with one draw."""
    kept = folder / "kept"  # features of frozen networks, and masks of priors
    os.environ["XDG_CACHE_HOME"] = str(kept)
    config = configure(name, method, seed, epochs, data / "weights/mobilenet_v2-b0353104.pth", kept / "features")
    seconds = _train(config, name, method, entries, data, folder)
    held = [entry for entry in entries if entry.split == "test"]
    tests = []
    for draws in dict.fromkeys((config.predict.draws, 1)):
        shutil.rmtree(kept, ignore_errors=True)  # what an earlier test read is to be read again
        with counted_pixels() as pixels:
            rows = predict(held, folder / "run", folder / "test", device="cpu", draws=draws, overwrite=True)
        if failed := [row["error"] for row in rows if row["status"] != "ok"]:
            raise SystemExit(failed[0])
        tests.append(Test(rows, sum(pixels)))
    return seconds, tests


def _train(config: Config, name: str, method: str, entries: list[Entry], data: Path, folder: Path) -> float:
    """Train, for a curriculum on smaller scenes before; return the seconds of all."""
    seconds, first = 0.0, None
    if method == CURRICULUM and name in BEFORE:
        smaller, epochs = BEFORE[name]
        count = sum(entry.split == "train" for entry in entries)
        scenes = make_images(smaller, count, 0, data, folder.parents[1])
        place = folder_of(folder.parent, smaller, count, method, config.seed, epochs)
        easier = configure(smaller, method, config.seed, epochs, data, place)  # digits need no weights and no store
        seconds, first = _train(easier, smaller, method, scenes, data, place), place / "run"
    train(entries, config, folder / "run", device="cpu", fail_fast=True, init=first)
    return seconds + sum(line["seconds"] for line in read_metrics(folder / "run"))


def by_selection(
    name: str, seed: int, epochs: int, entries: list[Entry], data: Path, folder: Path
) -> tuple[float, list[Test]]:
    """`run` IPS, with the feature network that ours has, or over the features of a frozen one."""
    task, settings = TASKS[name], SELECTING[TASKS[name].kind]
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    encoder, features, see = _networks(task, data)
    model = IPS(encoder, features=features, classes=len(task.classes), kept=settings.kept)
    training, held = ([entry for entry in entries if entry.split == split] for split in ("train", "test"))
    known: dict[int, list[tuple[Tensor, Tensor]]] = {}  # features of a frozen network, by row

    def scan(row: int) -> Chunks:
        if see is None:
            return _of_file(training[row], settings)
        if row not in known:
            known[row] = list(_of_file(training[row], settings, see))
        return known[row]

    labels = [task.classes.index(entry.label) for entry in training]
    course = TrainConfig(
        epochs=epochs,
        batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        warmup=0.07,
        weight_decay=0.1,
    )
    seconds = learn(model, scan, labels, course, seed, folder / "ips.pt")
    model.eval()
    with counted_pixels() as pixels:
        rows = [_classify(model, entry, task.classes, settings, see) for entry in held]
    return seconds, [Test(rows, sum(pixels))]


def _networks(task: Task, data: Path) -> tuple[nn.Module, int, PatchEncoder | None]:
    """What IPS trains, its D, and the frozen network that sees the patches before, if there is one."""
    if task.kind == "idrid":
        choice = {"name": "mobilenet_v2", "weights": str(data / "weights/mobilenet_v2-b0353104.pth")}
        built = build_encoder(choice, in_channels=3, patch_size=TILE)
        seen = PatchEncoder(built.module, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)).eval()
        return nn.Identity(), built.features, seen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    built = build_encoder("lenet", in_channels=1, channels=FEATURES, patch_size=PATCH)
    encoder = PatchEncoder(built.module, torch.tensor([MEAN]), torch.tensor([STD]))
    return encoder.to(memory_format=torch.channels_last), built.features, None  # type: ignore[call-overload]


def patches_of(
    image: SlideImage, patch: int, chunk: int, see: nn.Module | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Patches (P, C, patch, patch) of a grid, or what a network makes of them, and their (P, 2) places."""
    shape = torch.tensor(image.shapes[0])
    corners = torch.cartesian_prod(*(torch.arange(0, side, patch) for side in image.shapes[0]))
    for part in corners.split(chunk):
        pixels = image.read(0, torch.cat([part, torch.full_like(part, patch)], -1))
        with torch.no_grad():
            patches = pixels if see is None else see(pixels)
        yield patches, (part + patch / 2) / shape


def _of_file(entry: Entry, settings: Selecting, see: nn.Module | None = None) -> Chunks:
    with Slide(entry.path) as slide:
        yield from patches_of(SlideImage(slide), settings.patch, settings.chunk, see)


@torch.no_grad()
def _classify(
    model: IPS, entry: Entry, classes: Sequence[str], settings: Selecting, see: nn.Module | None
) -> dict[str, Any]:
    """A row as `predict` has it."""
    began = time.monotonic()
    with Slide(entry.path) as slide:
        image = SlideImage(slide)
        patches, places = model.select(patches_of(image, settings.patch, settings.chunk, see))
        probabilities = model(patches[None], places[None]).softmax(-1)[0].tolist()
        read = image.statistics.bytes_read
    answers = {f"prob_{each}": value for each, value in zip(classes, probabilities, strict=True)}
    return {"label": entry.label, **answers, "bytes_read": read, "seconds": time.monotonic() - began}


@contextmanager
def counted_pixels() -> Iterator[list[int]]:
    """List the numbers of pixels, of any level, of all boxes of slides that are read meanwhile."""
    counts: list[int] = []
    original = Slide.read_many

    def keep(self: Slide, level: int, boxes: ArrayLike, **options: Any) -> NDArray[Any]:
        found = np.asarray(boxes)
        ends = np.minimum(found[:, :2] + found[:, 2:], self.levels[level].shape_yx)
        counts.append(int((ends - found[:, :2].clip(0)).clip(0).prod(1).sum()))
        return original(self, level, boxes, **options)

    Slide.read_many = keep  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Slide.read_many = original  # type: ignore[method-assign]


def judge(task: Task, test: Test) -> dict[str, Any]:
    """Figures of a test."""
    scores = np.array([[row[f"prob_{each}"] for each in task.classes] for row in test.rows])
    labels = np.array([task.classes.index(row["label"]) for row in test.rows])
    error = float((scores.argmax(1) != labels).mean())
    low, high = wilson(error, len(labels))
    found: dict[str, Any] = {
        "tests": len(labels),
        "test_error": round(error, 5),
        "interval_95": [round(float(low), 5), round(float(high), 5)],
        "bytes": round(float(np.mean([row["bytes_read"] for row in test.rows]))),
        "pixels": round(test.pixels / len(labels) / math.prod(task.shape_yx), 5),
        "test_seconds": round(float(np.median([row["seconds"] for row in test.rows])), 4),
    }
    if len(task.classes) == 2 and len(set(labels.tolist())) == 2:
        found["auc"] = area(labels, scores)
        found["auc_interval_95"] = area_interval(labels, scores, np.arange(len(labels)))[0]
    return found
