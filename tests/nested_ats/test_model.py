"""The model: shapes, independence of the batch, and evaluation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nested_ats import (
    ArrayImage,
    DeepMILConfig,
    ImpossibleWeightsError,
    LevelConfig,
    ModelConfig,
    NestedATS,
    PatchAugment,
    UniformConfig,
    UniformSampling,
    attention_sampling_loss,
    levels_for,
    predict,
)
from nested_ats.reading import run
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
    config = dataclasses.replace(TWO_LEVELS, method=method, location=True)
    model = NestedATS(config, in_channels=3, classes=4)
    images = [image(200, 300, 1), image(97, 64, 2), image(130, 260, 4), image(200, 300, 3)]
    keys = torch.tensor([5, 6, 7, 8])
    together = model(images, keys)
    for rows in ([0], [1], [2], [3], [3, 0], [1, 2, 3], [3, 2, 1, 0], [1, 1, 0]):
        other = model([images[i] for i in rows], keys[rows])
        torch.testing.assert_close(other.logits, together.logits[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.entropy, together.entropy[rows], atol=1e-5, rtol=1e-5)
        for mine, its in zip(other.phases, together.phases, strict=True):
            assert torch.equal(mine.centers_l0, its.centers_l0[rows])


def test_every_parameter_gets_a_gradient(model):
    torch.nn.init.normal_(model.attention[1].layers[-1].weight)  # it starts at zero, where what is below has none
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
        allow_gaps=True,
        method=method,
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


class Seen(ArrayImage):
    """Keeps the boxes that are read of its finest level."""

    def read(self, level, boxes):
        if level == 0:
            self.boxes = boxes
        return super().read(level, boxes)


def boxes_of(network, key, **options):
    seen = Seen(image(200, 300).read(0, torch.tensor([[0, 0, 200, 300]]))[0], levels=4)
    output = network([seen], torch.tensor([key]), **options)
    return seen.boxes, output


@pytest.mark.parametrize("kind", ["ats", "uniform"])
def test_jitter_moves_patches_alone(model, kind):
    network = model
    if kind == "uniform":
        network = UniformSampling(UniformConfig(samples=6, cell=16, patch_size=28), in_channels=3, classes=4)
    moves = []
    for key in range(100):
        plain, output = boxes_of(network, key)
        moved, other = boxes_of(network, key, augment=PatchAugment(jitter=0.25))
        assert torch.equal(moved, boxes_of(network, key, augment=PatchAugment(jitter=0.25))[0])  # by the key alone
        for phase, its in zip(output.phases, other.phases, strict=True):
            assert torch.equal(phase.drawn.indices, its.drawn.indices)
            assert torch.equal(phase.centers_l0, its.centers_l0)
        assert torch.equal(plain[:, 2:], moved[:, 2:])
        moves.append(moved[:, :2] - plain[:, :2])
    all_moves = torch.cat(moves).double()
    assert all_moves.min() == -7  # a quarter of 28 pixels, either way
    assert all_moves.max() == 7
    assert len(all_moves.unique()) == 15
    standard_error = all_moves.std(0) / len(all_moves) ** 0.5
    assert (all_moves.mean(0).abs() < 4 * standard_error).all()
    assert torch.corrcoef(all_moves.T)[0, 1].abs() < 0.2
    images = [image(200, 300), image(200, 300)]
    both = PatchAugment(0.25, 0.2)
    batch = network(images, torch.tensor([7, 0]), augment=both).logits
    torch.testing.assert_close(batch[:1], network(images[:1], torch.tensor([7]), augment=both).logits)


class Plain(torch.nn.Module):
    """In place of an encoder: the pixels themselves, which it remembers."""

    def forward(self, seen):
        self.seen = seen
        return seen.flatten(1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_warp_turns_stretches_and_shears_each_patch_about_its_centre(dtype):
    """On a ramp of rows and one of columns, the slopes of a warped patch are its map."""
    config = UniformConfig(samples=6, cell=16, patch_size=28, mean=0.0, std=1.0)
    network = UniformSampling(config, in_channels=3, classes=4)
    network.encoder = Plain()
    network.head = torch.nn.Linear(3 * 28 * 28, 4)
    rows, columns = torch.meshgrid(torch.arange(60) * 4, torch.arange(60) * 4, indexing="ij")
    pixels = torch.stack([rows, columns, torch.full_like(rows, 100)]).to(dtype)
    scene = ArrayImage(pixels / 255 if dtype.is_floating_point else pixels)
    offsets = torch.stack(torch.meshgrid(*2 * [torch.arange(28) - 13.5], indexing="ij")).flatten(1)
    maps = []
    for key in range(300):
        output = network([scene], torch.tensor([key]), augment=PatchAugment(warp=0.2))
        centers = output.phases[0].centers_l0[0].float()
        inner = ((centers - 30).abs() < 30 - 14 * 1.4 - 1).all(-1)  # whose wider boxes lie within the image
        seen = network.encoder.seen[inner].flatten(2) * 255
        torch.testing.assert_close(seen[:, 2], torch.full_like(seen[:, 2], 100.0))
        middles = seen[:, :2].mean(-1) / 4
        assert ((middles - centers[inner] + 0.5).abs() <= 0.51).all()
        steps = seen[:, :2] / 4 - middles[..., None]
        slopes = steps @ offsets.T / offsets.square().sum(-1)
        torch.testing.assert_close(slopes @ offsets, steps, atol=1e-3, rtol=0)
        maps.append(slopes)
    changes = (torch.cat(maps) - torch.eye(2)).flatten(1)
    assert 0.19 < changes.max() < 0.201
    assert -0.201 < changes.min() < -0.19
    assert (changes.mean(0).abs() < 4 * changes.std(0) / len(changes) ** 0.5).all()
    assert (torch.corrcoef(changes.T) - torch.eye(4)).abs().max() < 0.3


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
    alone = predict(model, images, keys[:, :1])
    assert all(part.isnan().all() for part in (alone.standard_error, alone.low, alone.high))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_says_so(model, value):
    with torch.no_grad():
        model.attention[1].layers[-1].weight[0, 0] = value
    with pytest.raises(ImpossibleWeightsError):
        model([image(200, 300)], torch.tensor([0]))


def test_a_region_as_large_as_the_cell_above_covers_it_whatever_the_rounding():
    above = LevelConfig(downsample=3.6, samples=1, stride=2)
    below = LevelConfig(downsample=1.2, samples=1, size=6, stride=1)
    assert below.downsample * 6 < above.extent_l0
    assert ModelConfig(levels=(above, below)).levels[1].size == 6


@pytest.mark.parametrize("downsample", [1, 1.5])
def test_patches_must_cover_the_cells_that_they_are_drawn_from(downsample):
    """Gaps between patches could never be seen, like those between regions."""
    last = LevelConfig(downsample=16, samples=4)  # cells of 128
    patch = {"patch_size": 32, "patch_downsample": downsample}
    for make in (
        lambda **more: ModelConfig(levels=(last,), **patch, **more),
        lambda **more: ModelConfig(
            levels=(TWO_LEVELS.levels[0], LevelConfig(downsample=8, size=8, samples=1)), **patch, **more
        ),
        lambda **more: UniformConfig(cell=64, **patch, **more),
        lambda **more: DeepMILConfig(stride=64, **patch, **more),
    ):
        with pytest.raises(
            ValueError, match=rf"(levels\[[01]\]\.stride|cell|stride): .* = {32 * downsample:g} .*allow_gaps"
        ):
            make()
        assert make(allow_gaps=True).patch_size == 32
    ModelConfig(levels=(LevelConfig(downsample=1.1, samples=1, stride=30),), patch_size=30, patch_downsample=1.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "at least one"),
        ({"levels": (LevelConfig(downsample=8, samples=1, size=8),)}, "first level has none"),
        ({"levels": (TWO_LEVELS.levels[0], LevelConfig(downsample=2, samples=1, size=8))}, "do not cover"),
        ({"levels": (TWO_LEVELS.levels[1], TWO_LEVELS.levels[0])}, "coarse to fine"),
        ({"encoder": "vgg"}, "encoder"),
        ({"method": "uniform"}, "method"),
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


@pytest.mark.parametrize(
    ("side", "downsamples"),
    [(500, [1]), (1024, [2]), (4096, [8]), (8192, [16, 4]), (32768, [64, 16, 4]), (65536, [128, 32, 8])],
)
def test_the_rule_for_levels(side, downsamples):
    assert [level.downsample for level in levels_for((side // 2, side))] == downsamples


@pytest.mark.parametrize("method", ["pivotal", "systematic", "desraj"])
def test_a_budget_beyond_all_cells_opens_each_once(method):
    """It takes what there is: a budget a thousand times as large reads, computes and answers the same."""
    images, keys = [image(200, 300), image(97, 64)], torch.arange(2)

    def classify(first, last):
        levels = (
            dataclasses.replace(TWO_LEVELS.levels[0], samples=first),
            dataclasses.replace(TWO_LEVELS.levels[1], samples=last),
        )
        torch.manual_seed(0)
        config = dataclasses.replace(TWO_LEVELS, levels=levels, method=method)
        return NestedATS(config, in_channels=3, classes=4).double()(
            [ArrayImage(i.read(0, torch.tensor([[0, 0, *i.shapes[0]]]))[0].double(), levels=4) for i in images], keys
        )

    few, many = classify(70, 70 * 16), classify(70_000, 10**7)
    assert many.phases[1].population.log_attention.shape == (2, 70, 16)
    assert many.phases[1].centers_l0.shape == (2, 70 * 16, 2)
    torch.testing.assert_close(many.logits, few.logits)
    torch.testing.assert_close(many.entropy, few.entropy)


def test_standardised_features_have_mean_zero_and_spread_one_before_they_get_unit_length():
    torch.manual_seed(0)
    model = NestedATS(dataclasses.replace(TWO_LEVELS, standardise=True), in_channels=3, classes=4).eval()
    scenes = [image(200, 300, seed) for seed in range(3)]
    with torch.no_grad():
        with model.gather_moments() as moments:
            found = [model([scene], torch.tensor([seed])).phases[-1].centers_l0 for seed, scene in enumerate(scenes)]
        before = [model.encode([scene], places)[0] for scene, places in zip(scenes, found, strict=True)]
        model.standardise_by(moments)
        after = [model.encode([scene], places)[0] for scene, places in zip(scenes, found, strict=True)]
    assert moments[0].tolist() == [3 * 6] * model.features
    plain = torch.cat(
        [
            model._encode_seen(model._prepare(run(model._read(scene, places[0]))[0]))
            for scene, places in zip(scenes, found, strict=True)
        ]
    )
    torch.testing.assert_close(torch.cat(before), torch.nn.functional.normalize(plain, dim=-1))
    spread = plain.std(0, correction=0)
    assert (spread > 0.01 * spread.mean()).any()
    wanted = (plain - plain.mean(0)) / spread.clamp_min(0.01 * spread.mean())
    torch.testing.assert_close(torch.cat(after), torch.nn.functional.normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5)
    model([scenes[0]], torch.tensor([9]))
    assert moments[0].tolist() == [3 * 6] * model.features  # nothing is added after the block


def test_features_that_never_differ_are_left_where_they_are():
    model = NestedATS(dataclasses.replace(TWO_LEVELS, standardise=True), in_channels=3, classes=4)
    model.standardise_by(torch.zeros(3, model.features, dtype=torch.float64))
    assert model(([image(200, 300)]), torch.tensor([1])).logits.isfinite().all()
