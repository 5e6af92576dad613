"""The cache of remote chunks: nothing fetched twice, nothing stale, nothing damaged, and its size held."""

import os
import pickle
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest

from storage import ChunkCache, ConvertOptions, Slide, StorageError, write_pyramid

OPTIONS = ConvertOptions(chunk=32, shard=128)
BOXES = [(y, x, 40, 40) for y in (0, 100, 220) for x in (5, 140)]


def checked(body: bytes) -> bytes:
    return body + google_crc32c.value(body).to_bytes(4, "little")


def kept(cache):
    return {path: path.stat().st_size for path in cache.folder.glob("??/*")}


@pytest.fixture
def cache(tmp_path):
    return ChunkCache(tmp_path / "cache", 10**8)


@pytest.fixture
def pixels(tmp_path, textured):
    image = textured((3, 300, 300))
    write_pyramid(tmp_path / "p.ome.zarr", image, options=OPTIONS)
    return image


def test_what_was_put_is_got(cache):
    assert cache.get("a") is None
    cache.put("a", checked(b"text"))
    assert cache.get("a") == checked(b"text")
    assert cache.get("b") is None
    assert pickle.loads(pickle.dumps(cache)).get("a") == checked(b"text")


def test_the_folder_may_be_text(cache):
    cache.put("a", checked(b"text"))
    assert ChunkCache(str(cache.folder), 10**8).get("a") == checked(b"text")


def test_a_damaged_file_is_dropped(cache):
    cache.put("a", checked(b"text"))
    (path,) = kept(cache)
    path.write_bytes(b"tixt" + path.read_bytes()[4:])
    assert cache.get("a") is None
    assert not path.exists()
    cache.put("b", checked(b"text"))
    (path,) = kept(cache)
    path.write_bytes(b"")
    assert cache.get("b") is None


def test_the_least_recently_used_go_first(tmp_path):
    cache = ChunkCache(tmp_path / "cache", 1000)
    for i in range(9):
        cache.put(str(i), checked(bytes([i]) * 96))
        (newest,) = [path for path, age in ((p, p.stat().st_mtime) for p in kept(cache)) if age > 10**9]
        os.utime(newest, (i, i))
    assert cache.get("0") is not None
    cache.put("9", checked(b"9" * 96))
    cache.put("10", checked(b"0" * 96))  # no room: down to 900 bytes with it
    assert [i for i in range(11) if cache.get(str(i)) is None] == [1, 2]
    assert sum(kept(cache).values()) == 900


def test_the_size_is_held_over_many_puts(tmp_path, rng):
    cache = ChunkCache(tmp_path / "cache", 5000)
    for i in range(300):
        cache.put(str(i % 120), checked(rng.bytes(int(rng.integers(1, 900)))))
        assert sum(kept(cache).values()) <= 5000
    cache.put("big", checked(bytes(6000)))
    assert cache.get("big") is None


def test_nothing_of_others_is_removed(tmp_path):
    (tmp_path / "ab").mkdir()
    others = [tmp_path / "photo.png", tmp_path / "ab" / "letter.txt"]
    for path in others:
        path.write_bytes(bytes(5000))
    cache = ChunkCache(tmp_path, 1000)
    for i in range(30):
        cache.put(str(i), checked(bytes(100)))
    assert all(path.exists() for path in others)


def test_unfinished_files_of_ended_processes_are_removed(tmp_path):
    cache = ChunkCache(tmp_path / "cache", 1000)
    cache.put("a", checked(bytes(500)))
    (path,) = kept(cache)
    left = path.with_name("x.tmp")
    left.touch()
    os.utime(left, (0, 0))
    cache.put("b", checked(bytes(600)))
    assert not left.exists()


FILL = """if True:
    import random, sys
    from pathlib import Path
    import google_crc32c
    from storage.read.cache import ChunkCache
    cache, draw = ChunkCache(Path(sys.argv[1]), 2000), random.Random(sys.argv[2])
    for _ in range(200):
        name = draw.randrange(40)
        body = bytes([name]) * 90
        expected = body + google_crc32c.value(body).to_bytes(4, "little")
        found = cache.get(str(name))
        assert found in (None, expected)
        if found is None:
            cache.put(str(name), expected)
"""


def test_processes_share_a_folder(tmp_path):
    folder = tmp_path / "cache"
    workers = [subprocess.Popen([sys.executable, "-c", FILL, folder, str(seed)]) for seed in range(3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    assert 1000 < sum(kept(ChunkCache(folder, 2000)).values()) <= 2000
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/cache: cannot be used as a cache"):
        ChunkCache(tmp_path / "file" / "cache", 1)
    with pytest.raises(ValueError, match="max_bytes"):
        ChunkCache(tmp_path, 0)


def test_a_disk_that_fills_does_not_fail_the_reading(web, pixels, cache, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.read.cache.write_file", fail)
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 300, 300)), pixels)
        assert slide.statistics.cached_chunks == 0


def test_a_second_reading_asks_for_the_metadata_only(web, pixels, cache):
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        first = slide.read_many(0, BOXES)
        fetched = slide.statistics
        assert (fetched.cached_chunks, fetched.requests) == (0, len(web.log))
        again = slide.read_many(0, BOXES)
        assert (slide.statistics - fetched).cached_chunks == fetched.chunks_decoded
        assert slide.statistics.requests == fetched.requests
    web.log.clear()
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        np.testing.assert_array_equal(slide.read_many(0, BOXES), first)
        np.testing.assert_array_equal(again, first)
        assert len(web.log) == slide.statistics.requests == 1
        assert slide.statistics.cached_chunks == slide.statistics.chunks_decoded == fetched.chunks_decoded
        assert pickle.loads(pickle.dumps(slide)).cache == cache
        np.testing.assert_array_equal(slide.read(0, (0, 0, 300, 300)), pixels)  # some cached, some not


def test_a_pyramid_that_was_converted_again_is_never_served_stale(web, pixels, cache, tmp_path):
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        slide.read_many(0, BOXES)
    changed = pixels[:, ::-1] ^ 1  # compresses no better: most chunks keep their lengths and places
    write_pyramid(tmp_path / "p.ome.zarr", changed, options=OPTIONS, overwrite=True)
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 300, 300)), changed)
        assert slide.statistics.cached_chunks == 0


def test_a_damaged_cache_is_fetched_anew(web, pixels, cache):
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        slide.read(0, (0, 0, 300, 300))
        before = slide.statistics
    for path in kept(cache):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with Slide(f"{web.url}/p.ome.zarr", cache=cache) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 300, 300)), pixels)
        assert slide.statistics == before
