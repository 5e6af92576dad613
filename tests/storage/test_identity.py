"""A slide's identity: the same wherever and whenever it is opened, another wherever a pixel is."""

import shutil

import imagecodecs
import numpy as np
import pytest

from storage import ConvertOptions, Slide, convert, write_pyramid

from .test_foreign import write_foreign

OPTIONS = ConvertOptions(chunk=32, shard=64)


@pytest.fixture
def write(tmp_path, textured):
    """Write an image with some pixels changed, of a kind, and return its path."""

    def write(kind, name="image", at=None, shape=(3, 150, 200), **options):
        pixels = textured(shape)
        if at is not None:
            pixels[at] ^= 1
        if kind == "pyramid":
            path = tmp_path / f"{name}.ome.zarr"
            write_pyramid(path, pixels, **({"options": OPTIONS, "mpp": 0.5} | options))
        elif kind == "foreign":
            path = write_foreign(tmp_path / f"{name}.zarr", pixels)
        else:
            path = tmp_path / f"{name}.{kind}"
            path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels.transpose(1, 2, 0).squeeze())))
        return path

    return write


def identity(path):
    with Slide(path) as slide:
        before = slide.statistics
        found = slide.identity
        assert slide.statistics == before  # nothing is read for it
    return found


@pytest.mark.parametrize("kind", ["pyramid", "png"])
def test_it_is_that_of_the_pixels(write, tmp_path, kind):
    one = identity(write(kind))
    assert one == identity(write(kind, "written again"))
    moved = tmp_path / f"elsewhere.{'ome.zarr' if kind == 'pyramid' else kind}"
    shutil.move(write(kind, "moved"), moved)
    assert identity(moved) == one
    others = [
        identity(write(kind, f"changed {i}", at)) for i, at in enumerate([(0, 0, 0), (2, 149, 199), (1, 70, 9)])
    ]
    others.append(identity(write(kind, "larger", shape=(3, 150, 201))))
    others.append(identity(write(kind, "grey", shape=(1, 150, 200))))
    assert len({one, *others}) == 6


def test_a_pyramid_is_another_with_other_levels_or_lossy_chunks(write, tmp_path):
    one = identity(write("pyramid"))
    fewer = identity(write("pyramid", "fewer", options=ConvertOptions(chunk=32, shard=64, min_level_size=200)))
    pixel = identity(write("pyramid", "pixel", mpp=0.25))
    assert len({one, fewer, pixel}) == 3
    written = np.zeros((3, 150, 200), np.uint8)
    write_pyramid(tmp_path / "zeros.ome.zarr", written, options=OPTIONS)  # no shard is stored
    write_pyramid(tmp_path / "wide.ome.zarr", np.zeros((3, 150, 201), np.uint8), options=OPTIONS)
    assert identity(tmp_path / "zeros.ome.zarr") != identity(tmp_path / "wide.ome.zarr")


def test_a_converted_image_has_that_of_its_pyramid(tmp_path, tiff):
    path, _ = tiff(200, 150)
    found = []
    for name in ("one", "two"):
        convert(path, tmp_path / f"{name}.ome.zarr", options=OPTIONS)
        found.append(identity(tmp_path / f"{name}.ome.zarr"))
    assert found[0] == found[1]


def test_over_http_it_is_the_same_and_takes_no_request(web, write):
    path = write("pyramid")
    with Slide(f"{web.url}/{path.name}") as slide:
        assert slide.identity == identity(path)
        assert slide.statistics.requests == len(web.log) == 1


def test_what_lists_no_chunks_has_none(write):
    assert identity(write("foreign")) is None
