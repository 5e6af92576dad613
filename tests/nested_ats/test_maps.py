"""Attention maps: a distribution over the image, in the right place."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS, predict
from nested_ats.maps import attention_map

CONFIG = ModelConfig(
    levels=(
        LevelConfig(downsample=8, samples=2, stride=4, channels=(1,)),
        LevelConfig(downsample=2, size=32, samples=4, stride=4, channels=(1,)),
    ),
    patch_size=24,
    mean=0.0,
    std=1.0,
)


@pytest.mark.parametrize("size", [(256, 384), (250, 70), (33, 33), (5, 9)])
@pytest.mark.parametrize("pitch", [None, 3.0, 32.0, 50.0])
def test_the_map_is_a_distribution_of_the_image_s_shape(size, pitch):
    torch.manual_seed(0)
    model = NestedATS(CONFIG, in_channels=1, classes=2)
    image = ArrayImage(torch.rand(1, *size), levels=4)
    prediction = predict(model, [image], torch.arange(3)[None])
    density, used = attention_map(prediction.outputs, size, pitch_l0=pitch)
    assert used == (pitch or 8)
    assert density.shape == tuple(-(-side // used) for side in size)
    assert density.sum().item() == pytest.approx(1)
    assert (density >= 0).all()


@pytest.mark.parametrize("place", [(128, 200), (3, 5), (255, 0), (100, 380), (31, 32)])
def test_the_map_peaks_where_the_object_is(follow_brightness, place):
    pixels = torch.zeros(1, 256, 384)
    y, x = place
    pixels[0, max(y - 6, 0) : y + 7, max(x - 6, 0) : x + 7] = 1.0
    model = follow_brightness(NestedATS(CONFIG, in_channels=1, classes=2), 200.0)
    prediction = predict(model, [ArrayImage(pixels, levels=4)], torch.arange(4)[None])
    density, pitch = attention_map(prediction.outputs, (256, 384))
    row, column = divmod(int(density.argmax()), density.shape[1])
    assert abs((row + 0.5) * pitch - y - 0.5) <= pitch / 2 + 6.5
    assert abs((column + 0.5) * pitch - x - 0.5) <= pitch / 2 + 6.5
    # What is outside the opened regions that hold the object is as good as nothing.
    near = density[max(0, int((y - 50) // pitch)) : int((y + 50) // pitch) + 1]
    assert near.sum() > 0.99


def test_unopened_cells_spread_evenly_and_opened_ones_by_their_own_map(follow_brightness):
    """A flat image: the first level is uniform, so each unopened cell's pixels hold an equal share."""
    model = follow_brightness(NestedATS(CONFIG, in_channels=1, classes=2), 0.0)
    image = ArrayImage(torch.zeros(1, 256, 256), levels=4)
    prediction = predict(model, [image], torch.tensor([[5]]))
    density, pitch = attention_map(prediction.outputs, (256, 256))
    cell = 1 / 64  # of the attention, in 32 x 32 level-0 pixels: 4 x 4 pixels of the map
    values = density.flatten()
    assert (values == values.mode().values).sum() > 0.75 * len(values)
    assert values.mode().values.item() == pytest.approx(cell / 16)
    # An opened region is 64 x 64 level-0 pixels of even attention: a quarter of its cell's goes to the cell itself.
    opened = density[prediction_cell(prediction.outputs[0], 0, pitch)]
    assert cell / 4 / 16 - 1e-8 <= opened.min().item() < cell / 16


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("size", "pitch"), [((61, 47), 1.0), ((64, 64), 2.7), ((33, 90), 10.0), ((3, 70), None)])
def test_the_map_is_that_of_one_cell_after_another(depth, size, pitch):
    """Written out: each cell that was not opened, over the part of the map that it covers."""
    levels = (
        LevelConfig(downsample=8, samples=3, stride=2, channels=(1,)),
        LevelConfig(downsample=4, size=6, samples=5, stride=3, channels=(1,)),
        LevelConfig(downsample=1, size=15, samples=6, stride=5, channels=(1,)),
    )
    torch.manual_seed(2)
    config = ModelConfig(levels=levels[:depth], patch_size=24, method="multinomial")  # may open a cell twice
    model = NestedATS(config, in_channels=1, classes=2).double()
    with torch.no_grad():
        for network in model.attention:
            network.layers[-1].weight.mul_(30)
    prediction = predict(model, [ArrayImage(torch.rand(1, *size), levels=4)], torch.tensor([[1, 2]]))
    density, pitch = attention_map(prediction.outputs, size, pitch_l0=pitch)

    wanted = torch.zeros_like(density)
    for output in prediction.outputs:
        above = {0: 1.0}  # attention that has come down to each view
        for number, phase in enumerate(output.phases):
            population, drawn = phase.population, phase.drawn
            opened: dict[int, int] = {}
            if number + 1 < depth:
                for view, cell in enumerate(drawn.indices[0].tolist()):
                    opened.setdefault(cell, view)
            below = {}
            cells = population.log_attention.shape[-1]
            for view, mass in above.items():
                for cell in range(cells):
                    own = mass * population.log_attention[0, view, cell].exp().item()
                    if view * cells + cell in opened:
                        below[opened[view * cells + cell]] = own
                    elif own > 0:
                        wanted += own * share(
                            population.centers_l0[0, view, cell], population.extent_l0, pitch, wanted
                        )
            above = below
    torch.testing.assert_close(density, wanted / len(prediction.outputs), atol=1e-9, rtol=0)


def share(center, extent, pitch, density):
    """Share of a cell in each pixel of a map."""
    along = []
    for axis in (0, 1):
        start = torch.arange(density.shape[axis], dtype=torch.float64) * pitch
        low, high = center[axis] - extent / 2, center[axis] + extent / 2
        along.append((torch.minimum(start + pitch, high) - torch.maximum(start, low)).clamp_min(0))
    area = along[0][:, None] * along[1]
    return area / area.sum()


def prediction_cell(output, index, pitch):
    y, x = (output.phases[0].centers_l0[0, index] / pitch).long().tolist()
    return slice(y - 2, y + 2), slice(x - 2, x + 2)
