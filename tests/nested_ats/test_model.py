"""The model: shapes, independence of the batch, evaluation, and files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nested_ats import (
    ArrayImage,
    LevelConfig,
    ModelConfig,
    ModelFileError,
    NestedATS,
    attention_sampling_loss,
    load_model,
    predict,
    save_model,
)
from nested_ats.sampling import METHODS

TWO_LEVELS = ModelConfig(
    levels=(
        LevelConfig(downsample=8, samples=5, stride=4),
        LevelConfig(downsample=2, size=32, samples=6, stride=8),
    ),
    patch_size=28,
)


@pytest.fixture
def model() -> NestedATS:
    torch.manual_seed(0)
    return NestedATS(TWO_LEVELS, in_channels=3, classes=4)


def image(height: int, width: int, seed: int = 0) -> ArrayImage:
    return ArrayImage(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)), levels=4)


def test_shapes(model):
    output = model([image(200, 300), image(97, 64), image(1, 1)], torch.arange(3))
    assert output.logits.shape == (3, 4)
    assert output.entropy.shape == (3,)
    first, last = output.phases
    assert first.population.log_attention.shape == (3, 1, 7 * 10)
    assert last.population.log_attention.shape == (3, 5, 16)
    assert last.centers_l0.shape == (3, 6, 2)
    for phase in output.phases:
        path = (phase.carry[..., None] * phase.population.log_attention.exp()).flatten(1).sum(-1)
        torch.testing.assert_close(path, torch.ones(3))  # the joint list of a phase sums to one
    assert (output.entropy >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_classified_alike_in_any_batch(method):
    torch.manual_seed(0)
    config = dataclasses.replace(
        TWO_LEVELS, method=method, location=True, baseline="leave-one-out" if method == "multinomial" else "constant"
    )
    model = NestedATS(config, in_channels=3, classes=4)
    images = [image(200, 300, 1), image(97, 64, 2), image(200, 300, 3), image(130, 260, 4)]
    keys = torch.tensor([5, 6, 7, 8])
    together = model(images, keys)
    for i in range(4):
        alone = model(images[i : i + 1], keys[i : i + 1])
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(together.phases[-1].centers_l0[i], alone.phases[-1].centers_l0[0])


def test_every_parameter_gets_a_gradient(model):
    output = model([image(200, 300, i) for i in range(4)], torch.arange(4))
    loss, cross_entropy = attention_sampling_loss(
        output.logits, torch.tensor([0, 1, 2, 3]), output.entropy, entropy_weight=0.1
    )
    torch.testing.assert_close(loss, cross_entropy - 0.1 * output.entropy)
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_views_read_ahead_change_nothing(model):
    images, keys = [image(200, 300)], torch.tensor([3])
    ahead = model(images, keys, views=[model.coarse_view(images[0])])
    assert torch.equal(ahead.logits, model(images, keys).logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bf16_autocast_stays_close(method, depth):
    levels = (TWO_LEVELS.levels[0], LevelConfig(downsample=4, size=16, samples=5, stride=4), TWO_LEVELS.levels[1])
    config = ModelConfig(
        levels=levels[:depth],
        patch_size=28,
        method=method,
        baseline="leave-one-out" if method == "multinomial" else "constant",
    )
    torch.manual_seed(0)
    model = NestedATS(config, in_channels=3, classes=4)
    images, keys = [image(200, 300, i) for i in range(3)], torch.arange(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images, keys)
    assert low.logits.isfinite().all()
    for phase in low.phases:
        total = (phase.carry[..., None] * phase.population.log_attention.exp()).flatten(1).sum(-1)
        torch.testing.assert_close(total, torch.ones(3), atol=1e-4, rtol=0)
    assert (low.features.float() - model(images, keys).features).abs().max() < 0.2
    (low.logits.float().logsumexp(-1).sum() + low.entropy.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("encoder", ["lenet", "resnet"])
def test_features_have_unit_length(encoder):
    config = ModelConfig(levels=TWO_LEVELS.levels, patch_size=28, encoder=encoder)
    network = NestedATS(config, in_channels=3, classes=2)
    features = network.encode([image(64, 64)], torch.tensor([[[10.0, 10.0], [40.0, 60.0]]], dtype=torch.float64))
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 2))


def test_prediction_averages_draws_and_states_their_error(model):
    images = [image(200, 300, 1), image(200, 300, 2)]
    keys = torch.arange(16).reshape(2, 8)
    result = predict(model, images, keys)
    torch.testing.assert_close(result.probabilities.sum(-1), torch.ones(2))
    assert len(result.outputs) == 8
    mean = torch.stack([model(images, key).features for key in keys.T]).mean(0)
    torch.testing.assert_close(result.probabilities, model.head(mean).softmax(-1), atol=1e-5, rtol=1e-4)
    # The jackknife error is that of the mean: it agrees with how far the halves of many draws scatter.
    many = predict(model, images[:1], torch.arange(400).reshape(1, 400))
    eights = [predict(model, images[:1], torch.arange(8 * i, 8 * i + 8)[None]) for i in range(50)]
    scatter = torch.stack([e.probabilities for e in eights]).std(0)
    stated = torch.stack([e.standard_error for e in eights]).mean(0)
    assert ((stated / scatter - 1).abs() < 0.4).all()
    assert (many.standard_error < stated).all()
    assert predict(model, images, keys[:, :1]).standard_error.isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "at least one"),
        ({"levels": (LevelConfig(downsample=8, samples=1, size=8),)}, "first level has none"),
        ({"levels": (TWO_LEVELS.levels[0], LevelConfig(downsample=2, samples=1, size=8))}, "do not cover"),
        ({"levels": (TWO_LEVELS.levels[1], TWO_LEVELS.levels[0])}, "coarse to fine"),
        ({"encoder": "vgg"}, "encoder"),
        ({"method": "uniform"}, "method"),
        ({"baseline": "mean"}, "baseline"),
        ({"patch_size": 16}, "patch_size: lenet needs at least 24"),
        ({"features": 0}, "features"),
        ({"features": 30, "encoder": "resnet"}, "multiple of 8"),
        ({"std": 0.0}, "std"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"levels": TWO_LEVELS.levels, **changes})


def test_impossible_levels_are_refused():
    with pytest.raises(ValueError, match="multiple of stride"):
        LevelConfig(downsample=2, samples=1, size=20, stride=8)
    with pytest.raises(ValueError, match="positive"):
        LevelConfig(downsample=2, samples=0)


class TestFiles:
    def test_round_trip(self, model, tmp_path):
        save_model(tmp_path / "m", model, classes=["a", "b", "c", "d"])
        loaded, classes = load_model(tmp_path / "m")
        assert classes == ["a", "b", "c", "d"]
        assert loaded.config == model.config
        images, keys = [image(200, 300)], torch.tensor([3])
        assert torch.equal(loaded(images, keys).logits, model(images, keys).logits)

    def test_missing(self, tmp_path):
        with pytest.raises(ModelFileError, match="no such file"):
            load_model(tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\x80\x04K\x01."])
    def test_not_a_description(self, model, tmp_path, content):
        save_model(tmp_path / "m", model, classes=list("abcd"))
        (tmp_path / "m" / "config.json").write_text(content)
        with pytest.raises(ModelFileError, match=r"config\.json"):
            load_model(tmp_path / "m")

    def test_weights_that_do_not_fit(self, model, tmp_path):
        save_model(tmp_path / "m", model, classes=list("abcd"))
        description = json.loads((tmp_path / "m" / "config.json").read_text())
        description["classes"] = ["a", "b"]
        (tmp_path / "m" / "config.json").write_text(json.dumps(description))
        with pytest.raises(ModelFileError, match="do not fit"):
            load_model(tmp_path / "m")

    def test_truncated_or_pickled_weights(self, model, tmp_path):
        save_model(tmp_path / "m", model, classes=list("abcd"))
        weights = tmp_path / "m" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelFileError, match="safetensors"):
            load_model(tmp_path / "m")
        torch.save(model.state_dict(), weights)
        with pytest.raises(ModelFileError, match="safetensors"):
            load_model(tmp_path / "m")
