"""Reading over HTTP from a loopback server: only the bytes asked for, counted, and errors kept ours."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from storage import (
    ConvertOptions,
    CorruptImageError,
    NotAPyramidError,
    Slide,
    TransferError,
    open_image,
    write_pyramid,
)
from storage.place.objects import connect
from storage.place.retry import READING
from storage.place.stores import list_below, open_store
from storage.place.web import _connections, _session


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Clients that give up soon, so that failing servers are tested soon."""
    monkeypatch.setattr("storage.place.retry.TIMEOUT_S", 0.3)
    monkeypatch.setattr("storage.place.retry.FIRST_PAUSE_S", 0.001)


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


@pytest.mark.parametrize("failure", [500, 503, "close", "hang", "cut"])
def test_a_server_that_recovers_is_asked_again(web, pixels, failure):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        web.failures[:] = [failure, failure]
        np.testing.assert_array_equal(slide.read(0, (0, 0, 9, 9)), pixels[:, :9, :9])
        assert web.failures == []


@pytest.mark.parametrize("failure", [500, 503, "close", "hang", "cut", "whole"])
@pytest.mark.parametrize("good", [0, 1])  # requests answered before: the shard's index
def test_a_server_that_goes_on_failing_is_an_error_after_a_few_requests(web, pixels, failure, good):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        if good:
            slide.read(0, (0, 0, 9, 9))
        web.log.clear()
        web.failures[:] = [failure] * 50
        with pytest.raises(TransferError, match=r"p\.ome\.zarr/0/c/0/0/0: the request failed"):
            slide.read(0, (100, 100, 9, 9))
        assert len(web.log) <= (1 + READING.retries) ** 2
        web.failures.clear()
        np.testing.assert_array_equal(slide.read(0, (100, 100, 9, 9)), pixels[:, 100:109, 100:109])


@pytest.mark.parametrize("good", [0, 1])
def test_an_answer_shorter_than_asked_is_an_error_and_never_filled(web, pixels, good):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        if good:
            slide.read(0, (0, 0, 9, 9))
        web.failures[:] = ["short"] * 50
        with pytest.raises((CorruptImageError, TransferError), match=r"p\.ome\.zarr"):
            slide.read(0, (100, 100, 9, 9))


def test_patches_need_two_requests_on_average(web, tmp_path, rng):
    """Patches of 256 read one by one, chunks of 128 in four shards, as a conversion writes them."""
    size = 4096
    image = rng.integers(100, 120, (1, size, size), dtype=np.uint8)
    write_pyramid(tmp_path / "large.ome.zarr", image, options=ConvertOptions(chunk=128, shard=2048))
    with Slide(f"{web.url}/large.ome.zarr") as slide:
        slide.read_many(0, [(y, x, 8, 8) for y in (0, 2048) for x in (0, 2048)])  # the indexes
        web.log.clear()
        corners = rng.integers(0, size - 256, (100, 2)).tolist()
        for y, x in corners:
            np.testing.assert_array_equal(slide.read(0, (y, x, 256, 256)), image[:, y : y + 256, x : x + 256])
        assert len(web.log) / len(corners) <= 2


def _read_forked(slide, queue):
    try:
        slide.read(0, (0, 0, 9, 9))
    except TransferError as error:
        queue.put(str(error))


@pytest.mark.parametrize("failure", [503, "cut", "close"])
def test_many_ranges_come_in_order_though_some_fail_at_first(web, tmp_path, failure):
    (tmp_path / "f").write_bytes(bytes(range(256)))
    ranges = [("f", i * 37 % 250, 5) for i in range(60)]
    web.failures += [failure] * 12
    found = list(open_store(web.url).get_ranges(ranges))
    assert found == [bytes(range(start, start + 5)) for _, start, _ in ranges]
    assert len(web.log) == len(ranges) + 12  # none but those that failed is asked for twice


def test_ranges_are_asked_for_no_further_ahead_than_a_few(web, tmp_path):
    (tmp_path / "f").write_bytes(bytes(256))
    ranges = open_store(web.url).get_ranges([("f", i, 1) for i in range(200)])
    next(ranges)
    time.sleep(0.3)
    assert 1 <= len(web.log) <= 16
    with pytest.raises(FileNotFoundError):
        list(open_store(web.url).get_ranges([("f", 0, 1), ("none", 0, 1)]))


def test_a_request_has_its_whole_time_however_many_are_before_it(web, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(bytes(256))
    monkeypatch.setattr("storage.place.web.CONNECTIONS", 2)
    web.failures += ["slow"] * 16  # together they take 0.8 s, and each has 0.3 s
    for made in (_connections, _session):
        made.cache_clear()
    try:
        assert list(open_store(web.url).get_ranges([("f", i, 1) for i in range(16)])) == [b"\0"] * 16
    finally:
        for made in (_connections, _session):
            made.cache_clear()
    assert len(web.log) == 16


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_waiting_for_ever(web, pixels):
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        child = fork.Process(target=_read_forked, args=(slide, queue))
        child.start()
        assert "start it by spawn or forkserver" in queue.get(timeout=30)
        child.join()


def test_a_server_that_refuses_is_an_error_of_ours(web, pixels):
    with Slide(f"{web.url}/p.ome.zarr") as slide:
        web.failures[:] = [403] * 50
        with pytest.raises(TransferError, match="request failed"):
            slide.read(0, (0, 0, 9, 9))
        web.failures.clear()


@pytest.mark.parametrize("open_", [Slide, open_image, connect])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gopher://127.0.0.1/p", "start with one of http://, https://, s3://"),
        ("memory:///p", "start with one of"),
        ("file:///tmp/p", "start with one of"),
        ("s3:///p", "names no host or bucket"),
        ("http:///p", "names no host or bucket"),
        ("http://[p/q", "not a URL"),
        ("http://127.0.0.1/p?sig=a/b", "URLs with a query are not supported; copy the file or give credentials"),
        ("s3://slides/p?versionId=1", "URLs with a query are not supported"),
    ],
)
def test_urls_that_are_not_read_are_told_why(open_, url, reason):
    with pytest.raises(TransferError, match=reason) as caught:
        open_(url)
    assert str(caught.value).startswith(f"{url.partition('?')[0]}: ")


def test_refusals_of_obstore_are_one_line(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(TransferError, match="not a location that can be opened") as caught:
        connect("az://container/p.zarr")
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    """No credentials of S3 anywhere."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("storage.place.credentials._VENDOR", tmp_path / "none")


@pytest.mark.parametrize("url", ["s3://slides/p.ome.zarr", "https://slides.s3.amazonaws.com/p.ome.zarr"])
def test_s3_without_keys_says_so_and_asks_nothing(no_keys, tmp_path, monkeypatch, url):
    with pytest.raises(TransferError, match=f"^{url}: no credentials for S3; set AWS_ACCESS.* AWS_SKIP_SIGNATURE=t"):
        connect(url)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(TransferError, match="profiles in ~/.aws are not read.*export-credentials"):
        connect(url)
    for name in ("AWS_SKIP_SIGNATURE", "AWS_METADATA_ENDPOINT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            connect(url)
    (tmp_path / "none").write_text("Amazon EC2\n")  # a role of the machine gives keys there
    connect(url)


def test_every_way_to_open_s3_looks_for_keys(no_keys):
    for open_ in (Slide, open_image, lambda url: list_below(url, bool)):
        with pytest.raises(TransferError, match="no credentials"):
            open_("s3://slides/p.ome.zarr")
