"""The course of a training, and the weights that are kept of it."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.sections import TrainConfig
from pipeline.training.course import PAPERS_COURSE, KeptWeights, clip, entropy_weight, learning_rate, more_samples


def test_the_default_course():
    course = TrainConfig(learning_rate=2.0, warmup=0.1, entropy_weight=0.4, entropy_fade=0.5, early_share=0.2)
    assert learning_rate(course, 0.05) == pytest.approx(1.0)
    assert learning_rate(course, 0.1) == pytest.approx(2.0)
    assert learning_rate(course, 0.55) == pytest.approx(1.0)
    assert learning_rate(course, 1.0) == pytest.approx(0.0)
    assert [entropy_weight(course, p) for p in (0, 0.25, 0.5, 0.9)] == pytest.approx([0.4, 0.2, 0, 0])
    assert [more_samples(course, p) for p in (0, 0.19, 0.2, 1)] == [4, 4, 1, 1]


def test_the_paper_s_course_changes_nothing():
    course = TrainConfig(**PAPERS_COURSE)
    for progress in (0.0, 0.3, 0.999):
        assert learning_rate(course, progress) == course.learning_rate
        assert entropy_weight(course, progress) == course.entropy_weight
        assert more_samples(course, progress) == 1


def test_the_average_lags_behind_and_the_best_is_kept():
    layer = torch.nn.Linear(1, 1)
    kept = KeptWeights(layer, 0.5)
    for step in range(1, 8):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        kept.update()
        with kept.applied():
            assert layer.weight.item() < step
            kept.judge({3: 0.2, 5: 0.1, 6: math.nan}.get(step, 0.5))
            if step == 5:
                best = layer.weight.item()
        assert layer.weight.item() == step
    assert kept.stale == 2
    restored = KeptWeights(torch.nn.Linear(1, 1), 0.5)
    restored.load(kept.state())
    for each, stale in ((kept, 2), (restored, 2)):
        assert each.stale == stale
        each.use_best()
        assert each._live[0].item() == pytest.approx(best)


def test_without_an_average_the_last_weights_are_kept():
    layer = torch.nn.Linear(2, 2)
    kept = KeptWeights(layer, 0.0)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    kept.update()
    kept.use_best()
    assert (layer.weight == 3).all()


def test_gradients_are_clipped_together():
    layer = torch.nn.Linear(2, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    clip(list(layer.parameters()), 0.0)
    assert layer.bias.grad[0] == 10
    clip(list(layer.parameters()), 1.0)
    norm = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)
