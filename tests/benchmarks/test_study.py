"""Methods over all tiles learn a planted sign; folds part images once; copies are left out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

import study

from pipeline.data.manifest import Entry
from pipeline.results.intervals import area


@pytest.mark.parametrize("method", [study.ABMIL, study.CLAM, study.MEAN])
def test_methods_over_all_tiles_learn(method):
    generator = torch.Generator().manual_seed(0)
    bags, labels = [], [number % 2 for number in range(60)]
    for label in labels:
        bag = torch.randn(20, 32, generator=generator)
        bag[:8, 0] += 6.0 * label
        bags.append(bag)
    scores = study.pool(method, bags, labels, list(range(40)), 20)
    held = np.array(scores[40:])
    assert area(np.array(labels[40:]), np.stack([1 - held, held], 1)) > 0.95


def test_every_image_is_tested_once():
    entries = [Entry(slide_id=str(i), path="", label=("no", "yes")[i % 2]) for i in range(100)]
    folds = study.folds_of(entries)
    assert sorted(e.slide_id for fold in folds for e in fold if e.split == "test") == sorted(map(str, range(100)))
    assert all(len(fold) == 100 for fold in folds)


@pytest.mark.data
def test_copies_are_left_out(data):
    found = study.idrid(data)
    names = {entry.slide_id for entry, _ in found}
    assert len(names) == len(found) == 516 - 12
    assert {"train-IDRiD_079", "train-IDRiD_118", "test-IDRiD_064"}.isdisjoint(names)
