"""The places of cells, regions and patches, at any depth, on any border, and at fractional downsamples.

The images of these tests are made as they are read, of channels that say where a pixel lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_ats import LevelConfig, ModelConfig, NestedATS, predict
from nested_ats.cells import box_starts, curve_order
from nested_ats.maps import attention_map

PATCH = 25


class Charted:
    """An image whose channels are the share of a pixel that an object covers, and the pixel's centre, y and x.

    The object is a box (top, left, bottom, right) in level-0 pixels; pixels off the image are zero.
    """

    def __init__(self, size: tuple[int, int], downsamples: Sequence[float], box: Sequence[float]) -> None:
        self.downsamples = list(downsamples)
        self.shapes = [(math.ceil(size[0] / d), math.ceil(size[1] / d)) for d in downsamples]
        self.box = torch.tensor(box, dtype=torch.float64).reshape(2, 2)  # starts, ends

    def read(self, level: int, boxes: Tensor) -> Tensor:
        return torch.stack([self._read(level, *box) for box in boxes.tolist()])

    def _read(self, level: int, y: int, x: int, height: int, width: int) -> Tensor:
        d, there, axes = self.downsamples[level], [], []
        for axis, (start, count) in enumerate(((y, height), (x, width))):
            index = torch.arange(start, start + count, dtype=torch.float64)
            ends = torch.minimum((index + 1) * d, self.box[1, axis])
            covered = (ends - torch.maximum(index * d, self.box[0, axis])).clamp_min(0) / d
            axes.append((covered, (index + 0.5) * d))
            there.append((index >= 0) & (index < self.shapes[level][axis]))
        (cover_y, place_y), (cover_x, place_x) = axes
        channels = [cover_y[:, None] * cover_x, place_y[:, None].expand(-1, width), place_x.expand(height, -1)]
        return torch.stack(channels) * (there[0][:, None] & there[1])


def build(downsamples: Sequence[float], strides: Sequence[int], samples: int, spare: int = 0) -> NestedATS:
    """A model of as many levels, whose regions cover the cells above them and `spare` strides more."""
    levels = []
    for depth, (downsample, stride) in enumerate(zip(downsamples, strides, strict=True)):
        size = None
        if depth:
            size = (math.ceil(levels[-1].extent_l0 / (downsample * stride) - 1e-9) + spare) * stride
        levels.append(LevelConfig(downsample=downsample, samples=samples, size=size, stride=stride, channels=(1,)))
    config = ModelConfig(levels=tuple(levels), patch_size=PATCH, mean=0.0, std=1.0, attention="independent")
    torch.manual_seed(0)
    return NestedATS(config, in_channels=3, classes=2).double()


def look_at(model: NestedATS, channel: int, sharpness: float) -> None:
    """Make a cell's logit its largest pixel of a channel, times the sharpness."""
    with torch.no_grad():
        for network in model.attention:
            network.layers[0].weight.zero_()[0, channel, 1, 1] = 1.0
            network.layers[0].bias.zero_()
            network.layers[-1].weight.fill_(sharpness)


@st.composite
def trees(draw: st.DrawFn, least_ratio: float) -> tuple[list[float], list[int]]:
    """Downsamples, coarse to fine, and strides, of one to three levels above patches of downsample 1."""
    depth = draw(st.integers(1, 3))
    ratios = st.one_of(st.sampled_from([2.0, 4.0]), st.floats(least_ratio, 4.5))
    downsamples = [1.0]
    for _ in range(depth):
        downsamples.insert(0, downsamples[0] * draw(ratios))
    return downsamples[:-1], draw(st.lists(st.integers(1, 5), min_size=depth, max_size=depth))


sizes = st.tuples(st.integers(1, 150), st.integers(1, 150))


