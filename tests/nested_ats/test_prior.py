"""Cells with nothing in them are never drawn, at any level."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, EncoderError, LevelConfig, ModelConfig, NestedATS
from nested_ats.prior import occupied, signal, thresholds

LEVELS = (
    LevelConfig(downsample=4, stride=2, group=4, samples=6, channels=(4,)),
    LevelConfig(downsample=1, size=32, stride=8, samples=20, channels=(4,)),
)


def slide(tissue: list[tuple[int, int, int, int]], size: int = 256) -> torch.Tensor:
    """Glass with a little noise, and boxes y0, x0, y1, x1 of a stained pattern."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.94 + 0.01 * torch.rand(3, size, size, generator=generator)
    for y0, x0, y1, x1 in tissue:
        grain = torch.rand(1, y1 - y0, x1 - x0, generator=generator)
        pixels[:, y0:y1, x0:x1] = torch.tensor([0.8, 0.5, 0.7])[:, None, None] + 0.15 * grain
    return pixels


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("attention", ["residual", "independent"])
def test_patches_lie_on_tissue(depth, attention):
    box = (40, 100, 120, 170)
    levels = LEVELS if depth == 2 else (LevelConfig(downsample=4, stride=2, samples=20, channels=(4,)),)
    torch.manual_seed(0)
    config = ModelConfig(levels=levels, patch_size=24, prior="tissue", attention=attention)
    model = NestedATS(config, in_channels=3, classes=2)
    output = model([ArrayImage(slide([box]), levels=3, background=1.0)] * 8, torch.arange(8))
    last = output.phases[-1]
    centers, half = last.centers_l0[last.drawn.z.cpu() > 0], last.population.extent_l0 / 2
    low, high = torch.tensor(box).double().reshape(2, 2)
    assert ((centers + half > low) & (centers - half < high)).all()
    torch.testing.assert_close((last.z * last.attention).sum(-1), torch.ones(8), atol=1e-5, rtol=0)


def test_a_slide_without_tissue_is_looked_at_all_the_same():
    config = ModelConfig(levels=LEVELS, patch_size=24, prior="tissue")
    output = NestedATS(config, in_channels=3, classes=2)(
        [ArrayImage(slide([]), levels=3), ArrayImage(slide([(0, 0, 64, 64)]), levels=3)], torch.arange(2)
    )
    assert output.logits.isfinite().all()
    assert (output.phases[0].population.log_attention[0] > -torch.inf).all()
    assert (output.phases[0].population.log_attention[1] > -torch.inf).sum() == 4  # 32 pixels each


def test_every_slide_has_its_own_threshold_whatever_its_batch():
    images = [ArrayImage(slide([(0, 0, 100, 100)]), levels=3), ArrayImage(0.9 * slide([(9, 9, 60, 200)]), levels=3)]
    model = NestedATS(ModelConfig(levels=LEVELS, patch_size=24, prior="tissue"), in_channels=3, classes=2)
    together = model(images, torch.arange(2))
    alone = model(images[1:], torch.arange(1, 2))
    torch.testing.assert_close(together.logits[1:], alone.logits)
    assert torch.equal(together.phases[-1].centers_l0[1:], alone.phases[-1].centers_l0)


def test_the_threshold_lies_between_glass_and_stain():
    for boxes in ([(0, 0, 20, 20)], [(0, 0, 128, 256)], [], [(0, 0, 256, 256)]):
        seen = signal(slide(boxes)[None], "tissue", 0.0)
        threshold = thresholds(seen, "tissue")
        found = occupied(seen, threshold, 8)
        inside = torch.zeros(256, 256)
        for y0, x0, y1, x1 in boxes:
            inside[y0:y1, x0:x1] = 1
        torch.testing.assert_close(found[0], torch.nn.functional.avg_pool2d(inside[None], 8)[0] >= 0.05)


@pytest.mark.parametrize("nodata", [0.0, 1.0])
def test_pixels_that_were_never_recorded_are_not_drawn(nodata):
    pixels = torch.full((2, 256, 256), nodata)
    pixels[:, :, 96:] = 0.2 + 0.5 * torch.rand(2, 256, 160)
    config = ModelConfig(levels=LEVELS, patch_size=24, prior="valid", nodata=nodata)
    output = NestedATS(config, in_channels=2, classes=2)([ArrayImage(pixels, levels=3)] * 4, torch.arange(4))
    assert (output.phases[-1].centers_l0[..., 1] > 92).all()


def test_tissue_needs_colour():
    with pytest.raises(EncoderError, match="colour"):
        NestedATS(ModelConfig(levels=LEVELS, patch_size=24, prior="tissue"), in_channels=1, classes=2)
    with pytest.raises(ValueError, match="prior"):
        ModelConfig(levels=LEVELS, prior="glass")
