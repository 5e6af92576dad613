"""Reading boxes: against numpy, at and beyond the borders, counted exactly, and never filled in."""

import errno
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import (
    ConvertOptions,
    CorruptImageError,
    MissingImageError,
    NotAPyramidError,
    ReadStatistics,
    Slide,
    StorageError,
    write_pyramid,
)
from storage.format.ome_zarr import seal
from storage.place.local_store import _descriptors
from storage.read.foreign import ForeignSource

CHUNK, SHARD = 16, 64


@pytest.fixture(scope="module")
def pixels():
    image = np.random.default_rng(3).integers(1, 255, (3, 150, 200), dtype=np.uint8)
    image[:, 64:128, 0:64] = 0  # one empty shard
    image[:, 0:16, 16:32] = 0  # one empty chunk
    return image


@pytest.fixture(scope="module")
def path(pixels, tmp_path_factory):
    target = tmp_path_factory.mktemp("slide") / "p.ome.zarr"
    write_pyramid(target, pixels, options=ConvertOptions(chunk=CHUNK, shard=SHARD), mpp=0.5)
    return target


@pytest.fixture(scope="module")
def slide(path):
    with Slide(path) as opened:
        yield opened


def cropped(pixels, box, fill):
    """Oracle: pad widely, then cut."""
    y, x, h, w = box
    margin = 400
    padded = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)), constant_values=fill)
    return padded[:, y + margin : y + margin + h, x + margin : x + margin + w]


sizes = st.tuples(st.integers(0, 90), st.integers(0, 90))
corners = st.lists(st.tuples(st.integers(-120, 260), st.integers(-120, 260)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(corners, sizes, st.integers(0, 255))
def test_read_many_equals_read_equals_numpy(slide, pixels, at, size, fill):
    boxes = np.array([(*corner, *size) for corner in at])
    many = slide.read_many(0, boxes, fill=fill)
    for box, actual in zip(boxes, many, strict=True):
        np.testing.assert_array_equal(actual, cropped(pixels, box, fill))
        np.testing.assert_array_equal(slide.read(0, box, fill=fill), actual)


def test_attributes(slide):
    assert (slide.name, slide.shape_yx, slide.mpp, slide.dtype) == ("p", (150, 200), 0.5, np.uint8)
    assert [level.downsample for level in slide.levels] == [1, 2, 4]
    assert [level.mpp for level in slide.levels] == [0.5, 1, 2]
    assert slide.levels[1].translation_yx == (0.25, 0.25)
    assert (slide.levels[0].chunk, slide.levels[0].shard) == (CHUNK, SHARD)


def test_no_boxes_and_boxes_outside(slide):
    assert slide.read_many(0, []).shape == (0, 3, 0, 0)
    assert (slide.read(0, (500, 500, 8, 8), fill=7) == 7).all()
    assert (slide.read(2, (-1000, 0, 8, 8), fill=7) == 7).all()


@pytest.mark.parametrize("boxes", [[(0, 0, 4)], [(0, 0, 4, 4), (0, 0, 4, 5)], [(0, 0, -1, 4)], [(0.5, 0, 4, 4)]])
def test_malformed_boxes_are_programming_errors(slide, boxes):
    with pytest.raises(ValueError, match="boxes must"):
        slide.read_many(0, boxes)


@pytest.mark.parametrize("level", [-1, 3])
def test_unknown_levels_are_programming_errors(slide, level):
    with pytest.raises(ValueError, match="level"):
        slide.read(level, (0, 0, 4, 4))


def test_statistics_are_exact(path):
    """Requests, bytes and chunks of a layout worked out by hand: 4 x 4 chunks a shard, 16 x 16 pixels a chunk."""
    index_bytes = 16 * 16 + 4
    with Slide(path) as slide:
        opened = slide.statistics
        assert opened.requests == 1
        assert opened.bytes_read == (path / "zarr.json").stat().st_size
        slide.read_many(0, [(0, 0, 16, 16), (2, 2, 8, 8)][:1])
        first = slide.statistics - opened
        assert (first.requests, first.chunks_decoded) == (2, 1)  # the shard's index, and its first chunk
        slide.read_many(0, [(0, 0, 8, 8), (4, 4, 8, 8), (8, 8, 8, 8)])
        shared = slide.statistics - opened - first
        assert (shared.requests, shared.chunks_decoded) == (1, 1)  # one chunk serves three boxes
        assert shared.bytes_read == first.bytes_read - index_bytes
        before = slide.statistics
        slide.read(0, (0, 32, 16, 32))
        assert slide.statistics - before == ReadStatistics(1, (slide.statistics - before).bytes_read, 2)  # neighbours
        before = slide.statistics
        slide.read(0, (0, 16, 16, 16))  # an empty chunk
        slide.read(0, (64, 0, 64, 64))  # an empty shard
        assert slide.statistics == before


def test_threads_share_a_slide(path, pixels):
    rng = np.random.default_rng(0)
    errors = []

    def work(slide, own):
        wrong = [box for box in own if not np.array_equal(slide.read(0, box), cropped(pixels, box, 0))]
        errors.extend(wrong)

    with Slide(path) as slide:
        boxes = [[(*rng.integers(-20, 150, 2), 40, 40) for _ in range(40)] for _ in range(8)]
        threads = [threading.Thread(target=work, args=(slide, own)) for own in boxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_pickles_for_spawned_workers(slide, pixels):
    assert pickle.loads(pickle.dumps(slide)).location == slide.location
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(Slide.read, (slide, 0, (0, 0, 150, 200))), pixels)


def test_many_files_keep_few_descriptors(tmp_path, textured, monkeypatch):
    monkeypatch.setattr(_descriptors, "limit", 3)
    pixels = textured((1, 200, 200))
    write_pyramid(tmp_path / "p.zarr", pixels, options=ConvertOptions(chunk=8, shard=16))
    with Slide(tmp_path / "p.zarr") as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 200, 200)), pixels)
        assert len(_descriptors._open) == 3


