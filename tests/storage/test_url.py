"""Reading over HTTP from a loopback server: only the bytes asked for, counted, and errors kept ours."""

import numpy as np
import pytest

from storage import ConvertOptions, CorruptImageError, NotAPyramidError, Slide, TransferError, write_pyramid


@pytest.fixture
def pixels(tmp_path, textured):
    image = textured((3, 300, 300))
    write_pyramid(tmp_path / "p.ome.zarr", image, options=ConvertOptions(chunk=32, shard=128))
    return image


def test_boxes_over_http_equal_local_ones(web, pixels, tmp_path):
    boxes = [(y, y // 2, 50, 60) for y in range(-20, 300, 40)]
    with Slide(f"{web.url}/p.ome.zarr") as remote, Slide(tmp_path / "p.ome.zarr") as local:
        np.testing.assert_array_equal(remote.read_many(0, boxes), local.read_many(0, boxes))
        np.testing.assert_array_equal(remote.read(0, (0, 0, 300, 300)), pixels)
        assert remote.name == "p"


def test_counters_equal_what_the_server_saw(web, pixels):
    with Slide(f"{web.url}/p.ome.zarr/") as slide:
        slide.read_many(0, [(y, x, 40, 40) for y in (0, 100, 220) for x in (5, 140)])
        ranges = [wanted for _, wanted in web.log if wanted]
        asked = sum(int(r.partition("-")[2]) - int(r[6:].partition("-")[0]) + 1 for r in ranges)
        root = slide.statistics.bytes_read - asked
        assert slide.statistics.requests == len(web.log) == 1 + len(ranges)
        assert 0 < root < 20_000
        before = len(web.log)
        slide.read(0, (220, 5, 8, 8))
        assert len(web.log) == before + 1  # the shard's index was kept


def test_near_chunks_are_fetched_together(web, pixels):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        slide.read(0, (0, 0, 128, 128))
        assert slide.statistics.requests == 3  # metadata, index, and all 16 chunks at once


def test_missing_pyramid_and_missing_shard(web, pixels, tmp_path):
    with pytest.raises(NotAPyramidError, match="convert"):
        Slide(f"{web.url}/other.zarr")
    (tmp_path / "p.ome.zarr/0/c/0/0/0").unlink()
    with Slide(f"{web.url}/p.ome.zarr") as slide, pytest.raises(CorruptImageError, match="missing"):
        slide.read(0, (0, 0, 8, 8))


def test_a_server_that_recovers_is_asked_again(web, pixels):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        web.failures[:] = [503]
        np.testing.assert_array_equal(slide.read(0, (0, 0, 9, 9)), pixels[:, :9, :9])


def test_a_server_that_refuses_is_an_error_of_ours(web, pixels):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        web.failures[:] = [403] * 50
        with pytest.raises(TransferError, match="request failed"):
            slide.read(0, (0, 0, 9, 9))
        web.failures.clear()


def test_unknown_schemes_are_an_error_of_ours():
    with pytest.raises(TransferError, match="not a location"):
        Slide("gopher://127.0.0.1/p.zarr")
