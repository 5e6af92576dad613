"""Images in memory, and what the model asks of any image."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, read_batch
from nested_ats.images import find_level, scale_pixels


def test_levels_average_the_pixels_there_are():
    pixels = torch.arange(15.0).reshape(1, 3, 5)
    image = ArrayImage(pixels, levels=3)
    assert image.shapes == [(3, 5), (2, 3), (1, 2)]
    assert image.downsamples == [1, 2, 4]
    level = image.read(1, torch.tensor([[0, 0, 2, 3]]))[0, 0]
    assert level.tolist() == [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]


def test_boxes_off_the_image_are_padded():
    image = ArrayImage(torch.ones(2, 4, 6), background=0.25)
    boxes = torch.tensor([[-2, -1, 3, 3], [3, 5, 3, 3], [50, 50, 3, 3], [-9, 2, 3, 3]])
    read = image.read(0, boxes)
    assert read.shape == (4, 2, 3, 3)
    assert read[0, 0].tolist() == [[0.25] * 3, [0.25] * 3, [0.25, 1, 1]]
    assert read[1, 1].tolist() == [[1, 0.25, 0.25], [0.25] * 3, [0.25] * 3]
    assert (read[2:] == 0.25).all()


def test_integers_are_scaled_by_their_range_and_floats_are_not():
    assert scale_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
    assert scale_pixels(torch.tensor([0, 65535], dtype=torch.int32).to(torch.uint16)).tolist() == [0, 1]
    assert scale_pixels(torch.tensor([-3.0, 7.5])).tolist() == [-3, 7.5]
    with pytest.raises(ValueError, match="int64"):
        scale_pixels(torch.tensor([1]))


def test_missing_level_names_those_there_are():
    with pytest.raises(ValueError, match=r"downsample 16.*1, 2, 4"):
        find_level(ArrayImage(torch.zeros(1, 8, 8), levels=3), 16)


def test_a_downsample_that_would_drift_over_a_large_image_is_not_taken():
    class Drifting:
        downsamples = (1.0, 8.07)
        shapes = ((100_000, 100_000), (12_391, 12_391))

    with pytest.raises(ValueError, match="downsample 8 "):
        find_level(Drifting(), 8)


def test_the_nearest_level_is_taken_where_several_are_near_enough():
    """Over so few pixels a downsample of 4 drifts from one of 5 by less than half a pixel."""

    class Small:
        downsamples = (1.0, 2.0, 4.0, 5.0)
        shapes = ((5, 5), (3, 3), (2, 2), (1, 1))

    assert find_level(Small(), 5) == 3
    assert find_level(Small(), 4.4) == 2
    assert [find_level(Small(), each) for each in Small.downsamples] == [0, 1, 2, 3]


def test_batch_reads_each_image_its_own_boxes():
    images = [ArrayImage(torch.full((1, 8, 8), float(i))) for i in range(3)]
    boxes = torch.zeros(3, 2, 4, dtype=torch.int64)
    boxes[..., 2:] = 4
    read = read_batch(images, 1, boxes)
    assert read.shape == (3, 2, 1, 4, 4)
    assert read[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