def test_threads_may_read_more_files_than_are_kept_open(tmp_path, textured, monkeypatch):
    monkeypatch.setattr(_descriptors, "limit", 1)
    pixels = textured((1, 160, 160))
    write_pyramid(tmp_path / "p.zarr", pixels, options=ConvertOptions(chunk=8, shard=16))
    with Slide(tmp_path / "p.zarr") as slide, ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(slide.read, 0, (y, x, 16, 16)) for y in range(0, 160, 16) for x in range(0, 160, 16)]
        for _ in range(4):
            reads += [pool.submit(slide.read, 0, (y, 0, 16, 160)) for y in range(0, 160, 16)]
        for read in reads:
            read.result()


@pytest.mark.parametrize("slow_s", [0, 1000])
def test_the_kernel_is_told_of_several_ranges_before_they_are_read_unless_reads_are_fast(path, monkeypatch, slow_s):
    told = []
    monkeypatch.setattr("storage.place.local_store.SLOW_READ_S", slow_s)
    with Slide(path) as slide:
        boxes = [(0, 0, 8, 8), (100, 100, 8, 8), (140, 190, 8, 8)]
        slide.read_many(0, boxes)
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: told.append(length), raising=False)
        slide.read_many(0, boxes[:1])
        assert told == []
        before = slide.statistics
        slide.read_many(0, boxes)
        read = slide.statistics - before
        assert (len(told), sum(told)) == ((0, 0) if slow_s else (read.requests, read.bytes_read))


@pytest.fixture
def copy(pixels, tmp_path):
    target = tmp_path / "p.ome.zarr"
    write_pyramid(target, pixels, options=ConvertOptions(chunk=CHUNK, shard=SHARD))
    return target


