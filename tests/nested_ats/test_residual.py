"""Residual attention: nothing added, a nested model is the one-level model of its coarsest map."""

from __future__ import annotations

import math

import pytest
import torch

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS
from nested_ats.models.residual import group_logits, inherited

# Coarse to fine: downsample, size, stride, group. Grids that nest, and such that do not.
TREES = {
    "two levels": [(8, None, 2, 4), (2, 32, 8, 1)],
    "two levels, finer cells": [(8, None, 2, 4), (2, 32, 4, 1)],
    "two levels, coarser cells": [(8, None, 2, 4), (2, 32, 16, 1)],
    "three levels": [(8, None, 1, 4), (4, 8, 2, 2), (2, 8, 4, 1)],
    "cells of thirds": [(8, None, 2, 3), (2, 24, 6, 1)],
    "regions with a rim": [(8, None, 2, 4), (2, 40, 4, 1)],
}


def build(tree, **options):
    levels = tuple(
        LevelConfig(downsample=d, size=size, stride=stride, group=group, samples=1000, channels=(4,))
        for d, size, stride, group in tree
    )
    torch.manual_seed(0)
    config = ModelConfig(levels=levels, patch_size=32, **options)
    model = NestedATS(config, in_channels=3, classes=2).double()
    with torch.no_grad():
        model.attention[0].layers[-1].weight.mul_(20)
    return model


def density(output, shape, pitch=2):
    """Attention of every `pitch` x `pitch` pixels, by spreading each leaf evenly over its cell."""
    last = output.phases[-1]
    grid = torch.zeros(shape[0] // pitch, shape[1] // pitch, dtype=torch.float64)
    half = last.population.extent_l0 / 2
    weights = (last.z > 0) * last.attention.detach()
    for weight, (y, x) in zip(weights[0].tolist(), last.centers_l0[0].tolist(), strict=True):
        top, left = max(round((y - half) / pitch), 0), max(round((x - half) / pitch), 0)
        part = grid[top : round((y + half) / pitch), left : round((x + half) / pitch)]
        part += weight / part.numel()
    return grid


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_nothing_added_it_is_the_coarsest_map(tree):
    """A finer cell may lie across several of the parent's, whose attention it has by area."""
    image = ArrayImage(torch.rand(3, 192, 192, dtype=torch.float64), levels=4)
    model = build(tree)
    d, _, stride, _ = tree[0]
    flat = build([(d, None, stride, 1)])
    flat.attention[0].load_state_dict(model.attention[0].state_dict())
    key = torch.tensor([0])
    found, wanted = density(model([image], key), (192, 192)), density(flat([image], key), (192, 192))
    # Over squares that cells of both make up, in pixels of the density.
    pool = torch.nn.AvgPool2d(math.lcm(tree[-1][0] * tree[-1][2], d * stride) // 2)
    torch.testing.assert_close(pool(found[None]), pool(wanted[None]), atol=1e-12, rtol=1e-9)
    assert found.sum().item() == pytest.approx(1)
    assert wanted.max() > 3 * wanted.mean()


def test_the_coarse_network_hears_of_each_cell():
    """A region's logit is that of its cells together, so that the gradient tells them apart."""
    cells = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(group_logits(cells), cells.flatten(-2).logsumexp(-1))
    group_logits(cells)[0, 0].backward()
    torch.testing.assert_close(cells.grad[0, 0], cells[0, 0].flatten().softmax(0).view(3, 3))


def test_impossible_cells_have_no_gradient_and_no_share():
    cells = torch.full((1, 2, 2, 2), -torch.inf, dtype=torch.float64)
    cells[0, 0] = torch.tensor([[0.5, -torch.inf], [1.0, 2.0]])
    cells.requires_grad_()
    logits = group_logits(cells)
    assert logits[0, 1] == -torch.inf
    finer = inherited(cells, torch.zeros(1, 2, 2, dtype=torch.float64), 0.5, 4)
    assert (finer[0, 0, :2, 2:] == -torch.inf).all()
    assert (finer[0, 1] == -torch.inf).all()
    torch.testing.assert_close(finer[0, 0].logsumexp((0, 1)), logits[0, 0])
    (logits[0, 0] + finer[0, 0][finer[0, 0] > -torch.inf].sum()).backward()
    assert cells.grad.isfinite().all()
    assert (cells.grad[0, 1] == 0).all()


def test_what_a_finer_network_adds_moves_attention_within_its_region():
    image = ArrayImage(torch.rand(3, 192, 192, dtype=torch.float64), levels=4)
    model = build(TREES["two levels"])
    before = model([image], torch.tensor([0])).phases
    with torch.no_grad():
        torch.nn.init.uniform_(model.attention[1].layers[-1].weight, 5, 10)
    after = model([image], torch.tensor([0])).phases
    torch.testing.assert_close(before[0].attention, after[0].attention)
    assert (before[1].attention - after[1].attention).abs().max() > 1e-3
