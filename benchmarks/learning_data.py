"""Images of the tasks of `learning.py`, the same every time, in memory: the bytes of every level."""

from __future__ import annotations

import csv
import hashlib
import math
import mmap
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn import functional

from nested_ats import ArrayImage, Mask, ModelConfig
from pipeline.allocator import keep_freed_memory
from pipeline.data.signs import LABELS, sign_scene
from pipeline.data.tissue import Finding, tissue

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from example_data.mnist import DigitPool, load_pools, mnist_scene
from example_data.published import EPITHELIAL, colon_cancer
from megapixel_mnist import digit_files


@dataclass(frozen=True)
class Task:
    """A data set, the model of its ``default`` arm, and how to train it."""

    model: ModelConfig
    channels: int
    classes: int
    size: int  # side of an image in pixels
    train: int  # images; all of them where there are folds
    test: int
    batch: int
    epochs: int
    folds: int = 0  # none: the last images are those to test on
    background: float = 0.0
    course: dict[str, Any] = field(default_factory=dict)  # what differs from the defaults of `train`

    @property
    def coarsest(self) -> int:
        """Index of the level that the model sees first."""
        return int(math.log2(self.model.downsamples[0]))


class Places(NamedTuple):
    """Where real data lie; what is None is not needed by the tasks, or made."""

    digits: Path | None = None  # folder of MNIST's files, of both pairs or of t10k alone
    colon: Path | None = None  # the published ``Classification`` folder
    slides: Path | None = None  # what ``examples/sixty_slides.py`` wrote


class Data(NamedTuple):
    """Images and (N,) labels, and the rows of each fold to train and to test on."""

    images: list[ByteImage]
    labels: Tensor
    folds: list[tuple[Tensor, Tensor]]


_MASK = 4.0  # downsample of the view on which tissue is found


class ByteImage(ArrayImage):
    """An `ArrayImage` whose levels are bytes, as those of a pyramid on disk are: a quarter of the memory.

    Its `identity` is a digest of its pixels, once it is whole, so that features of its patches can be kept.
    """

    def __init__(self, levels: list[Tensor], background: float = 0.0) -> None:
        self._levels = levels
        self._background = round(background * 255)
        self.identity: str | None = None
        self.mask = None

    @property
    def levels(self) -> list[Tensor]:
        """Pixels (C, H, W) of every level."""
        return self._levels

    @property
    def finest(self) -> NDArray[np.uint8]:
        """Pixels (C, H, W) of the first level, to be written to."""
        pixels: NDArray[np.uint8] = self._levels[0].numpy()
        return pixels

    def fill(self) -> None:
        """Make the other levels of the first one."""
        exact = ArrayImage(self._levels[0], levels=len(self._levels))
        for level, (height, width) in enumerate(self.shapes):
            pixels = exact.read(level, torch.tensor([[0, 0, height, width]]))[0]
            self._levels[level].copy_((pixels * 255).round())


Render = Callable[[int, NDArray[np.uint8]], int]  # fills the (C, H, W) pixels of a number's image, returns its class


