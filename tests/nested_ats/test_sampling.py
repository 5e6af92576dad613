"""The samplers against exact enumeration, the authors' published cases, and their own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_ats import ImpossibleWeightsError
from nested_ats.cells import curve_order
from nested_ats.sampling import METHODS, draw, fold_in, noise_size, uniform
from nested_ats.testing import inclusion, outcomes

POPULATIONS = {
    "mild": [0.3, 0.25, 0.2, 0.15, 0.1],
    "one capped": [0.7, 0.1, 0.1, 0.05, 0.05],
    "two capped": [0.02, 0.5, 0.03, 0.4, 0.05],
    "equal": [0.2, 0.2, 0.2, 0.2, 0.2],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_total_is_unbiased_over_all_outcomes(method, name, n):
    weights = torch.tensor(POPULATIONS[name], dtype=torch.float64) * 3  # they need not sum to one
    noise, probabilities = outcomes(method, weights, n)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    drawn = draw(weights.expand(len(noise), -1), n, method=method, noise=noise)
    each = torch.zeros(len(noise), 5, dtype=torch.float64).scatter_add_(-1, drawn.indices, drawn.z)
    torch.testing.assert_close(probabilities @ each, torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_z_times_weight_sums_to_the_total(method):
    torch.manual_seed(0)
    weights = torch.rand(50, 200, dtype=torch.float64) ** 6
    drawn = draw(weights, 20, method=method)
    total = (drawn.z * weights.gather(-1, drawn.indices)).sum(-1)
    torch.testing.assert_close(total, weights.sum(-1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["pivotal", "systematic", "desraj"])
def test_no_unit_is_drawn_twice(method):
    torch.manual_seed(0)
    for power in (0, 1, 10, 60):
        weights = torch.rand(200, 64) ** power
        indices = draw(weights, 16, method=method).indices
        assert (indices.diff(dim=-1) > 0).all()


def test_systematic_draws_with_exactly_the_inclusion_probability():
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    pi = inclusion(weights, 8)
    draws = 20_000
    drawn = draw(weights.expand(draws, -1), 8, keys=torch.arange(draws))
    counts = torch.zeros(30, dtype=torch.float64).index_add_(
        0, drawn.indices.flatten(), torch.ones(draws * 8, dtype=torch.float64)
    )
    error = (pi * (1 - pi) / draws).sqrt()
    assert ((counts / draws - pi).abs() <= 4.5 * error + 1e-12).all()
    torch.testing.assert_close(drawn.z, 1 / pi[drawn.indices])


@pytest.mark.parametrize("method", METHODS)
def test_few_units_are_all_taken_once(method):
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.0, 0.2], [1.0, 0, 0, 0, 0, 0]])
    for n in (3, 4, 8):
        drawn = draw(weights, n, method=method, keys=torch.tensor([5, 6]))
        assert drawn.indices.shape == drawn.z.shape == (2, n)
        assert drawn.indices[0, :3].tolist() == [1, 3, 5]
        assert drawn.z.tolist() == [[1.0] * 3 + [0.0] * (n - 3), [1.0] + [0.0] * (n - 1)]
        # Empty slots repeat a drawn unit, so that they cost no further read.
        assert set(drawn.indices[0].tolist()) == {1, 3, 5}
        assert set(drawn.indices[1].tolist()) == {0}


class TestAuthorsCases:
    """Facts from the tests of the authors' released code."""

    def test_uniform_counts(self):
        weights = torch.full((10_000, 10), 0.1)
        indices = draw(weights, 1, method="multinomial", keys=torch.arange(10_000)).indices
        counts = indices.flatten().bincount(minlength=10)
        assert ((counts - 1000).abs() <= 100).all()

    def test_one_hot_with_replacement(self):
        weights = torch.eye(10)[3].expand(100, -1)
        assert (draw(weights, 5, method="multinomial").indices == 3).all()

    @pytest.mark.parametrize("method", ["pivotal", "systematic", "desraj"])
    def test_ten_of_ten_are_distinct(self, method):
        indices = draw(torch.rand(50, 10) + 0.1, 10, method=method).indices
        assert (indices == torch.arange(10)).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_forward_error_over_repetitions(self, method):
        generator = torch.Generator().manual_seed(0)
        attention = torch.rand(100, generator=generator).softmax(0)
        features = torch.rand(100, 8, generator=generator) * 0.1
        drawn = draw(attention.expand(1000, -1), 10, method=method, keys=torch.arange(1000))
        values = (drawn.z * attention[drawn.indices])[..., None] * features[drawn.indices]
        assert (values.sum(1).mean(0) - attention @ features).abs().max() < 0.01


