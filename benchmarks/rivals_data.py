"""Tasks and images of `rivals.py`: pyramids on disk, which every method reads.

Training image number i is the same whatever the number of images, so that smaller sets are parts of larger ones; test
images are numbered from 1,000,000 on, and have digits of MNIST's test set.

An image of Megapixel MNIST takes 0.2 MB on disk, as chunks without anything are not stored.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from learning_data import draw_needle
from numpy.typing import NDArray
from study import make_slides, referable

from pipeline.data.manifest import Entry
from storage import ConvertOptions, write_pyramid

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from example_data.mnist import CLASSES, DigitPool, load_pools, mnist_scene
from megapixel_mnist import digit_files

FIRST_TEST = 1_000_000  # number of the first test image
NOISE = 50  # patches of noise on a canvas of Megapixel MNIST
_BATCH = 100  # images that a process makes before another takes over: glibc keeps what they took
_OPTIONS = ConvertOptions(min_level_size=64)  # the coarse views of small images are levels too


@dataclass(frozen=True)
class Task:
    """What is to be told from which images."""

    kind: str  # mnist, needles or idrid
    shape_yx: tuple[int, int]  # of an image in pixels
    classes: tuple[str, ...]
    images: int = 5000  # to train on, at most
    tests: int = 1000
    published: tuple[str, ...] = ()  # marks to print beside ours


_DIGITS = tuple(map(str, range(CLASSES)))
_IPS_MARKS = (
    "IPS (Bergner et al., 2023): 99.1 % accuracy at 1500 x 1500 with 5,000 images",
    "IPS at 3000 x 3000: 66.6 % accuracy with 1,000 images, 9.6 % with 400",
)
TASKS = {
    "mnist-1500": Task(
        "mnist",
        (1500, 1500),
        _DIGITS,
        published=(*_IPS_MARKS, "the authors' attention sampling with 5 patches: about 80 % accuracy"),
    ),
    "mnist-3000": Task("mnist", (3000, 3000), _DIGITS, published=_IPS_MARKS),
    "needles-256": Task("needles", (256, 256), _DIGITS),
    "needles-1024": Task("needles", (1024, 1024), _DIGITS),
    "needles-2048": Task("needles", (2048, 2048), _DIGITS),
    "idrid": Task("idrid", (1424, 2144), ("no", "yes"), images=400, tests=103),
}


def make_images(name: str, images: int, tests: int, data: Path, work: Path, jobs: int = 1) -> list[Entry]:
    """Make the pyramids that are missing, by so many processes; return those to train and those to test on."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    if TASKS[name].kind == "idrid":
        return _photographs(images, tests, data, folder)
    wanted = [*range(images), *range(FIRST_TEST, FIRST_TEST + tests)]
    there = _labels(folder)
    missing = [number for number in wanted if number not in there]
    parts = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        for done, _ in enumerate(pool.map(partial(write_scenes, name, data, folder), parts), start=1):
            print(f"{name}: {min(done * _BATCH, len(missing))} of {len(missing)} images made", flush=True)
    labels = _labels(folder)
    return [
        Entry(
            slide_id=f"{number:07d}",
            path=str(_path(folder, number, labels[number])),
            label=labels[number],
            split="test" if number >= FIRST_TEST else "train",
        )
        for number in wanted
    ]


def write_scenes(name: str, data: Path, folder: Path, numbers: list[int]) -> None:
    """Write the pyramids of some scenes; the name of each tells its label."""
    for number in numbers:
        label, pixels = draw_scene(name, number, _pools(data)[number >= FIRST_TEST])
        write_pyramid(_path(folder, number, label), pixels[None], options=_OPTIONS, overwrite=True)


def draw_scene(name: str, number: int, pool: DigitPool) -> tuple[str, NDArray[np.uint8]]:
    """Label and (H, W) pixels of a scene."""
    size, _ = TASKS[name].shape_yx
    if TASKS[name].kind == "mnist":
        scene = mnist_scene(number, seed=0, pool=pool, size=size, noise=NOISE)
        return scene.label, scene.render(pool)
    canvas = np.empty((size, size), np.uint8)
    return str(draw_needle(number, canvas, pool)), canvas


@cache
def _pools(data: Path) -> tuple[DigitPool, DigitPool]:
    files = digit_files(data / "mnist")
    if "test_images" not in files:
        raise SystemExit(f"{data / 'mnist'}: both pairs of MNIST's files are needed")
    return load_pools(**files)


def _path(folder: Path, number: int, label: str) -> Path:
    return folder / f"{number:07d}-{label}.ome.zarr"


def _labels(folder: Path) -> dict[int, str]:
    """Labels of the scenes that are there, by number."""
    names = (path.parent.name.removesuffix(".ome.zarr").split("-") for path in folder.glob("[!.]*/zarr.json"))
    return {int(number): label for number, label in names}


def _photographs(images: int, tests: int, data: Path, folder: Path) -> list[Entry]:
    """Fundus photographs of grade 0 and of 2 and above, in the official split, or some of those to train on."""
    entries = referable(make_slides("idrid grades", data, folder))
    shuffled = [entries[row] for row in np.random.default_rng(0).permutation(len(entries))]
    parts = {split: [entry for entry in shuffled if entry.split == split] for split in ("train", "test")}
    return parts["train"][:images] + parts["test"][:tests]
