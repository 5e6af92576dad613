"""Cells and boxes, against the authors' published cases and by construction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS, predict
from nested_ats.cells import box_starts, boxes_at, cell_centers, curve_order
from nested_ats.maps import attention_map


@pytest.mark.parametrize(
    ("cells", "cell", "low", "start"),
    [(25, 12, 100, 475), (25, 0, 100, -5), (100, 0, 100, -20), (1000, 55, 1000, 55 - 25)],
)
def test_authors_patch_geometry(cells, cell, low, start):
    """High 1000, patch 50: facts from the tests of the authors' code, in which half a pixel goes down here too."""
    center_l0 = (cell_centers(cells, low)[cell] * 1000 / low).expand(1, 2)
    boxes = boxes_at(center_l0, 1, 50)
    assert boxes.tolist() == [[start, start, 50, 50]]
    places = torch.arange(1.0, 1001)  # of a pixel along either axis, so that zero is off the image
    image = ArrayImage(torch.stack([places[:, None].expand(-1, 1000), places.expand(1000, -1)]))
    y, x = image.read(0, boxes)[0]
    wanted = torch.nn.functional.pad(places[max(start, 0) : start + 50], (max(-start, 0), 0))
    assert torch.equal(y[:, -1], wanted)
    assert torch.equal(x[-1], wanted)


def test_a_box_starts_at_the_nearest_pixel():
    centers = torch.tensor([[31.999999999, 32.000000001], [33.9, 34.1]], dtype=torch.float64)
    assert box_starts(centers, 2, 8).tolist() == [[12, 12], [13, 13]]
    assert box_starts(centers / 2, 1, 9).tolist() == [[11, 12], [12, 13]]


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (16, 16), (5, 9), (32, 8)])
def test_curve_visits_every_cell_once(shape):
    order = curve_order(*shape)
    assert sorted(order.tolist()) == list(range(shape[0] * shape[1]))


def test_curve_steps_to_a_neighbour():
    order = curve_order(16, 16)
    y, x = order // 16, order % 16
    assert (y.diff().abs() + x.diff().abs() == 1).all()


@pytest.mark.parametrize("shape", [(180, 180), (36, 48), (33, 129), (7, 100), (100, 257), (5, 9), (1, 50), (200, 3)])
def test_list_neighbours_are_neighbours_on_maps_of_any_shape(shape):
    """The list rarely jumps where a map leaves the curve's square, so strata stay nearly as compact as squares."""
    order = curve_order(*shape)
    y, x = order // shape[1], order % shape[1]
    assert (y.diff().abs() + x.diff().abs() == 1).double().mean() > 0.9
    strata = torch.stack([y, x], -1)[: len(order) // 16 * 16].reshape(-1, 16, 2).double()
    if min(shape) > 2:  # the spread of 4 x 4 cells is 2.5
        assert strata.var(1, correction=0).sum(-1).mean() < 2.5 * 2.1


def test_curve_does_not_depend_on_the_size_of_the_map():
    small, large = curve_order(5, 7), curve_order(20, 30)
    within = [(i // 30, i % 30) for i in large.tolist() if i // 30 < 5 and i % 30 < 7]
    assert [(i // 7, i % 7) for i in small.tolist()] == within


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
