"""Evaluation: draws until they agree, and the exact sum over the opened regions."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS, predict
from nested_ats.maps import attention_map
from nested_ats.sampling import METHODS

TWO_LEVELS = (LevelConfig(downsample=8, samples=5, stride=4), LevelConfig(downsample=2, size=32, samples=6, stride=8))


def image(height: int, width: int, seed: int = 0) -> ArrayImage:
    return ArrayImage(torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)), levels=4)


@pytest.fixture
def model() -> NestedATS:
    torch.manual_seed(0)
    network = NestedATS(ModelConfig(levels=TWO_LEVELS, patch_size=28), in_channels=3, classes=4)
    with torch.no_grad():
        network.head.weight.mul_(20)  # probabilities that differ from draw to draw
    return network


class TestAdaptive:
    @pytest.fixture
    def images(self):
        return [image(200, 300, 1), image(260, 130, 4), image(97, 64, 2), image(130, 260, 3)]

    def test_an_image_stops_when_its_error_is_small_and_the_others_go_on(self, model, images):
        keys = torch.arange(4 * 40).reshape(4, 40)
        target = 0.02
        result = predict(model, images, keys, target_error=target, least=4)
        assert result.draws.min() < result.draws.max() <= 40
        assert len(result.outputs) == result.draws.max()
        for row, draws in enumerate(result.draws.tolist()):
            assert len(result.of(row)) == draws >= 4
            error = result.standard_error[row].max()
            assert error <= target or draws == 40
            # As if it had been alone, and asked for just so many draws; one draw fewer was not enough.
            alone = predict(model, images[row : row + 1], keys[row : row + 1, :draws])
            torch.testing.assert_close(result.probabilities[row], alone.probabilities[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(result.standard_error[row], alone.standard_error[0], atol=1e-5, rtol=1e-3)
            for mine, its in zip(result.of(row), alone.outputs, strict=True):
                assert torch.equal(mine.phases[-1].centers_l0, its.phases[-1].centers_l0)
            if draws > 4:
                fewer = predict(model, images[row : row + 1], keys[row : row + 1, : draws - 1])
                assert fewer.standard_error.max() > target

    def test_budget(self, model, images):
        keys = torch.arange(4 * 6).reshape(4, 6)
        result = predict(model, images, keys, target_error=0.0)
        assert result.draws.tolist() == [6, 6, 6, 6]
        same = predict(model, images, keys)
        assert torch.equal(result.probabilities, same.probabilities)
        assert torch.equal(result.standard_error, same.standard_error)
        loose = predict(model, images, keys, target_error=1.0, least=2)
        assert loose.draws.tolist() == [2, 2, 2, 2]

    def test_outputs_of_one_image_make_its_map(self, model, images):
        keys = torch.arange(4 * 20).reshape(4, 20)
        result = predict(model, images, keys, target_error=0.05)
        alone = predict(model, images[2:3], keys[2:3, : result.draws[2]])
        one, _ = attention_map(result.of(2), (97, 64))
        two, _ = attention_map(alone.outputs, (97, 64))
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize(
        ("keys", "least"), [(torch.zeros(4, dtype=torch.int64), 4), (torch.zeros(4, 0), 4), (torch.zeros(4, 3), 1)]
    )
    def test_wrong_arguments(self, model, images, keys, least):
        with pytest.raises(ValueError, match="keys"):
            predict(model, images, keys, least=least)


class TestExact:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_it_is_the_sum_over_all_leaves_of_the_drawn_regions(self, tiny_model, tiny_image, method, depth):
        """Against a budget at the last level that takes every leaf."""
        model, picture = tiny_model(depth, method=method), tiny_image(depth)
        levels = model.config.levels
        wide = (*levels[:-1], LevelConfig(**{**vars(levels[-1]), "samples": 64}))
        every = NestedATS(
            ModelConfig(levels=wide, patch_size=24, features=4, method=method), in_channels=1, classes=3
        )
        every = every.double()
        every.load_state_dict(model.state_dict())
        keys = torch.arange(6)[None]
        exact, wanted = predict(model, [picture], keys, exact=2), predict(every, [picture], keys)
        torch.testing.assert_close(exact.probabilities, wanted.probabilities, atol=1e-12, rtol=0)
        torch.testing.assert_close(exact.standard_error, wanted.standard_error, atol=1e-9, rtol=0)
        assert exact.draws.tolist() == [1 if depth == 1 else 6]
        assert (exact.standard_error == 0).all() == (depth == 1)

    def test_memory_is_that_of_a_chunk(self, model):
        seen = []
        model.encoder.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
        result = predict(model, [image(200, 300), image(97, 64, 1)], torch.zeros(2, 1, dtype=torch.int64), exact=7)
        leaves = (result.outputs[0].phases[-1].z > 0).sum().item()
        assert max(seen) == 7
        assert sum(seen) == leaves == 2 * 5 * 16 - (result.outputs[0].phases[-1].z == 0).sum().item()

    def test_it_varies_less_than_drawing(self, model):
        images = [image(200, 300, 1)]
        keys = torch.arange(40)[None]
        assert (
            predict(model, images, keys, exact=64).standard_error.max()
            < predict(model, images, keys).standard_error.max()
        )

    def test_the_map_is_that_of_the_drawn_regions(self, model):
        images, keys = [image(200, 300, 1)], torch.arange(3)[None]
        exact, _ = attention_map(predict(model, images, keys, exact=64).outputs, (200, 300))
        drawn, _ = attention_map(predict(model, images, keys).outputs, (200, 300))
        torch.testing.assert_close(exact, drawn)

    def test_bf16_autocast(self, model):
        images, keys = [image(200, 300, 1)], torch.arange(2)[None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = predict(model, images, keys, exact=64)
        assert low.outputs[0].features.dtype == torch.float32
        high = predict(model, images, keys, exact=64)
        assert (low.outputs[0].features - high.outputs[0].features).abs().max() < 0.1
