"""Evaluation: draws until they agree, and the exact sum over the opened regions."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS, expectation, predict
from nested_ats.evaluation import estimate, expected_error, t_quantile
from nested_ats.maps import attention_map
from nested_ats.sampling import METHODS, draw

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
            features = torch.stack([output.features for output in result.of(row)])
            assert expected_error(model.head, features).max() <= target or draws == 40
            # As if it had been alone, and asked for just so many draws; one draw fewer was not enough.
            alone = predict(model, images[row : row + 1], keys[row : row + 1, :draws])
            torch.testing.assert_close(result.probabilities[row], alone.probabilities[0], atol=1e-5, rtol=1e-4)
            for mine, its in zip(result[1:4], alone[1:4], strict=True):  # error and interval
                torch.testing.assert_close(mine[row], its[0], atol=1e-5, rtol=1e-3)
            for mine, its in zip(result.of(row), alone.outputs, strict=True):
                assert torch.equal(mine.phases[-1].centers_l0, its.phases[-1].centers_l0)  # type: ignore[attr-defined]
            if draws > 4:
                assert expected_error(model.head, features[:-1]).max() > target

    def test_budget(self, model, images):
        keys = torch.arange(4 * 6).reshape(4, 6)
        result = predict(model, images, keys, target_error=0.0)
        assert result.draws.tolist() == [6, 6, 6, 6]
        same = predict(model, images, keys)
        assert torch.equal(result.probabilities, same.probabilities)
        assert all(torch.equal(mine, its) for mine, its in zip(result[1:4], same[1:4], strict=True))
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


def head_of(classes, scale, features=6):
    torch.manual_seed(classes)
    head = torch.nn.Linear(features, classes, dtype=torch.float64).requires_grad_(False)
    head.weight.mul_(scale)
    head.bias.copy_(-head.weight.sum(1) / 2)  # around zero, features being about a half
    return head


@pytest.fixture(scope="module", params=METHODS)
def drawn(request):
    """F_hat (8, 1500, 6) of eight draws of 16 of 200 cells, and F (1500, 6)."""
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(1500, 200, 6, generator=generator, dtype=torch.float64)
    attention = torch.randn(1500, 200, generator=generator, dtype=torch.float64).softmax(-1)
    draws = []
    for number in range(8):
        indices, z = draw(attention, 16, method=request.param, keys=torch.arange(1500) * 8 + number)
        found = features.gather(1, indices[..., None].expand(-1, -1, 6))
        draws.append(expectation(attention.gather(1, indices), found, z))
    return torch.stack(draws), (attention[..., None] * features).sum(1)


class TestIntervals:
    @pytest.mark.parametrize("draws", [2, 3, 4, 8])
    @pytest.mark.parametrize(("classes", "scale"), [(2, 1), (2, 100), (5, 1), (5, 30)])
    def test_they_hold_the_model_that_draws_nothing(self, drawn, draws, classes, scale):
        head = head_of(classes, scale)
        found, wanted = estimate(head, drawn[0][:draws]), head(drawn[1]).softmax(-1)
        assert 0.93 < ((found.low <= wanted) & (wanted <= found.high)).double().mean() < 0.97
        assert (found.low >= 0).all()
        assert (found.high <= 1).all()
        if draws == 4:  # what 1.96 standard errors hold
            off = (found.answers - wanted).abs()
            assert (off <= 1.96 * found.standard_error).double().mean() < 0.89

    def test_of_two_classes_they_mirror_each_other(self, drawn):
        found = estimate(head_of(2, 30), drawn[0][:4])
        torch.testing.assert_close(found.low[:, 0], 1 - found.high[:, 1])
        torch.testing.assert_close(found.high[:, 0], 1 - found.low[:, 1])

    def test_draws_that_agree_leave_a_point(self, drawn):
        same = drawn[0][:1].expand(4, -1, -1)
        found = estimate(head_of(3, 10), same)
        torch.testing.assert_close(found.low, found.high, atol=1e-9, rtol=0)
        assert expected_error(head_of(3, 10), same).max() < 1e-9

    @pytest.mark.parametrize(
        ("freedom", "wanted"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423), (1000, 1.9623)]
    )
    def test_student(self, freedom, wanted):
        assert t_quantile(freedom) == pytest.approx(wanted, rel=1e-4)


class TestExpectedError:
    """The head's logits are the features."""

    def test_a_saturated_slide_goes_on(self):
        """All draws lie where the softmax is flat, and a fifth of the distance that they scatter leads out of it."""
        draws = torch.tensor([3.0, 12.0, 5.0, 10.0])[:, None, None] * torch.tensor([1.0, 0.0])
        found = estimate(torch.nn.Identity(), draws)
        assert found.standard_error.max() < 0.01  # by which it would stop
        assert expected_error(torch.nn.Identity(), draws).max() > 0.05
        assert found.low[0, 0] < 0.75

    def test_it_is_the_standard_error_of_many_draws_and_more_than_that_of_few(self):
        generator = torch.Generator().manual_seed(0)
        draws = 0.2 * torch.randn(400, 50, 3, generator=generator, dtype=torch.float64)
        ratio = expected_error(torch.nn.Identity(), draws) / estimate(torch.nn.Identity(), draws).standard_error
        assert ratio.sub(1).abs().max() < 0.02
        few = draws[:4]
        ratio = expected_error(torch.nn.Identity(), few) / estimate(torch.nn.Identity(), few).standard_error
        assert 1.5 < ratio.mean() < 1.8  # of Student's t of three degrees of freedom: sqrt(3), less the curvature