def test_every_flipped_bit_in_a_shard_is_found(copy, pixels):
    shard = copy / "0/c/0/0/1"
    sound = shard.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(sound), 60):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(position % 8)
        shard.write_bytes(damaged)
        with Slide(copy) as slide, pytest.raises(CorruptImageError, match=r"p\.ome\.zarr: level 0, (chunk|shard) \("):
            slide.read(0, (0, 0, 150, 200))
    shard.write_bytes(sound)
    with Slide(copy) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 150, 200)), pixels)


def test_a_missing_shard_is_an_error_and_not_fill(copy):
    (copy / "1/c/0/0/0").unlink()
    with Slide(copy) as slide:
        slide.read(0, (0, 0, 8, 8))
        with pytest.raises(CorruptImageError, match=r"level 1, shard \(0, 0\) is missing"):
            slide.read(1, (0, 0, 8, 8))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_shard_is_an_error(copy, keep):
    shard = copy / "0/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:keep])
    with Slide(copy) as slide, pytest.raises(CorruptImageError, match="level 0"):
        slide.read(0, (0, 0, 8, 8))


def test_swapped_shards_of_another_length_are_found(copy):
    first, second = copy / "0/c/0/0/0", copy / "0/c/0/0/1"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with Slide(copy) as slide, pytest.raises(CorruptImageError):
        slide.read(0, (0, 0, 150, 200))


def test_swapped_shards_of_the_same_length_are_found(tmp_path, rng):
    """Noise does not compress, so both shards have 15 chunks of one length, but not at the same places."""
    pixels = rng.integers(1, 255, (1, 64, 128), dtype=np.uint8)
    pixels[:, :16, :16] = pixels[:, 16:32, 64:80] = 0
    target = tmp_path / "p.ome.zarr"
    write_pyramid(target, pixels, options=ConvertOptions(chunk=CHUNK, shard=SHARD))
    first, second = target / "0/c/0/0/0", target / "0/c/0/0/1"
    data, other = first.read_bytes(), second.read_bytes()
    assert len(data) == len(other)
    first.write_bytes(other)
    second.write_bytes(data)
    with Slide(target) as slide, pytest.raises(CorruptImageError, match="another shard than the one"):
        slide.read(0, (0, 0, 64, 64))