def test_same_key_same_draw_whatever_the_batch():
    weights = torch.rand(4, 40)
    keys = torch.tensor([11, 12, 13, 14])
    for method in METHODS:
        together = draw(weights, 6, method=method, keys=keys)
        alone = draw(weights[2:3], 6, method=method, keys=keys[2:3])
        padded = draw(torch.nn.functional.pad(weights[2:3], (0, 9)), 6, method=method, keys=keys[2:3])
        assert torch.equal(together.indices[2:3], alone.indices)
        assert torch.equal(alone.indices, padded.indices)


def valid(weights, n, method, drawn):
    """Assert all that is promised of a draw."""
    indices, z = drawn.indices, drawn.z
    assert indices.shape == z.shape == (len(weights), n)
    assert ((indices >= 0) & (indices < weights.shape[-1])).all()
    assert z.isfinite().all()
    held = weights.gather(-1, indices)
    assert (held > 0).all()
    taken = (weights > 0).sum(-1).clamp_max(n)
    if method != "multinomial":
        assert torch.equal((z > 0).sum(-1), taken)
        assert ((indices.diff(dim=-1) > 0) | (z[:, 1:] == 0)).all()
    if method in ("pivotal", "systematic"):  # one over a probability
        assert (z[z > 0] >= 1 - 1e-6).all()
    total = (z.double() * held.double()).sum(-1)
    torch.testing.assert_close(total, weights.double().sum(-1), rtol=1e-5, atol=0)


MANY = 1_000_000
LIMITS = {
    "even": lambda g: torch.ones(1, MANY),
    "softmax": lambda g: torch.randn(1, MANY, generator=g).softmax(-1),
    "peaked softmax": lambda g: (20 * torch.randn(1, MANY, generator=g)).softmax(-1),
    "impossible cells": lambda g: torch.where(
        torch.rand(1, MANY, generator=g) < 0.9, -torch.inf, torch.randn(1, MANY, generator=g)
    ).softmax(-1),
    "30 orders of magnitude": lambda g: 10 ** (30 * torch.rand(1, MANY, generator=g) - 15),
    "all of float32": lambda g: 10 ** (76 * torch.rand(1, MANY, generator=g) - 38),
    "one hot": lambda g: torch.zeros(1, MANY).index_fill(1, torch.tensor([MANY - 1]), 1.0),
    "one large among tiny ones": lambda g: torch.full((1, MANY), 1e-12).index_fill(1, torch.tensor([7]), 1.0),
    "few": lambda g: torch.zeros(1, MANY).index_fill(1, torch.tensor([0, 5, MANY - 1]), 1e-30),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LIMITS)
def test_a_million_float32_weights(method, name):
    weights = LIMITS[name](torch.Generator().manual_seed(0))
    for n in (1, 32):
        valid(weights, n, method, draw(weights, n, method=method, keys=torch.tensor([n])))


def test_inclusion_probabilities_among_a_million():
    weights = (4 * torch.randn(1, MANY, generator=torch.Generator().manual_seed(0))).softmax(-1)
    pi = inclusion(weights[0].double(), 64)
    assert pi.sum().item() == pytest.approx(64, rel=1e-9)
    for noise in (0.0, 0.5, 1 - 2.0**-53):
        drawn = draw(weights, 64, method="systematic", noise=torch.tensor([[noise]], dtype=torch.float64))
        torch.testing.assert_close(drawn.z[0].double(), 1 / pi[drawn.indices[0]], rtol=1e-6, atol=0)


