"""Megapixel MNIST: the rendering, the recipe, the files; and the format of the digits."""

import gzip
import os
import struct
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tifffile
from example_data.idx import read_idx
from example_data.mnist import DIGIT, DigitPool, _line, _shrunk, load_pools, mnist_scene, noise_patterns
from example_data.mnist_files import write_megapixel_mnist

from nested_ats.images import find_level
from pipeline.data.manifest import read_manifest
from pipeline.data.slides import SlideImage
from pipeline.errors import DataError, UsageError
from storage import Slide

MNIST = Path(os.environ.get("NESTED_ATS_DATA", "")) / "mnist"


def idx(values, kind=8):
    values = np.asarray(values, np.uint8)
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape) + values.tobytes()


def packed(data):
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("pack", [bytes, packed])
def test_idx_reads_plain_and_compressed_files(tmp_path, pack):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(pack(idx(values)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), values)


GOOD = idx(np.arange(6))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n", "not an IDX file"),
        (b"\0\0\x08\0", "not an IDX file"),
        (idx(np.arange(6), kind=0x0D), "type 0x0d"),
        (GOOD[:6], "truncated IDX header"),
        (GOOD[:-1], "declares 6 values"),
        (GOOD + b"\0", "declares 6 values"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 4), "more than"),
        (packed(GOOD)[:-6], "damaged gzip"),
        (packed(GOOD)[:-8] + bytes(8), "damaged gzip"),
        (packed(GOOD)[:10] + b"\xff" * 12, "damaged gzip"),
        (packed(GOOD + bytes(10**6)), "declares 6 values"),
    ],
)
def test_malformed_idx_files_are_refused_by_name(tmp_path, data, message):
    (tmp_path / "bad-ubyte").write_bytes(data)
    with pytest.raises(DataError, match=f"bad-ubyte: .*{message}"):
        read_idx(tmp_path / "bad-ubyte")


