"""The benchmark's estimators have the mean of the product's: value, and gradient of the attention."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nested_ats import ArrayImage, LevelConfig, ModelConfig
from nested_ats.phases import take_all

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

from estimators import ControlledATS, RememberingATS

ONE = (LevelConfig(downsample=4, stride=2, samples=5),)
TWO = (
    LevelConfig(downsample=4, stride=2, group=2, samples=3),
    LevelConfig(downsample=2, size=8, stride=2, samples=5),
)


def estimates(model, image, draws, sampler=None):
    """Estimates of F along a direction, (draws,), and the mean gradient of the first attention network."""
    model.zero_grad()
    keys = torch.arange(draws)
    along = model([image] * draws, keys, sampler=sampler).features @ torch.linspace(-1, 1, model.features)
    along.mean().backward()
    return along.detach(), torch.cat([each.grad.flatten() for each in model.attention[0].parameters()])


def image_and(kind, levels, **options):
    torch.manual_seed(3)
    model = kind(ModelConfig(levels=levels, patch_size=24, **options), in_channels=1, classes=2)
    for network in model.attention:  # a map far from flat, at every level
        torch.nn.init.normal_(network.layers[-1].weight, std=3.0)
    image = ArrayImage(torch.rand(1, 64, 64), levels=3)
    image.identity = "an image"  # type: ignore[attr-defined]
    return image, model


def same(model, image, draws=3000):
    """The mean over draws is what all cells together give; returns the variance of a draw."""
    exact, slope = estimates(model, image, 1, take_all)
    drawn, slopes = estimates(model, image, draws)
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / draws**0.5 + 1e-6
    assert (slopes - slope).norm() < 0.1 * slope.norm()
    return float(drawn.var())


@pytest.mark.slow
@pytest.mark.parametrize("levels", [ONE, TWO])
def test_a_control_variate_leaves_the_mean_and_lowers_the_variance(levels):
    image, model = image_and(ControlledATS, levels)
    plain = same(model.eval(), image)
    assert model._coefficients().abs().max() == 0
    model.train()
    with torch.no_grad():
        for step in range(20):
            model([image] * 8, torch.arange(8) + 10_000 + 8 * step)
    assert model.told["explained"] > 0.02
    assert same(model.eval(), image) < plain


@pytest.mark.slow
def test_what_is_remembered_is_summed_and_the_rest_is_drawn():
    image, model = image_and(RememberingATS, ONE, trainable="none")
    model.train()
    with torch.no_grad():
        for step in range(6):
            model([image], torch.tensor([step]))
    known, table = model._memory[image.identity]
    assert 5 < int(known.sum()) < known.numel()
    before = known.clone(), table.clone()

    class Stays(dict):  # what one draw of many finds must not help the next
        def __getitem__(self, name):
            return before[0].clone(), before[1].clone()

    model._memory = Stays(model._memory)
    remembered = same(model, image)
    assert remembered < float(estimates(model.eval(), image, 3000)[0].var())
    model.train()._memory = {image.identity: (torch.ones_like(known), table)}
    first, second = (model([image], torch.tensor([key])).features for key in (1, 2))
    assert torch.equal(first, second)  # all is known: nothing is left to chance
