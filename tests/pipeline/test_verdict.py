"""The verdict on a model that has learned nothing, and on one that has learned."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nested_ats import (
    ArrayImage,
    CNNConfig,
    DeepMILConfig,
    LevelConfig,
    ModelConfig,
    UniformConfig,
    build_model,
)
from nested_ats.estimators import uniform_entropy
from nested_ats.models.patches import spread
from nested_ats.targets import Classes, Cox, Regression
from pipeline.results.verdict import Observer, class_shares, guess_cross_entropy, is_background, run_shares, verdict

GOOD = {"loss": 0.3, "guess": 0.69, "ranked": 0.9, "interval": (0.7, 0.97), "entropy": 4.0, "uniform": 8.3}
WORDS = [
    ({}, ""),
    ({"ranked": None, "interval": None}, ""),
    ({"background": 0.89}, ""),
    (
        {"loss": 0.69, "ranked": 0.52, "interval": (0.38, 0.66), "entropy": 8.25, "background": 0.96},
        (
            "has learned nothing yet: cross-entropy 0.690 is that of guessing by class frequencies (0.690); "
            "AUC 0.52 [0.38, 0.66] contains 0.5; attention is uniform (entropy 8.25 of 8.30); "
            "96% of the drawn patches are background"
        ),
    ),
    (
        {"loss": 1.2, "ranked": None, "interval": None},
        "has learned nothing yet: cross-entropy 1.200 is worse than that of guessing by class frequencies (0.690)",
    ),
    (
        {"loss": 1.2},
        (
            "ranks better than chance (AUC 0.90 [0.70, 0.97]), but its probabilities do not: "
            "cross-entropy 1.200 is worse than that of guessing by class frequencies (0.690)"
        ),
    ),
    (
        {"interval": (0.4, 0.99)},
        "cannot be told from guessing by its ranking; AUC 0.90 [0.40, 0.99] contains 0.5",
    ),
    (
        {"ranked": 0.2, "interval": (0.1, 0.4)},
        "cannot be told from guessing by its ranking; AUC 0.20 [0.10, 0.40] lies below 0.5",
    ),
    ({"entropy": 8.3}, "attention is uniform (entropy 8.30 of 8.30)"),
    ({"entropy": 0.0, "uniform": 0.0}, ""),  # a model without attention
    ({"background": 0.9}, "90% of the drawn patches are background"),
]


@pytest.mark.parametrize(("signs", "words"), WORDS)
def test_words(signs, words):
    assert verdict(Classes(("a", "b")), **(GOOD | signs)) == words


def test_words_of_other_targets():
    """They are judged by their own measure, whose chance is elsewhere, and named by their own loss."""
    good = {"loss": 0.3, "guess": 1.0}
    number = Regression(0.0, 1.0)
    assert verdict(number, **good, ranked=0.4, interval=(0.1, 0.6)) == ""
    said = verdict(number, **good, ranked=0.2, interval=(-0.1, 0.5))
    assert said == "cannot be told from guessing by its ranking; spearman 0.20 [-0.10, 0.50] contains 0"
    assert verdict(number, loss=1.0, guess=1.0) == (
        "has learned nothing yet: squared error 1.000 is that of guessing (1.000)"
    )
    assert verdict(Cox(), loss=-0.5, guess=-0.1, ranked=0.7, interval=(0.6, 0.8)) == ""
    said = verdict(Cox(), loss=-0.1, guess=-0.1, ranked=0.5, interval=(0.4, 0.6))
    assert (
        "partial likelihood -0.100 is that of guessing (-0.100); concordance 0.50 [0.40, 0.60] contains 0.5" in said
    )


def test_guessing():
    shares = class_shares(["a", "a", "a", "b"], ["a", "b"])
    assert shares == {"a": 0.75, "b": 0.25}
    assert guess_cross_entropy(shares, ["b", "a"]) == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2)
    assert class_shares(["a", "a", "a", "b"], ["a", "b"], balanced=True) == {"a": 0.5, "b": 0.5}
    rows = [{"label": label, "split": split} for label, split in (("a", "train"), ("b", "train"), ("b", "test"))]
    rows = [row | {"extra": {}} for row in rows]
    config = {"train": {"class_weights": "none"}, "target": {"column": "label"}}
    run = {"entries": rows, "target": Classes(("a", "b")).plain, "config": config}
    assert run_shares(run) == {"a": 0.5, "b": 0.5}
    assert run_shares(run | {"target": Cox().plain}) == {}


def test_background_is_what_hardly_varies():
    generator = torch.Generator().manual_seed(0)
    glass = 0.94 + 0.01 * torch.randn(3, 64, 64, generator=generator)
    nucleus = glass.clone()
    nucleus[:, 20:30, 20:30] = 0.4
    black, off = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)
    red = torch.zeros(3, 64, 64)
    red[0] = torch.rand(64, 64, generator=generator)
    patches = (torch.stack([glass, nucleus, black, off, red]) - 0.5) / 0.25
    assert is_background(spread(patches)).tolist() == [True, False, True, True, False]


NESTED = ModelConfig(
    levels=(LevelConfig(downsample=8, samples=5, stride=4), LevelConfig(downsample=2, size=32, samples=6, stride=8)),
    patch_size=28,
)
KINDS = {
    "ats": NESTED,
    "deepmil": DeepMILConfig(patch_size=28, stride=20),
    "uniform": UniformConfig(patch_size=28, samples=3, cell=16.0),
    "cnn": CNNConfig(downsample=2.0, features=8),
}


def test_uniform_entropy_is_that_of_a_flat_attention():
    torch.manual_seed(0)
    model = build_model(replace(NESTED, attention="independent"), in_channels=3, classes=2)
    with torch.no_grad():
        for parameter in model.attention.parameters():
            parameter.zero_()
    image = ArrayImage(torch.rand(3, 200, 300), levels=4)
    output = model([image, image], torch.tensor([0, 1]))
    torch.testing.assert_close(uniform_entropy(output.phases), output.entropy)
    assert output.entropy[0].item() == pytest.approx(
        math.log(7 * 10 * 16), rel=0.1
    )  # regions at the border have fewer cells


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_observer_sees_of_every_kind(kind):
    """Patches are counted of a model that draws, and a uniform entropy is given of one whose attention learns."""
    torch.manual_seed(0)
    model = build_model(KINDS[kind], in_channels=3, classes=2)
    observer = Observer(model)
    pixels = torch.rand(3, 200, 300)
    pixels[:, :, 150:] = 0.0
    output = model([ArrayImage(pixels, levels=4)], torch.tensor([0]))
    background, patches = observer.take().tolist()
    assert patches == {"ats": 6, "uniform": 3}.get(kind, 0)
    assert 0 <= background <= patches
    assert observer.take().tolist() == [0, 0]
    assert (observer.uniform_entropy(output) > 0).item() == (kind in ("ats", "deepmil"))