@settings(max_examples=30, deadline=None)
@given(tree=trees(1.0), size=sizes, axis=st.sampled_from([0, 1]), spare=st.integers(0, 2), key=st.integers(0, 9))
def test_a_cell_s_attention_is_that_of_the_pixels_at_its_place(tree, size, axis, spare, key):
    """Attention that is a function of the pixels' own place is that function of the cells' stated place, exactly."""
    downsamples, strides = tree
    model = build(downsamples, strides, samples=3, spare=spare)
    look_at(model, 1 + axis, 0.01)
    seen, logits = [], []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for network in model.attention:
        network.register_forward_hook(lambda _, args, out: logits.append(out))
    image = Charted(size, [1.0, *reversed(downsamples)], (0, 0, 0, 0))
    output = model([image], torch.tensor([key]))
    for level, phase, seen_as in zip(model.config.levels, output.phases, logits, strict=True):
        centers, extent = phase.population.centers_l0[0], phase.population.extent_l0
        whole = ((centers >= extent / 2) & (centers + extent / 2 <= torch.tensor(size))).all(-1)
        last = centers[..., axis] + (extent - level.downsample) / 2  # centre of the last pixel of the cell
        in_order = seen_as.flatten(-2)[:, curve_order(*seen_as.shape[-2:])]
        torch.testing.assert_close(in_order[whole], 0.01 * last[whole], atol=1e-9, rtol=0)
        shift = phase.population.log_attention[0] - in_order  # one for all cells of a view
        for of_view, held in zip(shift, whole, strict=True):
            torch.testing.assert_close(of_view[held], of_view[held][:1].expand(int(held.sum())), atol=1e-9, rtol=0)
    # And the patches are those around the drawn places, to half a pixel.
    centers = output.phases[-1].centers_l0[0]
    whole = ((centers >= PATCH / 2 + 1) & (centers <= torch.tensor(size) - PATCH / 2 - 1)).all(-1)
    stated, read = centers[whole], seen[0][whole, 1:].mean((-2, -1))
    assert ((stated - read).abs() <= 0.5 + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(
    tree=trees(2.0),
    size=sizes,
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    spare=st.integers(0, 2),
    key=st.integers(0, 9),
)
def test_cells_and_patches_cover_the_object_that_made_them(tree, size, corner, spare, key):
    """An object of two pixels of the coarsest view, anywhere up to the very border."""
    downsamples, strides = tree
    side = 2 * downsamples[0]
    assume(min(size) >= side)
    top, left = (place * (length - side) for place, length in zip(corner, size, strict=True))
    image = Charted(size, [1.0, *reversed(downsamples)], (top, left, top + side, left + side))
    model = build(downsamples, strides, samples=2, spare=spare)
    look_at(model, 0, 1e5)
    result = predict(model, [image], torch.tensor([[key]]))
    start, end = image.box
    phases = result.outputs[0].phases
    for phase in phases:
        held = phase.z[0] * phase.attention[0] > 1e-6
        centers, half = phase.centers_l0[0, held], phase.population.extent_l0 / 2
        low, high = torch.maximum(centers - half, start), torch.minimum(centers + half, end)
        assert (low < high).all()
    # The patch shows what lies in the cell that it is centred on.
    boxes = box_starts(phases[-1].centers_l0[0, held], 1, PATCH).double()
    if 2 * half + 1 <= PATCH:
        assert (boxes <= low).all()
        assert (boxes + PATCH >= high).all()
    density, pitch = attention_map(result.outputs, size)
    # A cell that touches the object may reach as far beyond it.
    reach = math.ceil(max(phase.population.extent_l0 for phase in phases) / pitch)
    near = [
        slice(max(0, int(a / pitch) - reach), int(b / pitch) + reach + 1) for a, b in zip(start, end, strict=True)
    ]
    assert density[tuple(near)].sum() > 0.99


@settings(max_examples=30, deadline=None)
@given(tree=trees(1.0), size=sizes, key=st.integers(0, 99))
@example(tree=([4.474236818101209, 2.0], [4, 1]), size=(40, 54), key=0)
def test_any_image_can_be_looked_at(tree, size, key):
    """A cell may reach into the image by less than a pixel, and the region that opens it not at all."""
    model = build(*tree, samples=40)
    output = model([Charted(size, [1.0, *reversed(tree[0])], (0, 0, 0, 0))], torch.tensor([key]))
    assert output.logits.isfinite().all()
    for phase in output.phases:
        total = (phase.carry[..., None] * phase.population.log_attention.exp()).sum()
        assert total.item() == pytest.approx(1, abs=1e-9)