def make_data(name: str, task: Task, places: Places, jobs: int) -> Data:
    """Make the images of a task by so many processes, which see one memory."""
    render = RENDER[name](task, places)
    count = task.train + task.test
    sides = [math.ceil(task.size / 2**level) for level in range(task.coarsest + 1)]
    blocks = [_shared(count, task.channels, side, side) for side in sides]
    images = [ByteImage([block[index] for block in blocks], task.background) for index in range(count)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _set_up, (render, images)) as pool:
        made = list(pool.map(_make, range(count), chunksize=max(1, count // (4 * jobs))))
    labels = torch.tensor([label for label, _ in made])
    for image, (_, digest) in zip(images, made, strict=True):
        image.identity = digest
        if name == "slides":
            view = image.downsamples.index(_MASK)
            found = tissue(
                image.levels[view].numpy().astype(np.float32) / np.float32(255), Finding(), None, "a slide"
            )
            image.mask = Mask(torch.from_numpy(found), (_MASK, _MASK))
    rows = torch.arange(count)
    folds = [(rows[: task.train], rows[task.train :])]
    if name == "slides":
        given = torch.tensor([int(row["fold"]) for row in _table(places)])
        folds = [
            ((given != fold).nonzero().flatten(), (given == fold).nonzero().flatten()) for fold in given.unique()
        ]
    elif task.folds:
        split = StratifiedKFold(task.folds, shuffle=True, random_state=0).split(rows, labels)
        folds = [(torch.from_numpy(train), torch.from_numpy(test)) for train, test in split]
    return Data(images, labels, folds)


_made: dict[str, Any] = {}  # of a process that makes images


def _set_up(render: Render, images: list[ByteImage]) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # which gives back what images leave free: 7 MB of each
    _made.update(render=render, images=images)


def _make(index: int) -> tuple[int, str]:
    """Label and identity."""
    image = _made["images"][index]
    label: int = _made["render"](index, image.finest)
    image.fill()
    return label, hashlib.sha256(image.finest.data).hexdigest()


def _shared(*shape: int) -> Tensor:
    """Zeros (uint8) that processes forked from this one see and fill."""
    memory = mmap.mmap(-1, math.prod(shape))
    return torch.frombuffer(memory, dtype=torch.uint8).reshape(shape)


def mnist_scenes(task: Task, places: Places) -> Render:
    """Scenes of digits, those of test images of other digits than those of training images."""
    pools = load_pools(**digit_files(places.digits))

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        pool = pools[index >= task.train]
        scene = mnist_scene(index, seed=0, pool=pool, size=task.size, noise=8)
        pixels[0] = scene.render(pool)
        return int(scene.label)

    return render


def sign_scenes(task: Task, places: Places) -> Render:
    """Scenes whose labels go round."""
    del places

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        label = (index if index < task.train else index - task.train) % len(LABELS)
        scene = sign_scene(index, seed=0, size_yx=(task.size, task.size), label=LABELS[label])
        for y in range(0, task.size, 64):
            pixels[:, y : y + 64] = scene.render(y, 0, 64, task.size).transpose(2, 0, 1)
        return label

    return render


def needle_scenes(task: Task, places: Places) -> Render:
    """One whole digit, whose class is the label, among scraps of others: 15 on 256 x 256 pixels."""
    pools = load_pools(**digit_files(places.digits))

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        return draw_needle(index, pixels[0], pools[index >= task.train])

    return render


def draw_needle(index: int, canvas: NDArray[np.uint8], pool: DigitPool) -> int:
    """Fill a square canvas with scraps of 14 x 14 pixels and one whole digit over them, whose class is returned."""
    rng = np.random.default_rng([1, index])
    size = len(canvas)
    canvas[:] = 0
    for _ in range(round(15 * (size / 256) ** 2)):
        scrap = pool.images[rng.integers(len(pool.images))]
        y, x = rng.integers(scrap.shape[0] - 14, size=2)
        top, left = rng.integers(size - 14, size=2)
        canvas[top : top + 14, left : left + 14] = scrap[y : y + 14, x : x + 14]
    chosen = int(rng.integers(len(pool.images)))
    digit = pool.images[chosen]
    top, left = rng.integers(size - len(digit), size=2)
    canvas[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return int(pool.labels[chosen])


def colon_images(task: Task, places: Places) -> Render:
    """The published images of colon tissue, enlarged twice; positive are those with an epithelial cell.

    The network was made for larger inputs than the 64 pixels that show a few cells here: enlarged, tiles of the same
    place give better features (mean of all tiles and logistic regression: 5 % error instead of 8.5 %).
    """
    del task
    if places.colon is None:
        raise SystemExit("colon: give the published Classification folder by --colon")
    entries = colon_cancer(places.colon)

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        small = torch.from_numpy(imagecodecs.imread(entries[index].path).transpose(2, 0, 1).astype(np.float32))
        large = functional.interpolate(small[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
        pixels[:] = large.round().clamp(0, 255).numpy()
        return int(entries[index].label == EPITHELIAL)

    return render


def slide_images(task: Task, places: Places) -> Render:
    """Slides with planted nests."""
    del task
    rows = _table(places)

    def render(index: int, pixels: NDArray[np.uint8]) -> int:
        assert places.slides is not None
        pixels[:] = tifffile.imread(places.slides / rows[index]["path"]).transpose(2, 0, 1)
        return int(rows[index]["label"] == "nests")

    return render


def _table(places: Places) -> list[dict[str, str]]:
    if places.slides is None:
        raise SystemExit("slides: give the folder that examples/sixty_slides.py wrote by --slides")
    with (places.slides / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


RENDER: dict[str, Callable[[Task, Places], Render]] = {
    "mnist": mnist_scenes,
    "signs": sign_scenes,
    "needles": needle_scenes,
    "colon": colon_images,
    "slides": slide_images,
}
