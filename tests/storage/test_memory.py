"""PNG and JPEG files as slides: what a conversion of the same pixels would give, without one."""

import pickle

import imagecodecs
import numpy as np
import pytest

from storage import CorruptImageError, MissingImageError, NotAPyramidError, Slide, write_pyramid


@pytest.fixture
def pixels(textured):
    return textured((3, 150, 201))


@pytest.fixture
def png(tmp_path, pixels):
    path = tmp_path / "photo.png"
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels.transpose(1, 2, 0))))
    return path


def test_levels_are_those_of_a_pyramid(tmp_path, png, pixels):
    write_pyramid(tmp_path / "p.ome.zarr", pixels)
    with Slide(png) as slide, Slide(tmp_path / "p.ome.zarr") as pyramid:
        assert [level.shape_yx for level in slide.levels] == [level.shape_yx for level in pyramid.levels]
        for i, (level, expected) in enumerate(zip(slide.levels, pyramid.levels, strict=True)):
            assert (level.downsample, level.scale_yx) == (expected.downsample, expected.scale_yx)
            assert (level.translation_yx, level.mpp) == (expected.translation_yx, None)
            boxes = [(y, x, 40, 50) for y in (-20, 0, 30, 140) for x in (-60, 10, 90)]
            np.testing.assert_array_equal(
                slide.read_many(i, boxes, fill=7), pyramid.read_many(i, boxes, fill=7), err_msg=str(i)
            )


def test_attributes_and_counters(png):
    with Slide(png) as slide:
        assert (slide.name, slide.channels, slide.dtype) == ("photo.png", ("R", "G", "B"), np.uint8)
        assert slide.memory_bytes > 3 * 150 * 201
        assert (slide.statistics.requests, slide.statistics.bytes_read) == (1, png.stat().st_size)
        slide.read(0, (0, 0, 50, 50))
        assert slide.statistics.requests == 1
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(slide)).read(0, (0, 0, 9, 9)), slide.read(0, (0, 0, 9, 9))
        )


def test_grey_of_16_bits_and_a_single_pixel(tmp_path):
    for name, image in {
        "grey": np.arange(6400, dtype=np.uint16).reshape(80, 80),
        "one": np.ones((1, 1), np.uint8),
    }.items():
        (tmp_path / f"{name}.png").write_bytes(imagecodecs.png_encode(image))
        with Slide(tmp_path / f"{name}.png") as slide:
            assert len(slide.levels) == 2
            np.testing.assert_array_equal(slide.read(0, (0, 0, *image.shape))[0], image)  # type: ignore[attr-defined]


def test_a_jpeg_is_told_by_its_content(tmp_path, pixels):
    data = imagecodecs.jpeg_encode(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    (tmp_path / "photo").write_bytes(data)
    with Slide(tmp_path / "photo") as slide:
        np.testing.assert_array_equal(
            slide.read(0, (0, 0, 150, 201)), imagecodecs.jpeg_decode(data).transpose(2, 0, 1)
        )


def test_over_http(web, png, pixels):
    with Slide(f"{web.url}/photo.png") as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 150, 201)), pixels)
    with pytest.raises(MissingImageError, match="none.png"):
        Slide(f"{web.url}/none.png")


def test_damaged_and_other_files(tmp_path, png):
    png.write_bytes(png.read_bytes()[:-200])
    with pytest.raises(CorruptImageError, match="photo.png"):
        Slide(png)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(NotAPyramidError, match="not an image of a kind that is read; give a TIFF"):
        Slide(tmp_path / "text.png")
