"""Augmented images: what is read is what one would read from the whole image, decoded and changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from nested_ats import ArrayImage
from pipeline.data.augment import AugmentedImage
from pipeline.data.stain import StainJitter
from pipeline.sections import AugmentConfig

BACKGROUND = 0.25
KEYS = st.integers(-(2**63), 2**63 - 1)
ALL = AugmentConfig(brightness=0.3, contrast=0.5, translation=0.4, flip=True)


class Typed:
    """One level of integers, as a slide gives them; background 0."""

    def __init__(self, pixels):
        self.pixels, self.shapes, self.downsamples = pixels, [tuple(pixels.shape[-2:])], [1.0]

    def read(self, level, boxes):
        plane = functional.pad(self.pixels.double(), (99,) * 4)
        cut = [plane[:, y + 99 : y + 99 + h, x + 99 : x + 99 + w] for y, x, h, w in boxes.tolist()]
        return torch.stack(cut).to(self.pixels.dtype)


def halve(plane):
    """Mean of 2x2 pixels of (H, W), of those that are there: NaN is nothing."""
    blocks = plane.unfold(0, 2, 2).unfold(1, 2, 2)
    return blocks.nanmean((-2, -1))


def whole(image, levels, symmetry, shift, margin):
    """Every level of the plane that an image (H, W) lies on, changed as a whole and then made coarser.

    The image's first pixel would lie at (margin, margin) of the plane; `shift` is in level-0 pixels.
    """
    unit = 2 ** (levels - 1)
    canvas = functional.pad(image, (0, -image.shape[1] % unit, 0, -image.shape[0] % unit), value=torch.nan)
    if symmetry & 1:
        canvas = canvas.T
    axes = [axis for axis in range(2) if symmetry & (2 << axis)]
    canvas = canvas.flip(axes)
    y, x = shift[0] + margin, shift[1] + margin
    plane = torch.full([side + 2 * margin for side in canvas.shape], torch.nan)
    plane[y : y + canvas.shape[0], x : x + canvas.shape[1]] = canvas
    planes = [plane]
    for _ in range(levels - 1):
        planes.append(halve(planes[-1]))
    return planes


def numbers(key):
    """The five numbers of a key, as the module says: symmetry, shift down and right, contrast, brightness."""
    from nested_ats.sampling import uniform

    return uniform(torch.tensor([key]), 5)[0].tolist()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from(range(8)), KEYS, st.data())
def test_reading_equals_changing_the_whole_image_first(height, width, levels, symmetry, key, data):
    # A key that draws the wanted symmetry: the streams of neighbouring keys are independent.
    key = next(k for k in range(key % 2**60, 2**62) if int(8 * numbers(k)[0]) == symmetry)
    _, down, right, contrast, brightness = numbers(key)
    unit, margin = 2 ** (levels - 1), 64
    pixels = torch.rand(1, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    source = ArrayImage(pixels, levels=levels + 1, background=BACKGROUND)
    image = AugmentedImage(source, ALL, key, downsample=unit)

    sides = source.shapes[levels - 1][:: -1 if symmetry & 1 else 1]
    steps = [
        int(u * (2 * int(0.4 * side) + 1)) - int(0.4 * side) for u, side in zip((down, right), sides, strict=True)
    ]
    planes = whole(pixels[0], levels, symmetry, [step * unit for step in steps], margin)
    assert image.downsamples == [2.0**i for i in range(levels)]
    assert image.shapes[-1] == tuple(sides)
    for level, plane in enumerate(planes):
        expected = plane.nan_to_num(BACKGROUND)
        expected = 0.5 + (1 + 0.5 * (2 * contrast - 1)) * (expected - 0.5) + 0.3 * (2 * brightness - 1)
        edge = margin >> level
        h, w = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
        places = st.tuples(
            st.integers(-edge, plane.shape[0] - edge - h), st.integers(-edge, plane.shape[1] - edge - w)
        )
        boxes = [(y, x, h, w) for y, x in data.draw(st.lists(places, min_size=1, max_size=4))]
        read = image.read(level, torch.tensor(boxes))
        assert read.shape == (len(boxes), 1, h, w)
        for one, (y, x, *_) in zip(read, boxes, strict=True):
            wanted = expected[y + edge : y + edge + h, x + edge : x + edge + w]
            torch.testing.assert_close(one[0], wanted, rtol=0, atol=1e-5)


@settings(deadline=None)
@given(KEYS)
def test_the_frame_holds_the_whole_image_where_nothing_is_moved(key):
    pixels = torch.rand(1, 21, 13)
    image = AugmentedImage(ArrayImage(pixels, levels=3), AugmentConfig(flip=True), key, downsample=4)
    for level, (height, width) in enumerate(image.shapes):
        total = image.read(level, torch.tensor([[0, 0, height, width]])).sum()
        plane = ArrayImage(pixels, levels=3).read(level, torch.tensor([[0, 0, 99, 99]])).sum()
        assert total == pytest.approx(float(plane), rel=1e-5)


def test_all_symmetries_and_shifts_are_drawn():
    pixels = torch.arange(12.0).reshape(1, 3, 4)
    config = AugmentConfig(flip=True)
    seen = set()
    for key in range(200):
        image = AugmentedImage(ArrayImage(pixels), config, key, downsample=1)
        [[height, width]] = image.shapes
        seen.add(tuple(image.read(0, torch.tensor([[0, 0, height, width]])).flatten().tolist()))
    assert len(seen) == 8
    spot = torch.zeros(1, 20, 10)
    spot[0, 10, 5] = 1
    places = set()
    for key in range(2000):
        image = AugmentedImage(ArrayImage(spot), AugmentConfig(translation=0.25), key, downsample=1)
        places.add(tuple(image.read(0, torch.tensor([[0, 0, 20, 10]]))[0, 0].nonzero()[0].tolist()))
    assert places == {(10 + dy, 5 + dx) for dy in range(-5, 6) for dx in range(-2, 3)}


def test_by_default_nothing_changes_and_equal_keys_change_equally():
    source = ArrayImage(torch.rand(2, 17, 30), levels=2)
    boxes = torch.tensor([[-3, 4, 9, 12], [10, 20, 9, 12]])
    plain = AugmentedImage(source, AugmentConfig(), 5, downsample=2)
    assert plain.shapes == source.shapes
    first, same, other = (AugmentedImage(source, ALL, key, downsample=2) for key in (7, 7, 8))
    for level in range(2):
        assert torch.equal(plain.read(level, boxes), source.read(level, boxes))
        assert torch.equal(first.read(level, boxes), same.read(level, boxes))
        assert not torch.equal(first.read(level, boxes), other.read(level, boxes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16])
@settings(deadline=None)
@given(key=KEYS)
def test_integers_keep_their_type_and_are_clipped(dtype, key):
    limits = torch.iinfo(dtype)
    pixels = torch.linspace(limits.min, limits.max, 60, dtype=torch.float64).round().reshape(1, 6, 10)
    image = AugmentedImage(Typed(pixels.to(dtype)), ALL.model_copy(update={"translation": 0}), key, downsample=1)
    read = image.read(0, torch.tensor([[0, 0, *image.shapes[0]]]))
    assert read.dtype == dtype
    _, _, _, contrast, brightness = numbers(key)
    share = 0.5 + (1 + 0.5 * (2 * contrast - 1)) * (pixels / limits.max - 0.5) + 0.3 * (2 * brightness - 1)
    wanted = (share * limits.max).round().clamp(limits.min, limits.max)
    off = (read.double().flatten().sort().values - wanted.flatten().sort().values).abs().max()
    assert off <= 1  # where rounding meets a half


def test_floats_are_not_clipped():
    source = ArrayImage(torch.tensor([[[-3.0, 9.0]]]))
    key = next(k for k in range(99) if numbers(k)[4] > 0.9)
    image = AugmentedImage(source, AugmentConfig(brightness=1), key, downsample=1)
    read = image.read(0, torch.tensor([[0, 0, 1, 2]])).flatten().tolist()
    assert read == pytest.approx([-3 + 2 * numbers(key)[4] - 1, 9 + 2 * numbers(key)[4] - 1])


def test_levels_whose_downsamples_do_not_divide_agree_to_a_pixel():
    """Another writer's pyramid: sides cut down instead of up, downsamples a little off."""

    class Foreign:
        shapes, downsamples = [(101, 67), (50, 33), (25, 16)], [1.0, 2.02, 4.04]

        def read(self, level, boxes):
            y, x = boxes[:, 0, None, None, None], boxes[:, 1, None, None, None]
            h, w = boxes[0, 2:].tolist()
            rows = (y + torch.arange(h)[:, None]) * self.downsamples[level]
            columns = (x + torch.arange(w)) * self.downsamples[level]
            return torch.cat([rows.expand(-1, -1, h, w), columns.expand(-1, -1, h, w)], 1)

    for key in range(50):
        image = AugmentedImage(Foreign(), AugmentConfig(translation=0.3, flip=True), key, downsample=4.04)
        seen = [image.read(i, torch.tensor([[0, 0, 1, 1]])).flatten() for i in range(3)]
        for one in seen[:-1]:
            assert (one - seen[-1]).abs().max() <= 2 * 4.04


