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


def prediction_cell(output, index, pitch):
    y, x = (output.phases[0].centers_l0[0, index] / pitch).long().tolist()
    return slice(y - 2, y + 2), slice(x - 2, x + 2)