def test_a_unit_is_drawn_for_a_stretch_of_u_as_long_as_its_probability():
    """Without chance: of M evenly spaced u, M pi draw a unit, give or take the ends of the stretch."""
    weights = (3 * torch.randn(2000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    spaced = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    drawn = draw(weights.expand(500, -1), 16, method="systematic", noise=spaced[:, None])
    counts = drawn.indices.flatten().bincount(minlength=2000)
    assert counts.sum() == 500 * 16
    assert ((counts - 500 * inclusion(weights.double(), 16)).abs() <= 1 + 1e-3).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("power", range(-16, 0, 3))
def test_a_unit_nearly_certain_is_drawn_once(sign, power):
    weights = torch.rand(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[0, 20] = 0
    weights[0, 20] = weights.sum() / 3 * (1 + sign * 10.0**power)  # a probability of one, to within that
    noise = torch.linspace(0, 1 - 2.0**-53, 101, dtype=torch.float64)[:, None]
    rows = weights.expand(101, -1)
    valid(rows, 4, "systematic", draw(rows, 4, method="systematic", noise=noise))


rows = st.lists(
    st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1), st.floats(-30, 30).map(lambda x: 10.0**x)),
    min_size=9,
    max_size=9,
)


@settings(max_examples=100, deadline=None)
@given(
    table=st.lists(rows.filter(any), min_size=1, max_size=5), n=st.integers(1, 12), method=st.sampled_from(METHODS)
)
def test_rows_of_any_weights_are_drawn_each_for_itself(table, n, method):
    weights, keys = torch.tensor(table, dtype=torch.float64), torch.arange(len(table))
    together = draw(weights, n, method=method, keys=keys)
    valid(weights, n, method, together)
    for row in range(len(table)):
        alone = draw(weights[row : row + 1], n, method=method, keys=keys[row : row + 1])
        assert torch.equal(together.indices[row], alone.indices[0])
        assert torch.equal(together.z[row], alone.z[0])


@pytest.mark.parametrize("method", ["pivotal", "systematic"])
def test_neighbours_share_a_stratum(method):
    """With as many draws as an even map has 4 x 4 blocks, each block gives one."""
    order = curve_order(16, 32)
    drawn = order[draw(torch.ones(100, 512), 32, method=method, keys=torch.arange(100)).indices]
    block = drawn // 32 // 4 * 8 + drawn % 32 // 4
    assert (block.sort(-1).values == torch.arange(32)).all()


def fields():
    """Two fields over a map that a sampler must not resonate with: a checkerboard, and a smooth one."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    yield ((y + x) % 2).double()
    yield (y / 64).double() + (x / 64).double()


@pytest.mark.parametrize("n", [8, 16, 32])
def test_pivotal_does_not_resonate_along_the_curve(n):
    """With even attention the systematic points all fall on one colour of the board: many times iid's variance."""
    order = curve_order(64, 64)
    keys = torch.arange(4000)
    for field in fields():
        values = field.flatten()[order]
        iid = values.var() / n
        found = values[draw(torch.ones(4000, 4096), n, method="pivotal", keys=keys).indices].mean(-1)
        assert found.mean() == pytest.approx(values.mean().item(), abs=5 * (iid / 4000).sqrt().item())
        assert found.var() < 1.12 * iid  # 1, but for the 4,000 draws
    checkered = next(iter(fields())).flatten()[order]
    resonant = checkered[draw(torch.ones(4000, 4096), n, method="systematic", keys=keys).indices].mean(-1)
    assert resonant.var() > 5 * checkered.var() / n


def test_pivotal_draws_with_exactly_the_inclusion_probability():
    weights = (3 * torch.randn(400, generator=torch.Generator().manual_seed(0))).softmax(-1)
    pi = inclusion(weights.double(), 16)
    counts = draw(weights.expand(20_000, -1), 16, method="pivotal", keys=torch.arange(20_000)).indices
    share = counts.flatten().bincount(minlength=400) / 20_000
    assert ((share - pi).abs() <= 5 * (pi * (1 - pi) / 20_000).sqrt() + 1e-9).all()


def test_half_precision_weights_have_exact_z():
    weights = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)).softmax(-1).bfloat16()
    for method in METHODS:
        drawn = draw(weights, 8, method=method, keys=torch.arange(3))
        assert drawn.z.dtype == torch.float32
        valid(weights, 8, method, drawn)


def test_uniform_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(torch.arange(1000), 100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    counts = (numbers * 20).long().flatten().bincount(minlength=20)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()
    neighbours = torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1]
    assert abs(neighbours) < 0.15
    assert not torch.equal(fold_in(torch.arange(5), 0), fold_in(torch.arange(5), 1))


def test_noise_size_is_what_draw_takes():
    assert [noise_size(method, 7, 3) for method in METHODS] == [3, 1, 7, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "bad", [[0.0, 0.0], [0.5, -0.1], [float("nan"), 1.0], [float("inf"), 1.0], [-float("inf"), 1.0]]
)
def test_impossible_weights_are_refused(bad, method):
    for weights in ([bad], [[1.0, 2.0], bad, [3.0, 0.0]]):
        with pytest.raises(ImpossibleWeightsError, match="weights"):
            draw(torch.tensor(weights), 1, method=method)


def test_whole_numbers_are_weights_too():
    drawn = draw(torch.tensor([[1, 2, 3, 4]]), 2, keys=torch.tensor([0]))
    weights = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    assert (drawn.z * weights[drawn.indices]).sum().item() == pytest.approx(10)


def test_wrong_arguments_are_refused():
    for shape in [(3,), (1, 0), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"\(B, K\)"):
            draw(torch.ones(shape), 1)
    with pytest.raises(ValueError, match="keys"):
        draw(torch.ones(3, 4), 1, keys=torch.tensor([1]))
    for method in METHODS:
        with pytest.raises(ValueError, match="noise must be"):
            draw(torch.ones(4, 10), 3, method=method, noise=torch.rand(1, 2))
    with pytest.raises(ValueError, match="n must"):
        draw(torch.ones(1, 3), 0)
    with pytest.raises(ValueError, match="method"):
        draw(torch.ones(1, 3), 1, method="poisson")