def test_a_level_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no level at downsample 8"):
        AugmentedImage(ArrayImage(torch.rand(1, 9, 9)), ALL, 0, downsample=8)


class Known(ArrayImage):
    identity = "x"


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (AugmentConfig(), 1),
        (AugmentConfig(flip=True), 8),
        (AugmentConfig(brightness=0.1), 0),
        (AugmentConfig(contrast=0.1), 0),
        (AugmentConfig(jitter=0.1), 0),  # of patches, which then hardly come again
        (AugmentConfig(warp=0.1), 0),
        (AugmentConfig(flip=True, translation=0.4), None),  # none but where it is not moved
    ],
)
def test_identities_are_those_of_what_is_seen(config, apart):
    """Equal identities are equal pixels, and the 8 symmetries have eight."""
    pixels = torch.rand(1, 12, 18, generator=torch.Generator().manual_seed(0))
    seen = {}
    for key in range(80):
        image = AugmentedImage(Known(pixels, levels=2), config, key, downsample=2.0)
        boxes = [torch.tensor([[-3, -3, 20 // 2**level, 24 // 2**level]]) for level in range(2)]
        views = torch.cat([image.read(level, box).flatten() for level, box in enumerate(boxes)])
        if image.identity is not None:
            assert torch.equal(seen.setdefault(image.identity, views), views)
    assert len(seen) == apart if apart is not None else 0 < len(seen) <= 8
    assert len({tuple(views.tolist()) for views in seen.values()}) == len(seen)
    plain = AugmentedImage(ArrayImage(pixels, levels=2), config, 0, downsample=2.0)
    assert plain.identity is None
    if apart == 1:
        assert set(seen) == {"x"}


class TestStains:
    def test_it_is_the_change_of_the_amounts_that_scikit_image_finds(self):
        from skimage.color import hed2rgb, rgb2hed

        rng = np.random.default_rng(0)
        amounts = rng.uniform(0.005, 0.05, (6, 5, 3))
        pixels = hed2rgb(amounts)
        draws = [0.9, 0.2, 0.5, 0.7, 0.5, 0.6]
        seen = StainJitter(0.3, draws)(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0)
        change = 0.3 * (2 * np.array(draws) - 1)
        wanted = hed2rgb(rgb2hed(pixels) * (1 + change[:3]) + change[3:] * 0.2 / -np.log(1e-6))
        np.testing.assert_allclose(seen.numpy(), wanted, atol=2e-5)

    def test_draws_in_the_middle_change_nothing_whatever_the_colour(self):
        pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(StainJitter(0.5, [0.5] * 6)(pixels), pixels, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
    def test_an_image_keeps_its_type_and_is_changed_alike_at_all_places(self, dtype):
        shares = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
        pixels = shares if dtype.is_floating_point else (shares * torch.iinfo(dtype).max).to(dtype)

        class Plain:
            shapes, downsamples, identity = [(16, 16)], [1.0], "me"

            def read(self, level, boxes):
                return torch.stack([pixels[:, y : y + h, x : x + w] for y, x, h, w in boxes.tolist()])

        image = AugmentedImage(Plain(), AugmentConfig(hed=0.3), 5, downsample=1)
        whole = image.read(0, torch.tensor([[0, 0, 16, 16]]))[0]
        part = image.read(0, torch.tensor([[4, 8, 3, 5]]))[0]
        assert whole.dtype == dtype
        assert not torch.equal(whole, pixels)
        assert torch.equal(part, whole[:, 4:7, 8:13])
        assert image.identity is None