def test_a_disk_that_fails_is_an_error_of_ours(copy, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with Slide(copy) as slide:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(StorageError, match=r"0/c/0/0/0: cannot be read \(Input/output error\)"):
            slide.read(0, (0, 0, 8, 8))


@pytest.mark.parametrize("keep", [0, 1, 200, -3])
def test_truncated_metadata_is_an_error(copy, keep):
    meta = copy / "zarr.json"
    meta.write_bytes(meta.read_bytes()[:keep])
    with pytest.raises(CorruptImageError, match=r"zarr\.json is damaged"):
        Slide(copy)


@pytest.mark.parametrize(
    ("find", "replace", "error"),
    [
        (b'"version":"0.5"', b'"version":"0.4"', NotAPyramidError),
        (b'"path":"0"', b'"path":"../0"', NotAPyramidError),
        (b'"path":"0"', b'"path":"/0"', NotAPyramidError),
        (b'"data_type":"uint8"', b'"data_type":"int64"', NotAPyramidError),
        (b'{"name":"crc32c"}],"index_codecs"', b'{"name":"zzz"}],"index_codecs"', NotAPyramidError),
        (b'"shape":[3,150,200]', b'"shape":[3,-5,200]', CorruptImageError),
        (b'"shape":[3,150,200]', b'"shape":[3,9999,200]', CorruptImageError),
        (b'"shape":[3,150,200]', b'"shape":"big"', CorruptImageError),
        (b'"length":[', b'"length":[1,', CorruptImageError),
        (b'"fill_value":0', b'"fill_value":1', NotAPyramidError),
        (b'"index_crc32c":[', b'"index_crc":[', CorruptImageError),
        (b'"chunk_shape":[3,16,16]', b'"chunk_shape":[3,64,1]', NotAPyramidError),
    ],
)
def test_metadata_that_is_not_ours_is_refused(copy, find, replace, error):
    meta = copy / "zarr.json"
    data = meta.read_bytes()
    assert find in data
    meta.write_bytes(data.replace(find, replace))
    with pytest.raises(error, match=r"p\.ome\.zarr"):
        Slide(copy)


@pytest.mark.parametrize(
    ("find", "replace"),
    [
        (b'"shape":[3,150,200]', b'"shape":[3,151,200]'),
        (b'"shape":[3,150,200]', b'"shape":[3,146,200]'),
        (b'"scale":[1.0,1.0', b'"scale":[1.0,3.0'),
        (b'"label":"0"', b'"label":"1"'),
    ],
)
def test_one_flipped_bit_of_the_metadata_is_an_error(copy, find, replace):
    meta = copy / "zarr.json"
    data = meta.read_bytes()
    assert find in data
    meta.write_bytes(data.replace(find, replace, 1))
    with pytest.raises(CorruptImageError, match=r"p\.ome\.zarr: zarr\.json is not as it was written"):
        Slide(copy)


def test_metadata_may_be_written_in_another_order_and_spacing(copy):
    meta = copy / "zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()), indent=2, sort_keys=True))
    with Slide(copy) as slide:
        assert slide.levels[0].shape_yx == (150, 200)


@pytest.mark.parametrize("change", [{"format": 4}, {"format": 1, "shards": {}}, {"format": None}])
def test_another_version_of_our_format_is_named(copy, change):
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["nested_ats"] |= change
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(
        NotAPyramidError, match=r"p\.ome\.zarr: written by another version .* convert the image again"
    ):
        Slide(copy)


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(MissingImageError, match="does not exist"):
        Slide(tmp_path / "nothing")
    with pytest.raises(NotAPyramidError, match="convert the image first"):
        Slide(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotAPyramidError, match="an empty file; give a TIFF"):
        Slide(tmp_path / "file")


def test_our_shards_without_our_table_are_those_of_another_writer(copy):
    """Zarr's own rule then holds: what is absent is filled."""
    root = json.loads((copy / "zarr.json").read_text())
    del root["consolidated_metadata"], root["attributes"]["nested_ats"]
    (copy / "zarr.json").write_text(json.dumps(root))
    with Slide(copy) as slide:
        assert isinstance(slide._source, ForeignSource)
        assert (slide.read(0, (64, 0, 8, 8)) == 0).all()


def test_a_forked_child_makes_its_own_threads():
    """A pool's threads do not survive a fork: a child that inherited the pool would wait for ever."""
    code = """if True:
        import os
        from storage.threads import pool
        pool().submit(int).result()
        child = os.fork()
        if child == 0:
            pool().submit(int).result(timeout=20)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_claims_that_would_fill_the_memory_are_refused(tmp_path):
    write_pyramid(
        tmp_path / "p.ome.zarr", np.zeros((1, 40, 40), np.uint8), options=ConvertOptions(chunk=16, shard=32)
    )
    meta = tmp_path / "p.ome.zarr/zarr.json"
    side = 2**20
    for chunk in (1, side):
        data = meta.read_bytes().replace(b"[1,32,32]", b"[1,%d,%d]" % (side, side))
        data = data.replace(b"[1,16,16]", b"[1,%d,%d]" % (chunk, chunk)).replace(b"[0,0,0,0]", b"[0]")
        (tmp_path / "q.zarr").mkdir(exist_ok=True)
        root = json.loads(data)
        seal(root)
        (tmp_path / "q.zarr/zarr.json").write_text(json.dumps(root))
        with pytest.raises(CorruptImageError, match=r"level 0 claims shards of (1|1048576) x "):
            Slide(tmp_path / "q.zarr")
