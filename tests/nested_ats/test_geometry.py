"""Cells and boxes, against the authors' published cases and by construction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS, predict
from nested_ats.geometry import box_starts, cell_centers, curve_order
from nested_ats.maps import attention_map


@pytest.mark.parametrize(("cells", "cell", "start"), [(25, 12, 475), (25, 0, -5), (100, 0, -20)])
def test_authors_patch_geometry(cells, cell, start):
    """High 1000, low 100, patch 50: facts from the tests of the authors' code (along one axis)."""
    center_l0 = cell_centers(cells, 100)[cell] * 10
    assert box_starts(center_l0.reshape(1, 1), 1, 50).item() == start


def test_receptive_field_moves_the_first_cell_inwards():
    centers = cell_centers(6, 10, receptive_field=5)
    assert centers.tolist() == [2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (16, 16), (5, 9), (32, 8)])
def test_curve_visits_every_cell_once(shape):
    order = curve_order(*shape)
    assert sorted(order.tolist()) == list(range(shape[0] * shape[1]))


def test_curve_steps_to_a_neighbour():
    order = curve_order(16, 16)
    y, x = order // 16, order % 16
    assert (y.diff().abs() + x.diff().abs() == 1).all()


def test_curve_does_not_depend_on_the_size_of_the_map():
    small, large = curve_order(5, 7), curve_order(20, 30)
    within = [(i // 30, i % 30) for i in large.tolist() if i // 30 < 5 and i % 30 < 7]
    assert [(i // 7, i % 7) for i in small.tolist()] == within


@pytest.mark.parametrize("place", [(3, 5), (100, 40), (255, 255), (0, 383), (199, 301)])
def test_a_bright_pixel_is_covered_by_the_cell_and_patch_it_draws(follow_brightness, place):
    """Attention that follows brightness, at two levels: the drawn cell contains the object, also at the border."""
    pixels = torch.zeros(1, 256, 384)
    y, x = place
    pixels[0, max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = 1.0
    config = ModelConfig(
        levels=(
            LevelConfig(downsample=8, samples=1, stride=4, channels=(1,)),
            LevelConfig(downsample=2, size=32, samples=1, stride=4, channels=(1,)),
        ),
        patch_size=24,
        mean=0.0,
        std=1.0,
    )
    model = follow_brightness(NestedATS(config, in_channels=1, classes=2), 1000.0)
    output = model([ArrayImage(pixels, levels=4)], torch.tensor([1]))
    for phase, extent in zip(output.phases, (32, 8), strict=True):
        center = phase.centers_l0[0, 0]
        # Within half a cell and the object's own radius.
        assert (center - torch.tensor([y + 0.5, x + 0.5])).abs().max() <= extent / 2 + 4.5


LEVELS = (
    LevelConfig(downsample=8, samples=1, stride=4, channels=(1,)),  # cells of 32 pixels,
    LevelConfig(downsample=4, size=8, samples=1, stride=4, channels=(1,)),  # 16,
    LevelConfig(downsample=2, size=20, samples=1, stride=2, channels=(1,)),  # and 4
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), depth=st.integers(1, 3), height=st.integers(1, 150), width=st.integers(1, 150))
def test_a_bright_pixel_lies_in_its_cell_at_every_level(data, depth, height, width):
    """One pixel of any image, on the border as well: exactly its cell is bright, drawn, mapped, and in the patch."""
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    pixels = torch.zeros(1, height, width)
    pixels[0, y, x] = 1.0
    config = ModelConfig(levels=LEVELS[:depth], patch_size=32, mean=0.0, std=1.0)
    model = NestedATS(config, in_channels=1, classes=2)
    with torch.no_grad():
        for network in model.attention:  # a cell's logit is its brightest pixel
            network.layers[0].weight.zero_()[0, 0, 1, 1] = 1.0
            network.layers[0].bias.zero_()
            network.layers[-1].weight.fill_(1e5)
    result = predict(model, [ArrayImage(pixels, levels=4)], torch.tensor([[7]]))
    place = torch.tensor([y, x], dtype=torch.float64) + 0.5
    for level, phase in zip(config.levels, result.outputs[0].phases, strict=True):
        cells = phase.population.centers_l0[0].flatten(0, 1)
        covering = ((place - cells).abs() < level.extent_l0 / 2).all(-1)
        assert covering.sum() == 1  # the cells tile the view
        assert phase.drawn.indices[0, 0] == covering.nonzero()[0, 0]
        assert phase.attention[0, 0] > 0.999
    start = box_starts(result.outputs[0].phases[-1].centers_l0[0, 0], 1, 32)
    assert ((start <= place) & (place < start + 32)).all()
    density, pitch = attention_map(result.outputs, (height, width))
    assert pitch == config.levels[-1].extent_l0
    assert density[int(y // pitch), int(x // pitch)] > 0.99
