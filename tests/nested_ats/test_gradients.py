"""Derivatives: against finite differences in double precision, over workers, and in bf16."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from nested_ats import (
    ArrayImage,
    DeepMILConfig,
    Draw,
    ImageModel,
    LevelConfig,
    ModelConfig,
    NestedATS,
    Output,
    UniformConfig,
    attention_sampling_loss,
    build_model,
    entropy,
    expectation,
)
from nested_ats.sampling import METHODS


class Replay:
    """The sampler that draws again what a model has drawn, whatever the weights are now."""

    def __init__(self, output: Output) -> None:
        self._draws = [phase.drawn for phase in output.phases]

    def __call__(self, weights: Tensor, n: int, keys: Tensor) -> Draw:
        return self._draws.pop(0)


def image(seed: int, height: int = 60, width: int = 80) -> ArrayImage:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ArrayImage(pixels, levels=4)


def check(model: ImageModel, images: list[ArrayImage], **again: object) -> None:
    """Compare every parameter's derivative of logits and entropy with finite differences, the draw being fixed."""
    names, values = zip(*model.named_parameters(), strict=True)
    keys = torch.arange(len(images))
    before = model(images, keys)

    def run(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        options = {"sampler": Replay(before)} if again.get("replay") else {}
        output = functional_call(model, dict(zip(names, parameters, strict=True)), (images, keys), options)
        return output.logits, output.entropy

    assert gradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_whole_model(tiny_model, tiny_image, method, depth):
    check(tiny_model(depth, method=method), [tiny_image(depth)] * 3, replay=True)


def test_the_model_of_independent_levels(tiny_model, tiny_image):
    check(tiny_model(3, attention="independent"), [tiny_image(3)] * 3, replay=True)


def test_the_model_whose_maps_are_finer_than_what_is_drawn(tiny_model, tiny_image):
    check(tiny_model(3, group=2), [tiny_image(3)] * 3, replay=True)


def test_the_model_that_is_told_the_location(tiny_model, tiny_image):
    check(tiny_model(2, location=True), [tiny_image(2)] * 3, replay=True)


@pytest.mark.parametrize(
    "config",
    [
        DeepMILConfig(patch_size=28, stride=20, features=4, chunk=5, attention_features=6),
        DeepMILConfig(patch_size=28, stride=20, features=4, chunk=5, attention_features=6, attention="gated"),
        DeepMILConfig(patch_size=28, stride=20, features=4, chunk=5, attention_features=6, location=True),
        UniformConfig(patch_size=28, samples=3, cell=16, features=4),
    ],
    ids=["plain", "gated", "location", "uniform"],
)
def test_baselines(config):
    torch.manual_seed(0)
    model = build_model(config, in_channels=3, classes=3).double()
    check(model, [image(1), image(2, 33, 41)])


def test_expectation_and_entropy():
    torch.manual_seed(0)
    logits = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    z = torch.rand(2, 7, dtype=torch.float64)
    assert gradcheck(lambda a, f: expectation(a.softmax(-1), f, z), (logits, features))
    impossible = torch.tensor([False, True] + [False] * 5)
    assert gradcheck(lambda a: entropy(a.masked_fill(impossible, -torch.inf).log_softmax(-1)), (logits,))


LEVELS = (
    LevelConfig(downsample=8, samples=5, stride=2),
    LevelConfig(downsample=4, size=8, samples=5, stride=2),
    LevelConfig(downsample=2, size=8, samples=6, stride=2),
)


def gradient(model: ImageModel, images: list[ArrayImage], keys: Tensor, **options: object) -> Tensor:
    """The gradient of the summed training loss by all parameters."""
    output = model(images, keys, **options)
    loss, _ = attention_sampling_loss(output.logits.double(), keys % 3, output.entropy, entropy_weight=0.05)
    parts = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([part.flatten().double() for part in parts if part is not None])


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_the_gradient_does_not_depend_on_how_a_batch_is_shared_out(workers):
    """Slides of several sizes, shares of several lengths: the sum over the shares is the gradient of the batch."""
    torch.manual_seed(0)
    config = ModelConfig(levels=LEVELS, patch_size=24, features=8)
    model = NestedATS(config, in_channels=3, classes=3).double()
    images = [image(0), image(1, 33, 41), image(2), image(3, 97, 50), image(4, 33, 41)]
    keys = torch.arange(5) + 20
    whole = gradient(model, images, keys)
    shares = [gradient(model, images[i::workers], keys[i::workers]) for i in range(workers)]
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(torch.stack(shares).sum(0), whole, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_gradient_in_bf16_is_near_that_in_float32(depth):
    torch.manual_seed(0)
    config = ModelConfig(levels=LEVELS[:depth], patch_size=24, features=16)
    model = NestedATS(config, in_channels=3, classes=3)
    images, keys = [image(i) for i in range(4)], torch.arange(4)
    drawn = model(images, keys)
    high = gradient(model, images, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = gradient(model, images, keys, sampler=Replay(drawn))
        freely = model(images, keys)
    assert torch.cosine_similarity(low, high, dim=0) > 0.99
    assert low.norm().item() == pytest.approx(high.norm().item(), rel=0.1)
    for phase in freely.phases:  # what bf16 draws by itself is a draw
        joint = (phase.carry[..., None] * phase.population.log_attention.exp()).flatten(1)
        torch.testing.assert_close(joint.sum(-1), torch.ones(4), atol=1e-5, rtol=0)
        torch.testing.assert_close((phase.z * phase.attention).sum(-1), torch.ones(4), atol=1e-5, rtol=0)
        assert (phase.drawn.indices.diff(dim=-1) > 0)[phase.drawn.z[:, 1:] > 0].all()


def test_float32_is_near_double():
    torch.manual_seed(0)
    single = NestedATS(ModelConfig(levels=LEVELS, patch_size=24, features=16), in_channels=3, classes=3)
    images, keys = [image(i) for i in range(4)], torch.arange(4)
    low = gradient(single, images, keys)
    drawn = single(images, keys)
    double = NestedATS(dataclasses.replace(single.config), in_channels=3, classes=3)
    double.load_state_dict(single.state_dict())
    high = gradient(double.double(), images, keys, sampler=Replay(drawn))
    assert (low - high).norm() < 1e-4 * high.norm()
