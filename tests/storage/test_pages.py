"""TIFFs of several pages: one is chosen, or all are channels, and none is taken for another unseen."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tifffile

from storage import ConversionError, ConvertOptions, Slide, UnsupportedImageError, convert, open_image, validate


def small(**options):
    return ConvertOptions(chunk=16, shard=32, min_level_size=8, **options)


@pytest.fixture
def stack(tmp_path):
    """Four grey pages of one size."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 60, 70), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", metadata=None, compression="deflate")
    return tmp_path / "x.tif", pixels


def whole(image):
    return image.read(0, 0, *image.shape[1:])


def test_a_stack_says_what_is_in_it_and_how_to_choose(stack):
    with pytest.raises(UnsupportedImageError, match=r"a stack of 4 pages, not one image; .* by --page 0 to --page 3"):
        open_image(stack[0])


@pytest.mark.parametrize("page", range(4))
def test_a_page_is_the_image(stack, page):
    path, pixels = stack
    with open_image(path, pages=page) as image, pickle.loads(pickle.dumps(image)) as again:
        np.testing.assert_array_equal(whole(image), pixels[page : page + 1])
        np.testing.assert_array_equal(whole(again), pixels[page : page + 1])


def test_pages_are_channels(stack):
    path, pixels = stack
    with open_image(path, pages="channels") as image:
        assert image.channels == ("0", "1", "2", "3")
        np.testing.assert_array_equal(whole(image), pixels)


def test_a_pyramid_knows_its_page(stack, tmp_path):
    path, pixels = stack
    target = tmp_path / "p.zarr"
    convert(path, target, options=small(pages=2))
    with Slide(target) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 60, 70)), pixels[2:3])
    assert validate(target, source=path) == []
    assert convert(path, target, options=small(pages=2)).up_to_date
    with pytest.raises(ConversionError, match="its options differs"):
        convert(path, target, options=small(pages=1))
    convert(path, target, options=small(pages="channels"), overwrite=True)
    assert validate(target, source=path) == []
    assert "pages" not in small().plain


def test_pages_of_colours_and_of_several_sizes(tmp_path):
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 255, (h, 50, 3), np.uint8) for h in (40, 60, 30)]
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        for page in pages:
            tif.write(page, photometric="rgb", metadata=None)
    for number, page in enumerate(pages):
        with open_image(tmp_path / "x.tif", pages=number) as image:
            np.testing.assert_array_equal(whole(image), page.transpose(2, 0, 1))
    with pytest.raises(UnsupportedImageError, match="first image of 40 x 50 pixels is smaller than a later one of"):
        open_image(tmp_path / "x.tif")
    with pytest.raises(UnsupportedImageError, match="planes that are stored in different ways"):
        open_image(tmp_path / "x.tif", pages="channels")


def test_a_thumbnail_that_holds_its_image_is_not_taken(tmp_path):
    """As in files of cameras."""
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(np.zeros((20, 30, 3), np.uint8), photometric="rgb", subfiletype=1, subifds=1, metadata=None)
        tif.write(np.zeros((200, 300), np.uint16), photometric="cfa", metadata=None)
    with pytest.raises(UnsupportedImageError, match="unprocessed pixels of a camera"):
        open_image(tmp_path / "x.tif")
    with open_image(tmp_path / "x.tif", pages=0) as image:
        assert image.shape == (3, 20, 30)


def test_pages_that_are_not_there(stack, tmp_path):
    with pytest.raises(UnsupportedImageError, match=r"x\.tif: no page 4: it has 4, numbered from 0"):
        open_image(stack[0], pages=4)
    tifffile.imwrite(tmp_path / "one.tif", stack[1][0])
    with open_image(tmp_path / "one.tif", pages=0) as image:
        np.testing.assert_array_equal(whole(image), stack[1][:1])
    with pytest.raises(ValueError, match="numbered from 0"):
        small(pages=-1)
