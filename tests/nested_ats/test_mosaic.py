"""Several images as one: pixels, gaps, masks, and what a model sees of them."""

import pytest
import torch

from nested_ats import ArrayImage, DeepMILConfig, LevelConfig, ModelConfig, UniformConfig, build_model, predict
from nested_ats.mask import Mask
from nested_ats.mosaic import Mosaic

NESTED = ModelConfig(
    levels=(LevelConfig(downsample=8, samples=5, stride=2), LevelConfig(downsample=2, size=16, samples=6, stride=4)),
    patch_size=24,
    prior="valid",
)
CONFIGS = {
    "ats": NESTED,
    "deepmil": DeepMILConfig(patch_size=24, stride=24, prior="valid"),
    "uniform": UniformConfig(patch_size=24, samples=4, cell=16.0, prior="valid"),
}


def picture(height, width, seed, *, dtype=torch.uint8, background=0.5):
    pixels = torch.randint(0, 255, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(dtype)
    image = ArrayImage(pixels, levels=4, background=background)
    image.mask = Mask(torch.ones(1, 1, dtype=torch.bool), (height, width))
    return image


def pictures():
    return [picture(150, 100, 0), picture(64, 180, 1), picture(97, 33, 2)]


@pytest.fixture
def mosaic():
    return Mosaic(pictures(), NESTED, background=0.5)


def test_images_begin_at_cells_and_nothing_around_one_reaches_another(mosaic):
    assert (mosaic.corners_l0 % 16 == 0).all()
    ends = mosaic.corners_l0[:, 0] + mosaic.sizes_l0[:, 0]
    reach = max(2 * (16 + 2 * len(NESTED.levels[1].channels)), 8 * (2 + 2 * len(NESTED.levels[0].channels)), 24)
    assert (mosaic.corners_l0[1:, 0] - ends[:-1] >= reach).all()
    assert mosaic.downsamples == [1.0, 2.0, 8.0]
    assert all(size % 16 == 0 for size in mosaic.shapes[0])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pixels_are_those_of_the_images(mosaic, level):
    downsample = mosaic.downsamples[level]
    whole = mosaic.read(level, torch.tensor([[0, 0, *mosaic.shapes[level]]]))[0]
    wanted = torch.full_like(whole, 0.5)
    for image, (top, left) in zip(pictures(), mosaic.corners_l0.tolist(), strict=True):
        own = image.downsamples.index(downsample)
        height, width = image.shapes[own]
        y, x = round(top / downsample), round(left / downsample)
        wanted[:, y : y + height, x : x + width] = image.read(own, torch.tensor([[0, 0, height, width]]))[0]
    assert torch.equal(whole, wanted)
    # Boxes anywhere, of one image, of several, of none, and off all of them.
    generator = torch.Generator().manual_seed(0)
    height, width = mosaic.shapes[level]
    for side in (5, 40, 150):
        starts = torch.stack(
            [torch.randint(-side, high + side, (30,), generator=generator) for high in (height, width)], -1
        )
        boxes = torch.cat([starts, torch.full_like(starts, side)], -1)
        padded = torch.nn.functional.pad(wanted, (300,) * 4, value=0.5)
        cut = [padded[:, y + 300 : y + 300 + side, x + 300 : x + 300 + side] for y, x in starts.tolist()]
        assert torch.equal(mosaic.read(level, boxes), torch.stack(cut))


def test_types_that_differ_become_shares_of_the_largest_value():
    low = picture(64, 64, 0)
    low.read = lambda level, boxes: torch.full((len(boxes), 3, *boxes[0, 2:].tolist()), 255, dtype=torch.uint8)
    high = picture(64, 64, 1)
    high.read = lambda level, boxes: torch.full((len(boxes), 3, *boxes[0, 2:].tolist()), 13107, dtype=torch.uint16)
    mosaic = Mosaic([low, high], NESTED)
    whole = mosaic.read(0, torch.tensor([[0, 0, *mosaic.shapes[0]]]))[0]
    assert whole.unique().tolist() == pytest.approx([0, 0.2, 1.0])
    apart = mosaic.read(0, torch.tensor([[0, 0, 4, 4], [*mosaic.corners_l0[1].tolist(), 4, 4]]))
    assert apart[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.2])
    alone = mosaic.read(0, torch.tensor([[0, 0, 4, 4]]))
    assert alone.dtype == torch.uint8


def test_a_mask_is_that_of_each_image_and_nothing_between(mosaic):
    image = pictures()[1]
    image.mask = Mask(torch.tensor([[True, False]]), (64, 90))
    bare = ArrayImage(torch.zeros(3, 40, 50), levels=4)
    both = Mosaic([image, bare], NESTED)
    (top, _), (second, _) = both.corners_l0.tolist()
    boxes = torch.tensor([[top, 0, top + 64, 180], [top + 64, 0, second, 180], [second - 9, 10, second + 5, 900]])
    assert both.mask.area(boxes).tolist() == pytest.approx([64 * 90, 0, 5 * 40])


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_patch_is_drawn_between_images_and_every_image_can_have_some(kind):
    mosaic = Mosaic(pictures(), CONFIGS[kind], background=0.5)
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind], in_channels=3, classes=2).eval()
    found = predict(model, [mosaic], torch.arange(40)[None])
    last = [output.phases[-1] for output in found.outputs]
    drawn = torch.cat([phase.centers_l0[0][phase.z[0] * phase.attention[0] > 0] for phase in last])
    low, high = mosaic.corners_l0 - 12, mosaic.corners_l0 + mosaic.sizes_l0 + 12
    inside = ((drawn[:, None] > low) & (drawn[:, None] < high)).all(-1)  # a patch of 24 may begin outside
    assert inside.any(-1).all()
    assert inside.any(0).all()


def test_an_image_alone_is_seen_as_without_the_mosaic():
    """Its cells are those that it has by itself, so the exact answer of Deep MIL is the same."""
    config = CONFIGS["deepmil"]
    torch.manual_seed(0)
    model = build_model(config, in_channels=3, classes=2).double().eval()
    keys = torch.tensor([[0]])
    alone = predict(model, [picture(96, 64, 0)], keys).answers
    torch.testing.assert_close(predict(model, [Mosaic([picture(96, 64, 0)], config)], keys).answers, alone)
    # Two images are the bag of the patches of both.
    both = [picture(96, 64, 0), picture(64, 64, 1)]
    together = predict(model, [Mosaic(both, config)], keys)
    bags = [predict(model, [image], keys).outputs[0] for image in both]
    weights = [bag.phases[0].population.log_attention for bag in bags]
    assert (together.outputs[0].phases[0].attention[0] > 0).sum() == sum(w.numel() for w in weights)


def test_an_image_without_a_level_is_refused():
    with pytest.raises(ValueError, match="no level at downsample 2"):
        Mosaic([picture(64, 64, 0), ArrayImage(torch.zeros(3, 20, 20))], NESTED)
