"""One run of `learning.py`: an arm is trained and tested with one seed, in every fold."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from learning_arms import ARMS, make_model
from learning_data import Data, Places, Task
from sklearn.metrics import roc_auc_score
from torch import Tensor

from nested_ats import attention_sampling_loss, predict
from nested_ats.models.patches import SamplingModel
from pipeline.data.augment import AugmentedImage, of_patches
from pipeline.data.features import DiskFeatures
from pipeline.data.slides import draw_key
from pipeline.sections import TrainConfig
from pipeline.training.course import KeptWeights, class_by_class, clip, entropy_weight, learning_rate, more_samples

DRAWS = (1, 4)  # of a test image: as in the paper, and as `nested-ats predict` does by default
FIRST_IMAGES = 16  # by which features are standardised


class Place(NamedTuple):
    """Where data lie and where it is computed."""

    data: Places
    weights: Path | None  # of torchvision's MobileNetV2
    device: str
    features: Path  # folder of what the frozen network makes of patches


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
    batch = round(task.batch * ARMS[arm].batch)
    course = TrainConfig(epochs=task.epochs * ARMS[arm].epochs, batch_size=batch, **task.course | ARMS[arm].train)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=course.learning_rate, weight_decay=course.weight_decay, eps=1e-6)
    if model.config.standardise:
        look_first(model, course, data, rows, seed)
    kept = KeptWeights(model, course.average)
    curve = []
    for epoch in range(course.epochs):
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
    if course.sampling == "balanced":
        order = class_by_class(order, data.labels[rows])
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
        output = model(images, keys, more=more_samples(course, progress), augment=of_patches(course.augment))
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
