"""A whole study, all folds, by us and by what others do: AUC with intervals, seconds, and bytes read off slides.

*colon*: the 100 published images, enlarged twice as in `learning.py`, ten folds; has an image an epithelial cell?
*idrid*: fundus photographs of half the size, the official split, without byte-identical pairs; is the retinopathy
of grade 2 or more? Both are pyramids, of which the same frozen MobileNetV2 sees tiles of 128 x 128 pixels.

*ours* draws 25 tiles of a slide by attention, by `train` and `predict`, with a store of features that the folds
share; *ours, HED* changes the amounts of stains in training, so that no features can be kept. The others encode all
tiles first, once for all folds, and then learn from those in memory: *ABMIL* (gated attention; Ilse et al., 2018),
*CLAM-style* (with a loss on the 8 tiles of most and of least attention; Lu et al., 2021, whose smooth SVM is
cross-entropy here), and *mean-pooling* with a logistic regression. *CNN* trains the whole network, from the same
weights, on whole images at half the scale, a quarter of what the tiles are enlarged to.
All train for a fixed number of epochs, and no choice is made by a test fold; settings are those of this file.

Each piece, a fold of a method, is written to the result file when it is done, and a rerun does only what is missing.
Seconds, those of the processor, and bytes of a study are those of its folds and, of methods over all tiles, of
encoding, once; those of an epoch are a fold's, test included, by its epochs, the median of folds. A piece that was
interrupted begins anew, for us with the features that are kept, and is marked so.

    python benchmarks/study.py --data ../shared/data --work FOLDER [--tasks colon] [--methods ours ABMIL ...]
                               [--seeds 0 1 2] [--results FILE] [--show] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import safetensors.torch
import torch
from made_with import made_with, print_versions
from numpy.typing import NDArray
from sixty_slides_auc import AttentionPool
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.networks.encoders import build_encoder
from nested_ats.networks.presets import IMAGENET_MEAN, IMAGENET_STD
from pipeline.config import Config, parse_config
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.files import write_atomic, write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.results.intervals import area, area_interval, area_parts
from pipeline.results.predict import predict
from pipeline.training.train import train
from storage import Slide, write_pyramid

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from example_data.published import EPITHELIAL, colon_cancer

RESULTS = Path(__file__).parent / "results" / "study_cpu.json"
WEIGHTS = Path("weights/mobilenet_v2-b0353104.pth")
TILE, DRAWN = 128, 25  # pixels of a tile; tiles of a slide that are drawn
OURS, HED, ABMIL, CLAM, MEAN, CNN = METHODS = ("ours", "ours, HED", "ABMIL", "CLAM-style", "mean-pooling", "CNN")
KEY = ("task", "seed", "method", "fold")  # of a piece
ENCODING = "encoding"  # the piece that methods over all tiles share
BACKGROUND = {"colon": 1.0, "idrid": 0.0}
YES, NO = "yes", "no"
FOLDS = 10
TOLD = 8  # tiles of most and of least attention that have a loss of their own
EPOCHS = {OURS: 20, HED: 20, CNN: 10, ABMIL: 30, CLAM: 30}
STAINS = 0.05  # `train.augment.hed`


def colon(data: Path) -> list[tuple[Entry, Path]]:
    """Images and their labels, in no split."""
    folder = data / "colon-cancer/CRCHistoPhenotypes_2016_04_28/Classification"
    entries = colon_cancer(folder)
    return [(replace(entry, label=YES if entry.label == EPITHELIAL else NO), Path(entry.path)) for entry in entries]


def idrid_grades(data: Path) -> list[tuple[Entry, Path]]:
    """Photographs of the official split and their grades, without those of which there is a copy."""
    found = []
    for split in ("train", "test"):
        with (data / "idrid-half" / f"{split}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                path = data / "idrid-half" / row["image"]
                grade = row["retinopathy_grade"]
                found.append((Entry(slide_id=f"{split}-{path.stem}", path="", label=grade, split=split), path))
    digests = [hashlib.sha256(path.read_bytes()).digest() for _, path in found]
    counts = Counter(digests)
    return [each for each, digest in zip(found, digests, strict=True) if counts[digest] == 1]


def idrid(data: Path) -> list[tuple[Entry, Path]]:
    """The same, asked for grade 2 and above."""
    return [(replace(entry, label=YES if int(entry.label) >= 2 else NO), path) for entry, path in idrid_grades(data)]


def referable(graded: Sequence[Entry]) -> list[Entry]:
    """Entries of `idrid_grades` without grade 1, asked for grade 2 and above."""
    return [replace(entry, label=YES if int(entry.label) >= 2 else NO) for entry in graded if entry.label != "1"]


def make_slides(task: str, data: Path, work: Path) -> list[Entry]:
    """Pyramids of the images, made where they are not there."""
    entries = []
    for entry, image in {"colon": colon, "idrid": idrid, "idrid grades": idrid_grades}[task](data):
        path = work / f"{entry.slide_id}.ome.zarr"
        if not (path / "zarr.json").exists():
            pixels = imagecodecs.imread(image).transpose(2, 0, 1)
            if task == "colon":
                small = torch.from_numpy(pixels.astype(np.float32))[None]
                large = functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)[0]
                pixels = large.round().clamp(0, 255).to(torch.uint8).numpy()
            write_pyramid(path, np.ascontiguousarray(pixels), overwrite=True)
        entries.append(replace(entry, path=str(path)))
    return entries


def folds_of(entries: Sequence[Entry], seed: int = 0) -> list[list[Entry]]:
    """The entries of each fold, all with a split."""
    if entries[0].split:
        return [list(entries)]
    labels = [entry.label for entry in entries]
    split = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels)
    return [
        [replace(entry, split="test" if row in held else "train") for row, entry in enumerate(entries)]
        for held in (set(test.tolist()) for _, test in split)
    ]


@contextmanager
def counted() -> Iterator[list[SlideImage]]:
    """List all slides that are opened meanwhile, whose counts stay when they are closed."""
    opened: list[SlideImage] = []
    original = SlideImage.__init__

    def keep(self: SlideImage, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        opened.append(self)

    SlideImage.__init__ = keep  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        SlideImage.__init__ = original  # type: ignore[method-assign]


def configure(task: str, method: str, weights: Path, store: Path, epochs: int, seed: int) -> Config:
    """Return the configuration of a method that the product trains."""
    encoder = {"name": "mobilenet_v2", "weights": str(weights)}
    course: dict[str, Any] = {"epochs": epochs, "batch_size": 4, "sampling": "balanced"}
    if method == CNN:
        model: dict[str, Any] = {"kind": "cnn", "encoder": encoder, "downsample": 2}
        course |= {"learning_rate": 1e-4, "augment": {"flip": True}}
    else:
        level = {"downsample": 8, "stride": TILE // 8, "samples": DRAWN, "channels": [16, 16]}
        model = {"levels": [level], "patch_size": TILE, "encoder": encoder, "trainable": "none", "standardise": True}
        course |= {"learning_rate": 3e-3, "early_samples": 1}
        course |= {"augment": {"hed": STAINS}} if method == HED else {}
    data = {"background": BACKGROUND[task], "features": {"folder": str(store)}}
    return parse_config({"seed": seed, "model": model, "train": course, "data": data}, f"{task}, {method}")


def by_product(entries: list[Entry], config: Config, folder: Path) -> dict[str, Any]:
    """Train and test a fold by `train` and `predict`."""
    shutil.rmtree(folder, ignore_errors=True)
    began, used = time.monotonic(), time.process_time()
    with counted() as opened:
        train(entries, config, folder, device="cpu")
        held = [entry for entry in entries if entry.split == "test"]
        rows = predict(held, folder, folder / "test", device="cpu")
    read = {id(image.slide): image.statistics.bytes_read for image in opened}
    if failed := [row["error"] for row in rows if row["status"] != "ok"]:
        raise SystemExit(failed[0])
    scores = {row["slide_id"]: round(row[f"prob_{YES}"], 6) for row in rows}
    return {"scores": scores, **_since(began, used), "bytes": sum(read.values())}


@torch.no_grad()
def encode(entries: Sequence[Entry], weights: Path, background: float, place: Path) -> dict[str, Any]:
    """Write the features (K, D) of all tiles of each slide."""
    began, used, read = time.monotonic(), time.process_time(), 0
    built = build_encoder({"name": "mobilenet_v2", "weights": str(weights)}, in_channels=3, patch_size=TILE)
    encoder = built.module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    bags = {}
    for entry in entries:
        with Slide(entry.path) as slide:
            image = SlideImage(slide, background=background)
            corners = torch.cartesian_prod(*(torch.arange(0, side, TILE) for side in image.shapes[0]))
            boxes = torch.cat([corners, torch.full_like(corners, TILE)], -1)
            parts = [(image.read(0, part) / 255 - mean) / std for part in boxes.split(64)]
            found = [encoder(part.contiguous(memory_format=torch.channels_last)) for part in parts]
            bags[entry.slide_id] = torch.cat(found)
            read += image.statistics.bytes_read
    write_atomic(place, safetensors.torch.save(bags))
    return {"scores": {}, **_since(began, used), "bytes": read}


class ClamPool(AttentionPool):
    """Gated attention that also tells, of each class, the tiles of most from those of least attention."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.tellers = nn.ModuleList([nn.Linear(256, 2) for _ in range(2)])

    def losses(self, bag: Tensor, label: int) -> Tensor:
        """Return 0.7 of the bag's and 0.3 of the tiles' cross-entropy, as CLAM weighs them."""
        projected = self.project(bag)
        attention = self.weight(self.value(projected).tanh() * self.gate(projected).sigmoid()).squeeze(1)
        logits = self.head((attention.softmax(0)[:, None] * projected).sum(0))
        ranked = projected[attention.argsort(descending=True)]
        count = min(TOLD, len(bag) // 2)
        told = self.tellers[label](torch.cat([ranked[:count], ranked[-count:]]))
        sides = torch.tensor([1] * count + [0] * count)
        of_bag = functional.cross_entropy(logits[None], torch.tensor([label]))
        return 0.7 * of_bag + 0.3 * functional.cross_entropy(told, sides)


def pool(
    method: str, bags: list[Tensor], labels: list[int], train: list[int], epochs: int, seed: int = 0
) -> list[float]:
    """Scores of all slides by a method over all tiles, learned from some."""
    if method == MEAN:
        means = torch.stack([bag.mean(0) for bag in bags]).numpy()
        found = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        found.fit(means[train], [labels[row] for row in train])
        scores: list[float] = found.predict_proba(means)[:, 1].tolist()
        return scores
    torch.manual_seed(seed)
    model = ClamPool(bags[0].shape[1]) if method == CLAM else AttentionPool(bags[0].shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, weight_decay=1e-5)
    for _ in range(epochs):
        for row in torch.tensor(train)[torch.randperm(len(train))].tolist():
            if isinstance(model, ClamPool):
                loss = model.losses(bags[row], labels[row])
            else:
                loss = functional.cross_entropy(model(bags[row])[None], torch.tensor([labels[row]]))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        return [model.eval()(bag).softmax(-1)[1].item() for bag in bags]


def by_pooling(method: str, entries: list[Entry], features: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Train and test a fold over all tiles, whose features are there."""
    began, used = time.monotonic(), time.process_time()
    kept = safetensors.torch.load_file(features)
    bags = [kept[entry.slide_id] for entry in entries]
    rows = [row for row, entry in enumerate(entries) if entry.split == "train"]
    scores = pool(method, bags, [int(entry.label == YES) for entry in entries], rows, epochs, seed)
    held = {e.slide_id: round(s, 6) for e, s in zip(entries, scores, strict=True) if e.split == "test"}
    return {"scores": held, **_since(began, used), "bytes": 0}


class Study:
    """The pieces of a task and a seed, each kept as it is done."""

    def __init__(self, task: str, seed: int, data: Path, work: Path, path: Path, *, quick: bool) -> None:
        self.task, self.seed, self.work, self.path = task, seed, work / task, path
        self.work.mkdir(parents=True, exist_ok=True)
        self.weights = (data / WEIGHTS).absolute()
        entries = make_slides(task, data, self.work)
        self.folds = folds_of(entries, seed)
        self.epochs = {**dict.fromkeys(METHODS, 1), **({} if quick else EPOCHS)}
        if quick:
            self.folds = [fold[:12] + fold[-12:] for fold in self.folds[:2]]
        self.features = self.work / "features.safetensors"
        kept = json.loads(path.read_text()) if path.exists() else {"labels": {}, "pieces": []}
        self.results: dict[str, Any] = kept
        self.results["labels"][task] = {entry.slide_id: entry.label for entry in entries}

    def run(self, methods: Sequence[str]) -> None:
        """Do what is missing, one fold of all methods after the other."""
        done = {_key(each) for each in self.results["pieces"]}
        pieces = [(method, fold) for fold in range(len(self.folds)) for method in methods]
        if {ABMIL, CLAM, MEAN}.intersection(methods):
            pieces.insert(0, (ENCODING, 0))
        for method, fold in pieces:
            again = method == ENCODING and not self.features.exists()
            if again or self._key(method, fold) not in done:
                self._keep(method, fold)

    def _key(self, method: str, fold: int) -> tuple[Any, ...]:
        """The values of `KEY`; an encoding depends on no seed."""
        return (self.task, 0 if method == ENCODING else self.seed, method, fold)

    def _keep(self, method: str, fold: int) -> None:
        mark = self.work / "begun"
        resumed = mark.exists() and mark.read_text() == f"{method} {fold} {self.seed}"
        mark.write_text(f"{method} {fold} {self.seed}")
        found = self._piece(method, fold)
        mark.unlink()
        print(f"{self.task}, {method}, seed {self.seed}, fold {fold}: {found['seconds']:.0f} s", flush=True)
        piece = {
            **dict(zip(KEY, self._key(method, fold), strict=True)),
            **found,
            "resumed": resumed,
            "versions": made_with(),
        }
        # There may be an encoding whose file is gone.
        others = [each for each in self.results["pieces"] if _key(each) != _key(piece)]
        self.results["pieces"] = [*others, piece]
        write_json(self.path, self.results)

    def _piece(self, method: str, fold: int) -> dict[str, Any]:
        entries = self.folds[fold]
        if method == ENCODING:
            return encode(entries, self.weights, BACKGROUND[self.task], self.features)
        if method in (ABMIL, CLAM, MEAN):
            return by_pooling(method, entries, self.features, self.epochs[method], self.seed)
        config = configure(self.task, method, self.weights, self.work / "store", self.epochs[method], self.seed)
        return by_product(entries, config, self.work / "run")


def show(results: dict[str, Any]) -> None:
    """Print a table a task and seed: pooled AUC, its difference from ours, errors, seconds and bytes of the study."""
    for task, labels in results["labels"].items():
        pieces = [each for each in results["pieces"] if each["task"] == task]
        encoding = [each for each in pieces if each["method"] == ENCODING]
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in sorted({each["seed"] for each in pieces}):
            print(f"\n{task}, seed {seed}: {len(labels)} images")
            rows = show_seed([each for each in pieces if each["seed"] == seed], labels, encoding)
            for method, values in rows.items():
                found.setdefault(method, []).append(values)
        for method, seeds in found.items():
            areas, errors = zip(*seeds, strict=True)
            print(
                f"{method}, median and range of {len(seeds)} seeds: "
                f"AUC {statistics.median(areas):.3f} [{min(areas):.3f}, {max(areas):.3f}], "
                f"error {statistics.median(errors):.1%} [{min(errors):.1%}, {max(errors):.1%}]"
            )
    print_versions(results["pieces"])


def show_seed(
    pieces: Sequence[dict[str, Any]], labels: dict[str, str], encoding: Sequence[dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Print the table of a task and a seed; return AUC and error of each method."""
    print(f"{'method':14}{'folds':>6}{'AUC [95 %]':>24}{'ours is higher by':>26}{'error':>8}", end="")
    print(f"{'seconds':>9}{'of CPU':>9}{'an epoch':>9}{'MB read':>9}")
    ours, told = _scores(pieces, OURS), {}
    for method in METHODS:
        own = [each for each in pieces if each["method"] == method]
        scores = _scores(pieces, method)
        truth = np.array([labels[name] == YES for name in scores], dtype=np.int64)
        if len(set(truth.tolist())) < 2:
            continue
        both = [*own, *(encoding if method in (ABMIL, CLAM, MEAN) else [])]
        columns = _columns(scores)
        auc = area(truth, columns)
        low, high = area_interval(truth, columns, np.arange(len(truth)))[0]
        error = float((columns.argmax(1) != truth).mean())
        less = _difference(labels, scores, ours) if method != OURS and scores.keys() <= ours.keys() else ""
        sums = [sum(each[name] for each in both) for name in ("seconds", "cpu_seconds", "bytes")]
        epoch = statistics.median(each["seconds"] for each in own) / EPOCHS.get(method, 1)
        print(f"{method:14}{len(own):6}{f'{auc:.3f} [{low:.3f}, {high:.3f}]':>24}{less:>26}", end="")
        print(f"{error:8.1%}{sums[0]:9.0f}{sums[1]:9.0f}{epoch:9.2f}{sums[2] / 1e6:9.0f}")
        told[method] = (auc or math.nan, error)
    return told


def _key(piece: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(piece[name] for name in KEY)


def _since(began: float, used: float) -> dict[str, float]:
    """Seconds, and those of the processor, which other work on the machine hardly changes."""
    took, computed = time.monotonic() - began, time.process_time() - used
    return {"seconds": round(took, 1), "cpu_seconds": round(computed, 1)}


def _scores(pieces: Sequence[dict[str, Any]], method: str) -> dict[str, float]:
    return {name: value for each in pieces if each["method"] == method for name, value in each["scores"].items()}


def _columns(scores: dict[str, float]) -> NDArray[np.float64]:
    positive = np.array(list(scores.values()))
    return np.stack([1 - positive, positive], 1)


def _difference(labels: dict[str, str], scores: dict[str, float], ours: dict[str, float]) -> str:
    """Our area less theirs on the same images, with DeLong's paired interval."""
    truth = np.array([labels[name] == YES for name in scores], dtype=np.int64)
    pair = [_columns({name: each[name] for name in scores}) for each in (scores, ours)]
    parts = [area_parts(truth, each, np.arange(len(truth)))[0] for each in pair]
    one, other = (area(truth, each) or math.nan for each in pair)
    reach = 1.96 * math.sqrt(float(((parts[1] - parts[0]) ** 2).sum()))
    return f"{other - one:+.3f} [{other - one - reach:+.3f}, {other - one + reach:+.3f}]"


def main() -> None:
    """Do the pieces that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with colon-cancer, idrid-half and weights")
    parser.add_argument("--work", type=Path, help="folder for pyramids, features and runs: 1 GB, with idrid 8 GB")
    parser.add_argument("--tasks", nargs="+", choices=list(BACKGROUND), default=list(BACKGROUND))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of folds and trainings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: two folds of 24 images, one epoch")
    chosen = parser.parse_args()
    if not chosen.show:
        if not (chosen.data and chosen.work):
            parser.error("--data and --work are needed")
        chosen.work = chosen.work / "quick" if chosen.quick else chosen.work
        chosen.work.mkdir(parents=True, exist_ok=True)
        chosen.results = chosen.work / "quick.json" if chosen.quick else chosen.results
        for task, seed in itertools.product(chosen.tasks, chosen.seeds):
            Study(task, seed, chosen.data, chosen.work, chosen.results, quick=chosen.quick).run(chosen.methods)
        print(f"\npython {' '.join(sys.argv)}")
    show(json.loads(chosen.results.read_text()))


if __name__ == "__main__":
    run_main(main, RESUMABLE)
