"""Cells whose patches would show nothing are never drawn, at any level and by any model."""

from __future__ import annotations

import pytest
import torch

from nested_ats import (
    ArrayImage,
    DeepMILConfig,
    LevelConfig,
    Mask,
    ModelConfig,
    NestedATS,
    UniformConfig,
    build_model,
)

LEVELS = (
    LevelConfig(downsample=4, stride=2, group=4, samples=6, channels=(4,)),
    LevelConfig(downsample=1, size=32, stride=8, samples=20, channels=(4,)),
)
ONE_LEVEL = (LevelConfig(downsample=4, stride=2, samples=20, channels=(4,)),)
BOX = (40, 100, 120, 170)  # y0, x0, y1, x1


def masked(boxes: list[tuple[int, int, int, int]], size: int = 256, pitch: float = 2.0) -> ArrayImage:
    """An image with a mask of boxes y0, x0, y1, x1."""
    image = ArrayImage(torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)), levels=3)
    pixels = torch.zeros(int(size / pitch), int(size / pitch), dtype=torch.bool)
    for box in boxes:
        y0, x0, y1, x1 = (int(value / pitch) for value in box)
        pixels[y0:y1, x0:x1] = True
    image.mask = Mask(pixels, (pitch, pitch))
    return image


def share_of_patches(centers: torch.Tensor, side: float, box: tuple[int, int, int, int] = BOX) -> torch.Tensor:
    """The share of each patch that lies in a box."""
    low, high = torch.tensor(box).double().reshape(2, 2)
    overlap = torch.minimum(centers + side / 2, high) - torch.maximum(centers - side / 2, low)
    return overlap.clamp_min(0).prod(-1) / side**2


def test_areas_are_exact_for_boxes_that_cut_pixels_or_leave_the_mask():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(9, 13, generator=generator) > 0.5
    mask = Mask(pixels, (4.0, 2.5))
    corners = torch.rand(50, 2, 2, generator=generator, dtype=torch.float64) * 70 - 15
    boxes = torch.cat([corners.amin(1), corners.amax(1)], -1)
    y, x = torch.arange(9) * 4.0, torch.arange(13) * 2.5
    y0, x0, y1, x1 = (value[:, None] for value in boxes.unbind(-1))
    rows = (torch.minimum(y + 4, y1) - torch.maximum(y, y0)).clamp_min(0)
    columns = (torch.minimum(x + 2.5, x1) - torch.maximum(x, x0)).clamp_min(0)
    wanted = torch.einsum("ni,ij,nj->n", rows.double(), pixels.double(), columns.double())
    torch.testing.assert_close(mask.area(boxes), wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("levels", [ONE_LEVEL, LEVELS])
@pytest.mark.parametrize("attention", ["residual", "independent"])
@pytest.mark.parametrize("least", [0.05, 0.5])
def test_patches_lie_on_what_there_is_to_see(levels, attention, least):
    torch.manual_seed(0)
    config = ModelConfig(levels=levels, patch_size=24, prior="tissue", min_tissue=least, attention=attention)
    output = NestedATS(config, in_channels=3, classes=2)([masked([BOX])] * 8, torch.arange(8))
    last = output.phases[-1]
    assert (share_of_patches(last.centers_l0[last.drawn.z > 0], 24) >= least - 1e-6).all()
    torch.testing.assert_close((last.z * last.attention).sum(-1), torch.ones(8), atol=1e-5, rtol=0)


def test_every_patch_with_enough_can_be_drawn_at_any_depth():
    """A region is opened wherever one of its patches may be drawn."""
    found = {}
    for levels in (ONE_LEVEL, LEVELS):
        config = ModelConfig(levels=levels, patch_size=24, prior="tissue", min_tissue=0.3)
        model = NestedATS(config, in_channels=3, classes=2)
        output = model([masked([BOX])], torch.arange(1), more=1000)  # everything is drawn
        centers = output.phases[-1].centers_l0[output.phases[-1].drawn.z > 0]
        found[len(levels)] = {tuple(place) for place in centers.tolist()}
    cells = torch.cartesian_prod(torch.arange(4, 256, 8), torch.arange(4, 256, 8)).double()
    wanted = cells[share_of_patches(cells, 24) >= 0.3]
    assert found[1] == found[2] == {tuple(place) for place in wanted.tolist()}


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(levels=LEVELS, patch_size=24, prior="tissue"),
        DeepMILConfig(patch_size=24, stride=16, prior="tissue"),
        UniformConfig(patch_size=24, cell=16, samples=9, prior="tissue"),
    ],
    ids=lambda config: config.kind,
)
def test_all_models_that_see_patches_leave_out_the_same(config):
    images = [masked([BOX]), masked([(0, 0, 64, 256)])]
    torch.manual_seed(0)
    model = build_model(config, in_channels=3, classes=2).eval()
    output = model(images, torch.arange(2))
    last = output.phases[-1]
    for row, box in enumerate((BOX, (0, 0, 64, 256))):
        held = (last.z * last.attention)[row] > 0
        assert (share_of_patches(last.centers_l0[row, held], 24, box) >= 0.05).all()
    alone = model(images[1:], torch.arange(1, 2))
    torch.testing.assert_close(output.logits[1:], alone.logits)


def test_the_estimate_is_unbiased_over_what_remains():
    torch.manual_seed(0)
    config = ModelConfig(levels=LEVELS, patch_size=24, prior="tissue", min_tissue=0.2)
    model = NestedATS(config, in_channels=3, classes=2).eval().double()
    image = masked([BOX, (200, 0, 256, 60)])
    image._levels = [level.double() for level in image._levels]
    with torch.no_grad():
        whole = model([image], torch.arange(1), more=1000).features[0]  # everything is drawn, with z = 1
        draws = model([image] * 400, torch.arange(400)).features
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - whole).abs() < 4.5 * error + 1e-9).all()
    assert (error < 0.02).all()


def test_a_mask_is_asked_for_and_an_empty_one_leaves_all():
    model = NestedATS(ModelConfig(levels=LEVELS, patch_size=24, prior="valid"), in_channels=3, classes=2)
    with pytest.raises(ValueError, match="this image has none"):
        model([ArrayImage(torch.rand(3, 256, 256), levels=3)], torch.arange(1))
    output = model([masked([])], torch.arange(1))
    assert output.logits.isfinite().all()
    assert (output.phases[0].population.log_attention > -torch.inf).all()


@pytest.mark.parametrize(("key", "value"), [("prior", "glass"), ("min_tissue", 1.5)])
def test_what_no_prior_can_be_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ModelConfig(levels=LEVELS, **{key: value})
