"""The authors' published gradient over *all* draws: biased by the logits of the attention, as `sampling.md` says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS, draw, expectation
from nested_ats.testing import outcomes

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import what lies beside them

from authors_gradient import AuthorsATS, AuthorsExpectation, draw_in_order

SIZES = [(6, 3), (7, 4)]  # cells, drawn


def authors(attention, features, noise, n):
    drawn = draw_in_order(attention.expand(len(noise), -1), n, noise).indices
    return AuthorsExpectation.apply(attention[drawn], features[drawn])


def ours(attention, features, noise, n):
    indices, z = draw(attention.expand(len(noise), -1), n, method="desraj", noise=noise)
    return expectation(attention[indices], features[indices], z)


def means(estimate, cells, n, *, peak, seed):
    """Value, gradient by the logits and gradient by the features: their means over all draws, and the true ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = peak * torch.randn(cells, generator=generator, dtype=torch.float64)
    features, direction = torch.randn(cells + 1, 5, generator=generator, dtype=torch.float64).split([cells, 1])
    attention, features = logits.requires_grad_().softmax(0), features.clone().requires_grad_()
    noise, probability = outcomes("desraj", attention.detach(), n)
    both = probability @ estimate(attention, features, noise, n), attention @ features
    return [
        (value, *torch.autograd.grad(value @ direction[0], [logits, features], retain_graph=True)) for value in both
    ]


def bias(cells, n, *, peak):
    """Bias of the authors' gradient by the logits, relative to the true gradient: of five populations."""
    found = [means(authors, cells, n, peak=peak, seed=seed) for seed in range(5)]
    return torch.stack([(mean[1] - true[1]).norm() / true[1].norm() for mean, true in found])


@pytest.mark.parametrize(("cells", "n"), SIZES)
def test_their_gradient_by_the_logits_is_biased_and_the_more_so_as_attention_peaks(cells, n):
    flat, peaked = bias(cells, n, peak=0.5), bias(cells, n, peak=2.0)
    assert (torch.cat([flat, peaked]) > 0.5).all()
    assert (torch.cat([flat, peaked]) < 1.4).all()
    assert peaked.median() > 1.3 * flat.median()


@pytest.mark.parametrize(("cells", "n"), SIZES)
def test_their_value_and_gradient_by_the_features_are_unbiased(cells, n):
    (value, _, by_features), (true, _, true_by_features) = means(authors, cells, n, peak=1.5, seed=0)
    torch.testing.assert_close(value, true, atol=1e-10, rtol=0)
    torch.testing.assert_close(by_features, true_by_features, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("cells", "n"), SIZES)
def test_ours_are_unbiased(cells, n):
    for mean, true in zip(*means(ours, cells, n, peak=1.5, seed=0), strict=True):
        torch.testing.assert_close(mean, true, atol=1e-10, rtol=0)


def test_the_models_draw_alike_and_differ_in_the_gradient_of_the_attention_alone():
    level = LevelConfig(downsample=2, samples=5, stride=4, channels=(3,))
    config = ModelConfig(levels=(level,), patch_size=24, method="desraj")
    image = ArrayImage(torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(0)), levels=2)
    outputs, by_attention, by_encoder = [], [], []
    for kind in (AuthorsATS, NestedATS):
        torch.manual_seed(0)
        model = kind(config, in_channels=1, classes=3)
        with torch.no_grad():  # attention that peaks
            model.attention[0].layers[-1].weight.mul_(60)
        outputs.append(model([image] * 4, torch.arange(4)))
        outputs[-1].logits.logsumexp(-1).sum().backward()
        by_attention.append(model.attention[0].layers[0].weight.grad)
        by_encoder.append(model.encoder.layers[0].weight.grad)
    theirs, our = (output.phases[0].drawn.indices for output in outputs)
    assert not torch.equal(theirs, our)  # listed in the order drawn
    assert torch.equal(theirs.sort(-1).values, our)
    torch.testing.assert_close(outputs[0].features, outputs[1].features)
    torch.testing.assert_close(*by_encoder)
    assert (by_attention[0] - by_attention[1]).norm() > 0.1 * by_attention[1].norm()
