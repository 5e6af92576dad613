"""Value and gradient of the nested estimator over *all* outcomes equal those of the full model."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, Draw, LevelConfig, ModelConfig, NestedATS, draw
from nested_ats.cells import curve_order
from nested_ats.sampling import METHODS, fold_in
from nested_ats.testing import outcomes


class Enumerate:
    """A sampler under which row b of the batch plays the b-th of all combinations of outcomes.

    The outcomes of a phase depend on what was drawn before, so each row's are worked out from its own weights;
    `probability` is the product along the way. Rows beyond the last combination play one again, with probability 0.
    """

    def __init__(self, method: str, rows: int) -> None:
        self.method = method
        self.rest = torch.arange(rows)  # what is left of the row's number: a mixed-radix counter
        self.path = torch.ones(rows, dtype=torch.float64)

    @property
    def probability(self) -> torch.Tensor:
        return self.path * (self.rest == 0)

    def __call__(self, weights: torch.Tensor, n: int, keys: torch.Tensor) -> Draw:
        each = [outcomes(self.method, row, n) for row in weights]
        most = max(len(p) for _, p in each)
        digit = self.rest % most
        self.rest = self.rest // most
        # A row with fewer outcomes than the radix plays its first again, with probability zero.
        noise = torch.stack([a[d] if d < len(a) else a[0] for (a, _), d in zip(each, digit, strict=True)])
        chance = torch.stack([p[d] if d < len(p) else 0 * p[0] for (_, p), d in zip(each, digit, strict=True)])
        self.path = self.path * chance
        return draw(weights, n, method=self.method, noise=noise)


def count(method: str, depth: int) -> int:
    """Rows enough for all combinations: 3 cells, then 2 x 2 cells a phase, two drawn of each."""
    per_phase = {"multinomial": (9, 16), "desraj": (6, 12), "systematic": (4, 5), "pivotal": (6, 12)}[method]
    return per_phase[0] * per_phase[1] ** (depth - 1)


def gradients(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


CASES = [
    *((method, {}) for method in METHODS),
    ("pivotal", {"location": True}),
    ("pivotal", {"attention": "independent"}),
    ("pivotal", {"group": 2}),
    ("multinomial", {"group": 2}),
]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_value_and_gradient_are_unbiased(tiny_model, tiny_image, method, options, depth):
    model, image = tiny_model(depth, method=method, **options), tiny_image(depth)
    direction = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    rows = count(method, depth)
    sampler = Enumerate(method, rows)
    output = model([image] * rows, torch.zeros(rows, dtype=torch.int64), sampler=sampler)
    probability = sampler.probability
    assert probability.sum() == pytest.approx(1, abs=1e-10)  # every combination was played
    mean = probability @ output.features
    # The entropy term is a population total too, so it is checked with the same enumeration.
    mean_entropy = probability @ output.entropy
    estimated = gradients(model_without_head(model), mean @ direction + mean_entropy)

    full = tiny_model(depth, method=method, samples=64, **options)
    full.load_state_dict(model.state_dict())
    exact = full([image], torch.zeros(1, dtype=torch.int64))  # a budget above the number of leaves takes all
    torch.testing.assert_close(mean, exact.features[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(mean_entropy, exact.entropy[0], atol=1e-10, rtol=0)
    truth = gradients(model_without_head(full), exact.features[0] @ direction + exact.entropy[0])
    assert truth.abs().max() > 1e-2
    torch.testing.assert_close(estimated, truth, atol=1e-10, rtol=0)


def model_without_head(model):
    """The parameters that F depends on."""
    return torch.nn.ModuleList([model.attention, model.encoder, *filter(None, [model.locate])])


@pytest.mark.parametrize("method", METHODS)
def test_depth_one_is_the_flat_model_of_the_paper(method):
    """Equations 4 and 12 written out, without the nested code, on the same random key."""
    level = LevelConfig(downsample=2, samples=5, stride=4, channels=(3,))
    torch.manual_seed(0)
    config = ModelConfig(levels=(level,), patch_size=24, method=method)
    model = NestedATS(config, in_channels=1, classes=3).double()
    with torch.no_grad():
        model.attention[0].layers[-1].weight.mul_(12)
    image = ArrayImage(torch.rand(1, 64, 96, dtype=torch.float64), levels=2)
    output = model([image], torch.tensor([7]))

    view = image.read(1, torch.tensor([[-1, -1, 34, 50]]))
    a = model.attention[0]((view - 0.5) / 0.25).flatten().softmax(0)  # 8 x 12 cells
    order = curve_order(8, 12)
    drawn = draw(a[order][None], 5, method=method, keys=fold_in(torch.tensor([7]), 0))
    cells, z = order[drawn.indices[0]], drawn.z[0]
    starts = torch.stack([cells // 12, cells % 12], -1) * 8 + 4 - 12
    patches = image.read(0, torch.cat([starts, torch.full_like(starts, 24)], -1))
    f = torch.nn.functional.normalize(model.encoder((patches - 0.5) / 0.25), dim=-1)
    surrogate = (z[:, None] * a[cells, None] * f).sum(0)
    if method == "multinomial":
        torch.testing.assert_close(output.features[0], f.mean(0), atol=1e-12, rtol=0)  # equation 4
        surrogate = (a[cells, None] * f / a[cells, None].detach()).mean(0)  # equation 12
    torch.testing.assert_close(output.features[0], surrogate, atol=1e-12, rtol=0)
    weights = torch.rand(32, dtype=torch.float64)
    torch.testing.assert_close(
        gradients(model_without_head(model), output.features[0] @ weights),
        gradients(model_without_head(model), surrogate @ weights),
        atol=1e-12,
        rtol=0,
    )


def test_full_budget_is_the_sum_over_the_tree(tiny_model, tiny_image):
    """The full model, written out for two levels without the sampling code."""
    model, image = tiny_model(2, samples=64), tiny_image(2)
    output = model([image], torch.zeros(1, dtype=torch.int64))
    outer, inner = output.phases
    regions = outer.population.log_attention[0, 0].exp()  # (3,)
    leaves = inner.population.log_attention[0, :3].exp()  # (3, 4); the further slots are empty
    assert ((leaves > 0).sum(-1) == 2).all()  # the second row of cells lies off the image
    features = model.encode([image], inner.population.centers_l0[:, :3].flatten(1, 2))[0]  # (12, D)
    a = (regions[:, None] * leaves).flatten()
    assert a.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(output.features[0], a @ features, atol=1e-12, rtol=0)
    torch.testing.assert_close(output.entropy[0], -(a * a.clamp_min(1e-300).log()).sum(), atol=1e-12, rtol=0)


def test_inner_level_of_one_cell_is_depth_one(tiny_model, tiny_image):
    """A two-level tree whose regions have a single cell draws and returns what depth 1 does."""
    first = LevelConfig(downsample=4, samples=2, stride=4, channels=(3,))
    second = LevelConfig(downsample=2, size=8, samples=2, stride=8, channels=(3,))
    torch.manual_seed(0)
    nested = NestedATS(ModelConfig(levels=(first, second), patch_size=24), in_channels=1, classes=3)
    flat = NestedATS(ModelConfig(levels=(first,), patch_size=24), in_channels=1, classes=3)
    flat.load_state_dict({k: v for k, v in nested.state_dict().items() if not k.startswith("attention.1")})
    nested, flat = nested.double(), flat.double()
    keys = torch.arange(5)
    image = tiny_image(2)
    one, two = flat([image] * 5, keys), nested([image] * 5, keys)
    torch.testing.assert_close(one.logits, two.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.entropy, two.entropy, atol=1e-12, rtol=0)
    assert torch.equal(one.phases[-1].centers_l0, two.phases[-1].centers_l0)
