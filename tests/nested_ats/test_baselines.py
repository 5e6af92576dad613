"""The models that attention sampling is compared with: what they compute, and that they can stand in its place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from nested_ats import (
    CNN,
    ArrayImage,
    CNNConfig,
    DeepMIL,
    DeepMILConfig,
    ImageModel,
    LevelConfig,
    ModelConfig,
    ModelFileError,
    NestedATS,
    UniformConfig,
    UniformSampling,
    attention_sampling_loss,
    build_model,
    load_model,
    predict,
    save_model,
)
from nested_ats.maps import attention_map

CONFIGS = {
    "ats": ModelConfig(levels=(LevelConfig(downsample=4, samples=3, stride=4),), patch_size=28),
    "deepmil": DeepMILConfig(patch_size=28, stride=20, chunk=5),
    "gated": DeepMILConfig(patch_size=28, stride=20, attention="gated", recompute=True, chunk=4, location=True),
    "uniform": UniformConfig(patch_size=28, samples=3, cell=16),
    "cnn": CNNConfig(downsample=2, features=8),
    "cnn8": CNNConfig(encoder="resnet8", features=16),
}


def image(height: int = 60, width: int = 80, seed: int = 0) -> ArrayImage:
    return ArrayImage(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)), levels=3)


@pytest.fixture(params=CONFIGS)
def model(request) -> ImageModel:
    torch.manual_seed(0)
    return build_model(CONFIGS[request.param], in_channels=3, classes=4)


def test_one_interface(model, tmp_path):
    """One training step, which is the same for all kinds."""
    images, keys = [image(), image(33, 41, 1), image(60, 80, 2)], torch.arange(3)
    views = [model.coarse_view(each) for each in images]
    output = model(images, keys, views=views)
    assert output.logits.shape == (3, 4)
    assert output.entropy.shape == (3,)
    assert output.features.shape == (3, model.features)
    assert torch.equal(output.logits, model(images, keys).logits)
    labels = torch.tensor([0, 1, 2])
    loss, _ = attention_sampling_loss(output.logits, labels, output.entropy, entropy_weight=0.1)
    loss.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    for i in range(3):
        alone = model(images[i : i + 1], keys[i : i + 1])
        torch.testing.assert_close(output.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.entropy[i], alone.entropy[0], atol=1e-5, rtol=1e-5)


def test_files(model, tmp_path):
    save_model(tmp_path / "m", model, classes=list("abcd"))
    loaded, classes = load_model(tmp_path / "m", expect=ImageModel)
    assert (type(loaded), classes, loaded.config) == (type(model), list("abcd"), model.config)
    assert torch.equal(loaded([image()], torch.tensor([1])).logits, model([image()], torch.tensor([1])).logits)
    if not isinstance(model, NestedATS):
        with pytest.raises(ModelFileError, match=f"kind {model.config.kind}, where NestedATS is wanted"):
            load_model(tmp_path / "m")


def test_prediction_and_map(model):
    keys = torch.arange(10).reshape(2, 5)
    images = [image(), image(33, 41, 1)]
    result = predict(model, images, keys)
    torch.testing.assert_close(result.probabilities.sum(-1), torch.ones(2))
    drawn = isinstance(model, NestedATS | UniformSampling)
    assert result.draws.tolist() == ([5, 5] if drawn else [1, 1])
    assert (result.standard_error > 0).all() if drawn else (result.standard_error == 0).all()
    below, above = result.probabilities - result.low, result.high - result.probabilities
    assert ((below > 0) & (above > 0)).all() if drawn else ((below == 0) & (above == 0)).all()
    if isinstance(model, CNN):
        with pytest.raises(ValueError, match="no attention"):
            attention_map(result.outputs, (60, 80))
    else:
        density, _ = attention_map(result.of(1), (33, 41))
        assert density.sum().item() == pytest.approx(1)


def test_bf16_autocast_stays_close(model):
    images, keys = [image(), image(33, 41, 1)], torch.arange(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images, keys)
    assert low.logits.isfinite().all()
    high = model(images, keys)
    if isinstance(model, DeepMIL):
        total = low.phases[0].attention.sum(-1)
        torch.testing.assert_close(total, torch.ones(2), atol=1e-4, rtol=0)
    if not isinstance(model, NestedATS):  # whose draws may turn on the last bit
        torch.testing.assert_close(low.features.float(), high.features, atol=0.1, rtol=0.1)


class TestDeepMIL:
    @pytest.mark.parametrize("name", ["deepmil", "gated"])
    def test_equations_of_ilse(self, name):
        """Their equations 7 to 9, written out over the grid in row-major order."""
        torch.manual_seed(0)
        model = DeepMIL(dataclasses.replace(CONFIGS[name], location=False), in_channels=3, classes=4)  # type: ignore[call-arg]
        picture = image(60, 80)
        y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
        starts = torch.stack([y.flatten(), x.flatten()], -1) * 20 + 10 - 14
        patches = picture.read(0, torch.cat([starts, torch.full_like(starts, 28)], -1))
        h = functional.normalize(model.encoder((patches - 0.5) / 0.25), dim=-1)
        pooling = model.pooling
        v = torch.tanh(h @ pooling.hidden.weight.T + pooling.hidden.bias)
        if name == "gated":
            v = v * torch.sigmoid(h @ pooling.gate.weight.T + pooling.gate.bias)
        a = (v @ pooling.logit.weight[0]).softmax(0)
        output = model([picture], torch.tensor([0]))
        torch.testing.assert_close(output.features[0], a @ h, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.entropy[0], -(a * a.log()).sum(), atol=1e-5, rtol=1e-5)
        assert output.phases[0].centers_l0.shape == (1, 12, 2)

    @pytest.mark.parametrize("shape", [((960, 1280), 100, 80, 192), ((500, 500), 27, 10, 2500)])
    def test_grids_of_the_paper(self, shape):
        """Sections 4.3 and 4.4: 2,500 patches of 500 x 500 pixels, 12 x 16 of 960 x 1280."""
        size, patch, stride, count = shape

        class Blank:
            shapes, downsamples = [size], [1.0]

            def read(self, level, boxes):
                return torch.zeros(len(boxes), 1, patch, patch)

        config = DeepMILConfig(patch_size=patch, stride=stride, features=2)
        with torch.no_grad():
            output = DeepMIL(config, in_channels=1, classes=2)([Blank()], torch.tensor([0]))
        assert output.phases[0].population.log_attention.shape == (1, 1, count)

    def test_chunks_and_recomputing_change_neither_value_nor_gradient(self):
        base = CONFIGS["deepmil"]
        results = []
        for options in ({"chunk": 1000}, {"chunk": 5}, {"chunk": 5, "recompute": True}):
            torch.manual_seed(0)
            model = DeepMIL(dataclasses.replace(base, **options), in_channels=3, classes=4).double()
            output = model([image(), image(90, 50, 1)], torch.arange(2))
            grads = torch.autograd.grad(output.logits.square().sum(), list(model.parameters()))
            results.append(torch.cat([output.logits.flatten(), *(g.flatten() for g in grads)]))
        torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=0)
        torch.testing.assert_close(results[0], results[2], atol=1e-10, rtol=0)

    def test_no_more_than_a_chunk_is_encoded_at_a_time(self):
        model = DeepMIL(CONFIGS["deepmil"], in_channels=3, classes=4)
        seen = []
        model.encoder.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
        model([image()], torch.tensor([0]))
        assert seen == [5, 5, 2]


class TestUniform:
    def test_it_is_the_mean_of_distinct_patches(self):
        torch.manual_seed(0)
        model = UniformSampling(CONFIGS["uniform"], in_channels=3, classes=4)
        keys = torch.arange(200)
        images = [image()] * 200
        output = model(images, keys)
        phase = output.phases[0]
        assert phase.population.log_attention.shape == (200, 1, 20)
        assert (phase.drawn.indices.diff(dim=-1) > 0).all()
        torch.testing.assert_close(phase.z * phase.attention, torch.full((200, 3), 1 / 3))
        features = model.encode(images, phase.centers_l0)
        torch.testing.assert_close(output.features, features.mean(1), atol=1e-6, rtol=1e-5)
        counts = phase.drawn.indices.flatten().bincount(minlength=20)  # 30 each, binomial
        assert ((counts - 30).abs() < 4.5 * (30 * 0.85) ** 0.5).all()
        torch.testing.assert_close(output.entropy, torch.full((200,), 20.0).log())

    def test_more_patches_than_cells_takes_each_once(self):
        model = UniformSampling(UniformConfig(patch_size=40, samples=9, cell=40), in_channels=3, classes=4)
        output = model([image()], torch.tensor([0]))
        phase = output.phases[0]
        assert (phase.z[0] > 0).sum() == 4
        exact = predict(model, [image()], torch.tensor([[0]]), exact=3)
        torch.testing.assert_close(exact.outputs[0].features, output.features, atol=1e-6, rtol=1e-5)

    def test_cells_are_those_of_the_attention_model(self):
        level = LevelConfig(downsample=4, samples=3, stride=4)
        ats = NestedATS(ModelConfig(levels=(level,), patch_size=28), in_channels=3, classes=2)
        uniform = UniformSampling(UniformConfig(patch_size=28, cell=level.extent_l0), in_channels=3, classes=2)
        for size in [(60, 80), (33, 41), (128, 128)]:
            images, keys = [image(*size)], torch.tensor([0])
            one, two = ats(images, keys).phases[0].population, uniform(images, keys).phases[0].population
            assert torch.equal(one.centers_l0, two.centers_l0)


def test_cnn_sees_the_whole_image_at_its_downsample():
    torch.manual_seed(0)
    model = CNN(CONFIGS["cnn"], in_channels=3, classes=4)
    picture = image()
    view = model.coarse_view(picture)
    assert view.shape == (3, 30, 40)
    output = model([picture], torch.tensor([0]))
    torch.testing.assert_close(output.logits, model.head(model.encoder((view[None] - 0.5) / 0.25)))
    assert output.entropy.tolist() == [0.0]
    assert output.phases == ()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepMILConfig(stride=0), "stride"),
        (lambda: DeepMILConfig(attention="max"), "attention"),
        (lambda: DeepMILConfig(patch_size=8), "patch_size"),
        (lambda: DeepMILConfig(patch_downsample=0.5), "patch_downsample"),
        (lambda: UniformConfig(samples=0), "samples"),
        (lambda: CNNConfig(downsample=0.5), "downsample"),
        (lambda: CNNConfig(encoder="ilse"), "whole images"),
    ],
)
def test_impossible_configurations_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_configurations_name_the_levels_that_they_read():
    assert {name: config.downsamples for name, config in CONFIGS.items()} == {
        "ats": (4, 1), "deepmil": (1,), "gated": (1,), "uniform": (1,), "cnn": (2,), "cnn8": (1,)
    }  # fmt: skip