def test_a_missing_idx_file_is_the_users_mistake(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_idx(tmp_path / "none")


# --- Megapixel MNIST --------------------------------------------------------------------------------------


@pytest.fixture
def pool():
    """Two hundred digits, each a plain square of its own grey, and noise."""
    images = np.broadcast_to(np.arange(1, 201, dtype=np.uint8)[:, None, None], (200, DIGIT, DIGIT))
    return DigitPool(images, (np.arange(200) % 10).astype(np.uint8), noise_patterns(0))


def test_three_digits_share_the_label_and_two_do_not(pool):
    labels = Counter()
    for index in range(60):
        made = mnist_scene(index, seed=0, pool=pool, size=300, noise=5)
        classes = [int(pool.labels[digit.number]) for digit in made.digits]
        assert classes.count(int(made.label)) == 3
        assert len(classes) == 5
        same = [digit.number for digit in made.digits if pool.labels[digit.number] == int(made.label)]
        assert len(set(same)) == 3
        labels[made.label] += 1
    assert len(labels) == 10


@pytest.mark.parametrize("size", [140, 1500])
def test_digits_are_whole_and_do_not_overlap(pool, size):
    made = mnist_scene(1, seed=0, pool=pool, size=size, noise=0)
    canvas = made.render(pool)
    assert (canvas.shape, canvas.dtype) == ((size, size), np.uint8)
    for digit in made.digits:
        box = canvas[digit.y : digit.y + DIGIT, digit.x : digit.x + DIGIT]
        np.testing.assert_array_equal(box, pool.images[digit.number])
    for a, b in combinations(made.digits, 2):
        assert max(abs(a.y - b.y), abs(a.x - b.x)) >= DIGIT


def test_noise_patterns_are_two_lines_from_corners():
    """As in the authors' data maker: a line's slope is tan(u), u up to 72 degrees, and its grey 0.8 to 1 of white."""
    patterns = np.concatenate([noise_patterns(0), noise_patterns(1)])
    assert (patterns.shape, patterns.dtype) == ((100, DIGIT, DIGIT), np.uint8)
    grey = patterns[patterns > 0]
    assert (grey.min(), grey.max()) == (204, 254)
    assert grey.mean() == pytest.approx(229, abs=1)
    lines = patterns > 0
    assert lines[:, 0, 0].all()  # the first line begins here, whatever the second does
    assert 28 <= lines.sum((1, 2)).min() <= lines.sum((1, 2)).max() <= 2 * 56
    for each in lines:  # each line crosses the box: it ends at the last row or column
        assert each[-1].any() or each[:, -1].any()
    # A line mirrored along one axis, 0.33 * 0.67 of them, begins in one of these corners; few others end there.
    assert 10 <= lines[:, 0, -1].sum() <= 36
    assert 10 <= lines[:, -1, 0].sum() <= 36
    assert 3 <= lines[:, -1, -1].sum() <= 25  # and one mirrored along both in this one


def test_a_line_of_noise_has_its_slope_and_no_gaps():
    for slope in (0.0, 0.3, 1.0, 3.07):
        y, x = np.nonzero(_line(slope))
        assert (y[0], x[0]) == (0, 0)
        assert max(y.max(), x.max()) == DIGIT - 1
        assert np.abs(x - slope * y).max() <= 0.5 * (1 + slope)
        assert np.diff(np.unique(y)).max(initial=0) <= 1
        assert np.diff(np.unique(x)).max(initial=0) <= 1


def test_test_images_have_other_noise_than_training_images(pool):
    train, test = load_pools(None, None)
    np.testing.assert_array_equal(train.noise, noise_patterns(0))
    np.testing.assert_array_equal(test.noise, noise_patterns(1))
    same = (train.noise[:, None] > 0) == (test.noise[None] > 0)
    assert not same.all((2, 3)).any()
    scenes = [mnist_scene(index, seed=0, pool=pool) for index in range(40)]
    drawn = Counter(each.number for scene in scenes for each in scene.noise)
    assert set(drawn) == set(range(50))
    assert max(drawn.values()) < 80  # 40 on average


@pytest.mark.parametrize("size", [140, 1500])
def test_noise_replaces_what_it_covers_and_the_rest_is_empty(pool, size):
    made = mnist_scene(2, seed=0, pool=pool, size=size)
    canvas = made.render(pool)
    assert len(made.noise) == 50
    places = np.array([(each.y, each.x) for each in made.noise])
    assert places.min() >= 28
    assert places.max() < size - 28
    expected = np.zeros_like(canvas)
    for digit in made.digits:
        expected[digit.y : digit.y + DIGIT, digit.x : digit.x + DIGIT] = pool.images[digit.number]
    for each in made.noise:  # later ones replace earlier ones, and all of them digits, with zeros too
        expected[each.y : each.y + DIGIT, each.x : each.x + DIGIT] = pool.noise[each.number]
    np.testing.assert_array_equal(canvas, expected)
    if size == 140:  # crowded: much of the digits is gone
        assert sum((canvas == pool.images[digit.number, 0, 0]).sum() for digit in made.digits) < 5 * DIGIT**2


def test_noise_lies_anywhere_but_at_the_border(pool):
    scenes = [mnist_scene(index, seed=1, pool=pool, size=150) for index in range(40)]
    places = np.array([(each.y, each.x) for scene in scenes for each in scene.noise])
    assert places.min(0).tolist() == [28, 28]
    assert places.max(0).tolist() == [121, 121]
    assert np.abs(places.mean(0) - 74.5).max() < 3


def test_mnist_scenes_are_a_function_of_seed_and_index(pool):
    a, b, c = (mnist_scene(4, seed=seed, pool=pool) for seed in (0, 0, 1))
    assert a == b
    assert a != c
    assert a != mnist_scene(5, seed=0, pool=pool)


def test_the_pasted_view_has_every_piece_at_its_scaled_place(pool):
    made = mnist_scene(2, seed=0, pool=pool)
    view = made.render_view(pool)
    assert (view.shape, view.dtype) == ((180, 180), np.uint8)
    empty = np.ones_like(view, bool)
    for piece in (*made.noise, *made.digits):
        y, x = (min(round(start * 0.12), 177) for start in (piece.y, piece.x))
        empty[y : y + 3, x : x + 3] = False
    assert not view[empty].any()
    last = made.noise[-1]
    y, x = round(last.y * 0.12), round(last.x * 0.12)
    np.testing.assert_array_equal(view[y : y + 3, x : x + 3], _shrunk(pool.noise[last.number], 3))
    view = replace(made, noise=()).render_view(pool)
    for digit in made.digits:
        y, x = round(digit.y * 0.12), round(digit.x * 0.12)
        assert (view[y : y + 3, x : x + 3] == pool.images[digit.number, 0, 0]).all()


def test_pieces_of_the_pasted_view_are_means_over_areas(pool):
    ramp = np.broadcast_to(np.arange(DIGIT, dtype=np.uint8) * 9, (200, DIGIT, DIGIT))
    made = mnist_scene(2, seed=0, pool=pool, noise=0)
    digit = made.digits[0]
    view = made.render_view(replace(pool, images=ramp))
    y, x = round(digit.y * 0.12), round(digit.x * 0.12)
    # Thirds of 28 pixels have their middles at 14/3, 14 and 70/3; pixel i has its own at i + 1/2.
    expected = [
        np.mean(np.floor(np.linspace(a, b, 9999, endpoint=False))) * 9
        for a, b in ((0, 28 / 3), (28 / 3, 56 / 3), (56 / 3, 28))
    ]
    np.testing.assert_allclose(view[y : y + 3, x : x + 3], [np.rint(expected)] * 3, atol=1)
    assert view.max() < 9 * (DIGIT - 1)


@pytest.mark.parametrize("changes", [{"size": 139}, {"noise": -1}])
def test_bad_canvases_are_refused(pool, changes):
    with pytest.raises(UsageError):
        mnist_scene(0, seed=0, pool=pool, **changes)


def write_digits(folder, name, count, first=0):
    """Write digits whose first pixels hold their own number, so that each is known again."""
    digits = np.zeros((count, DIGIT, DIGIT), np.uint8)
    digits[:, 14, 14] = 255
    digits[:, 0, 0], digits[:, 0, 1] = np.divmod(np.arange(first, first + count), 256)
    (folder / f"{name}-images").write_bytes(gzip.compress(idx(digits)))
    (folder / f"{name}-labels").write_bytes(idx(np.arange(count) % 10))
    return folder / f"{name}-images", folder / f"{name}-labels"


def numbers_of(pool):
    return set((pool.images[:, 0, 0].astype(int) * 256 + pool.images[:, 0, 1]).tolist())


def test_training_and_test_digits_are_disjoint(tmp_path):
    images, labels = write_digits(tmp_path, "train", 1000)
    train, test = load_pools(images, labels, digit_split=0.7)
    assert numbers_of(train) == set(range(700))
    assert numbers_of(test) == set(range(700, 1000))
    test_images, test_labels = write_digits(tmp_path, "test", 50, first=1000)
    train, test = load_pools(images, labels, test_images=test_images, test_labels=test_labels)
    assert numbers_of(train) == set(range(1000))
    assert numbers_of(test) == set(range(1000, 1050))


def test_bundled_digits_are_enlarged_and_split_disjointly():
    train, test = load_pools(None, None)
    assert train.images.shape == (1438, DIGIT, DIGIT)
    assert test.images.shape == (359, DIGIT, DIGIT)
    assert train.images.max() == 255
    corners = test.images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.median(corners) == 0
    assert np.median(test.images[test.labels == 1][:, 14, 14]) > 150  # a one has its stroke in the middle


def test_bad_digits_are_refused(tmp_path):
    images, labels = write_digits(tmp_path, "some", 100)
    few_images, few_labels = write_digits(tmp_path, "few", 29)
    with pytest.raises(UsageError, match="both their IDX files"):
        load_pools(images, None)
    with pytest.raises(UsageError, match="without training digits"):
        load_pools(None, None, test_images=images, test_labels=labels)
    with pytest.raises(UsageError, match="digit_split"):
        load_pools(images, labels, digit_split=1.0)
    with pytest.raises(DataError, match="expected"):
        load_pools(labels, labels)
    with pytest.raises(DataError, match="not one label"):
        load_pools(images, few_labels)
    with pytest.raises(DataError, match="fewer than 3 digits of class 9"):
        load_pools(images, labels, test_images=few_images, test_labels=few_labels)
    (tmp_path / "ten").write_bytes(idx(np.full(100, 10)))
    with pytest.raises(DataError, match="not one label"):
        load_pools(images, tmp_path / "ten")


def test_write_megapixel_mnist_uses_disjoint_digits_and_resumes(tmp_path):
    images, labels = write_digits(tmp_path, "digits", 500)
    arguments = {"images": images, "labels": labels, "size": 300, "train": 6, "test": 4, "noise": 0, "tile": 64}
    manifest = write_megapixel_mnist(tmp_path / "set", **arguments, workers=2)
    entries = read_manifest(manifest, labelled=True)
    assert [entry.split for entry in entries] == ["train"] * 6 + ["test"] * 4
    for entry in entries:
        canvas = tifffile.imread(entry.path)
        assert (canvas.shape, canvas.dtype) == ((300, 300), np.uint8)
        middles = np.argwhere(canvas == 255)
        middles = [(y, x) for y, x in middles if y >= 14 and x >= 14]
        numbers = [int(canvas[y - 14, x - 14]) * 256 + int(canvas[y - 14, x - 13]) for y, x in middles]
        numbers = [n for n in numbers if n < 500]
        assert Counter(str(n % 10) for n in numbers)[entry.label] >= 3
        expected = range(400) if entry.split == "train" else range(400, 500)
        assert sum(n in expected for n in numbers if n) >= 4
    stamps = [Path(entry.path).stat().st_mtime_ns for entry in entries]
    assert write_megapixel_mnist(tmp_path / "set", **arguments) == manifest
    assert [Path(entry.path).stat().st_mtime_ns for entry in entries] == stamps
    with pytest.raises(UsageError, match=r"other digits"):
        write_megapixel_mnist(tmp_path / "set", **(arguments | {"digit_split": 0.5}))


def test_the_pasted_view_is_the_second_level_of_what_is_written(tmp_path):
    images, labels = write_digits(tmp_path, "digits", 500)
    arguments = {"images": images, "labels": labels, "size": 300, "train": 2, "test": 1, "noise": 3, "view": "pasted"}
    manifest = write_megapixel_mnist(tmp_path / "set", **arguments)
    entries = read_manifest(manifest, labelled=True)
    pools = load_pools(images, labels)
    for index, entry in enumerate(entries):
        pool = pools[index == 2]
        made = mnist_scene(index, seed=0, pool=pool, size=300, noise=3)
        assert made.label == entry.label
        with Slide(entry.path) as slide:
            assert find_level(SlideImage(slide), 300 / 36) == 1
            np.testing.assert_array_equal(slide.read(0, (0, 0, 300, 300))[0], made.render(pool))
            np.testing.assert_array_equal(slide.read(1, (0, 0, 36, 36))[0], made.render_view(pool))
            assert len(slide.levels) == 2
    content = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "images").rglob("*")}
    assert write_megapixel_mnist(tmp_path / "set", **arguments) == manifest
    assert content == {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "images").rglob("*")}
    with pytest.raises(UsageError, match="other view"):
        write_megapixel_mnist(tmp_path / "set", **(arguments | {"view": "pyramid"}))


@pytest.mark.data
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST in NESTED_ATS_DATA")
def test_megapixel_mnist_from_the_real_digits(tmp_path):
    images, labels = MNIST / "t10k-images-idx3-ubyte.gz", MNIST / "t10k-labels-idx1-ubyte.gz"
    train, test = load_pools(images, labels)
    assert (len(train.labels), len(test.labels)) == (8000, 2000)
    assert train.labels[:5].tolist() == [7, 2, 1, 0, 4]
    manifest = write_megapixel_mnist(tmp_path, images=images, labels=labels, train=2, test=1)
    entry = read_manifest(manifest)[2]
    made = mnist_scene(2, seed=0, pool=test)
    assert entry.label == made.label
    np.testing.assert_array_equal(tifffile.imread(entry.path), made.render(test))
