"""Sign scenes and Megapixel MNIST: the rendering, the recipes, the files."""

import gzip
import os
import struct
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tifffile

from nested_ats.images import find_level
from pipeline.errors import DataError, UsageError
from pipeline.idx import read_idx
from pipeline.manifest import read_manifest
from pipeline.slides import SlideImage
from pipeline.synthetic import write_megapixel_mnist, write_sign_scene, write_signs
from pipeline.synthetic_mnist import DIGIT, DigitPool, _line, _shrunk, load_pools, mnist_scene, noise_patterns
from pipeline.synthetic_signs import (
    DISTRACTOR_RINGS,
    LABELS,
    MAX_SHIFT,
    RADII,
    SHADES,
    SIGN_RING,
    Disc,
    DiscKind,
    sign_scene,
)
from storage import Slide

MNIST = Path(os.environ.get("NESTED_ATS_DATA", "")) / "mnist"


def scene(index=0, **changes):
    return sign_scene(index, **({"seed": 3, "size_yx": (700, 900), "label": "50", "distractors": 30} | changes))


# --- signs: rendering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(64, 64), (37, 211), (700, 5), (512, 512)])
def test_any_tiling_gives_the_same_pixels(tile):
    whole = scene().render(0, 0, 700, 900)
    tiled = np.zeros_like(whole)
    for y in range(0, 700, tile[0]):
        for x in range(0, 900, tile[1]):
            h, w = min(tile[0], 700 - y), min(tile[1], 900 - x)
            tiled[y : y + h, x : x + w] = scene().render(y, x, h, w)
    np.testing.assert_array_equal(tiled, whole)


def test_tiling_holds_far_from_the_origin_and_across_texture_wraps():
    big = scene(size_yx=(40_000, 40_000), distractors=20_000)
    y, x = big.discs[-1].y - 300, big.discs[-1].x - 300
    whole = big.render(y, x, 600, 2200)
    parts = [big.render(y + i, x + j, 200, 550) for i in (0, 200, 400) for j in (0, 550, 1100, 1650)]
    rows = [np.concatenate(parts[i : i + 4], axis=1) for i in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_scenes_are_a_function_of_seed_and_index():
    assert scene() == scene()
    np.testing.assert_array_equal(scene().render(5, 6, 70, 80), scene().render(5, 6, 70, 80))
    others = [scene(1), scene(seed=4)]
    assert all(other.discs != scene().discs and other.phases_yx != scene().phases_yx for other in others)
    assert all((other.render(0, 0, 9, 9) != scene().render(0, 0, 9, 9)).any() for other in others)


@pytest.mark.parametrize("label", LABELS)
def test_the_label_is_the_number_of_the_red_discs(label):
    made = scene(label=label, signs=4, distractors=25)
    assert {disc.kind.number for disc in made.signs} == ({label} - {"none"})
    assert len(made.signs) == (0 if label == "none" else 4)
    distractors = [disc for disc in made.discs if disc.kind.ring != SIGN_RING]
    assert len(distractors) == 25
    assert {disc.kind.ring for disc in distractors} <= set(DISTRACTOR_RINGS)


def test_distractors_bear_the_labels_numbers_too():
    numbers = Counter(disc.kind.number for disc in scene(size_yx=(4000, 4000), label="none", distractors=400).discs)
    assert all(numbers[number] > 40 for number in LABELS[1:])
    assert len(numbers) == 9


def test_discs_change_the_pixels_within_their_radius_and_nowhere_else():
    made = scene()
    changed = (made.render(0, 0, 700, 900) != replace(made, discs=()).render(0, 0, 700, 900)).any(-1)
    y, x = np.mgrid[:700, :900]
    inside, near = np.zeros_like(changed), np.zeros_like(changed)
    for disc in made.discs:
        distance = np.hypot(y - disc.y, x - disc.x)
        inside |= distance < disc.radius - 1
        near |= distance < disc.radius + 1
    assert not (changed & ~near).any()
    assert changed[inside].mean() > 0.99  # a pixel may have the background's colour by chance


def test_only_signs_have_a_red_ring_and_all_discs_have_a_light_inside_with_black_ink():
    made = scene()
    image = made.render(0, 0, 700, 900).astype(int)
    y, x = np.mgrid[:700, :900]
    for disc in made.discs:
        distance = np.hypot(y - disc.y, x - disc.x)
        red, green, blue = image[(distance > 0.8 * disc.radius) & (distance < 0.95 * disc.radius)].mean(0)
        assert (red > 80 and green < 40 and blue < 50) == (disc.kind.ring == SIGN_RING)
        inside = image[distance < 0.65 * disc.radius].mean(-1)
        assert np.median(inside) > 130
        assert inside.min() < 60


def test_discs_lie_inside_and_do_not_overlap():
    made = scene(signs=20, distractors=130)
    assert len(made.discs) == 150
    for disc in made.discs:
        assert disc.radius in RADII
        assert disc.radius < disc.y < 700 - disc.radius
        assert disc.radius < disc.x < 900 - disc.radius
    for a, b in combinations(made.discs, 2):
        assert np.hypot(a.y - b.y, a.x - b.x) > a.radius + b.radius + 2


def test_default_counts_grow_with_the_area_for_distractors_only():
    small = sign_scene(0, seed=0, size_yx=(1024, 1024), label="80")
    large = sign_scene(0, seed=0, size_yx=(4096, 2048), label="80", signs=24)
    assert (len(small.signs), len(small.discs)) == (3, 11)
    assert (len(large.signs), len(large.discs)) == (24, 24 + 64)


def lone_sign(number, shift=(0, 0), yx=(64, 64), radius=20, shade=1.0):
    disc = Disc(*yx, radius, DiscKind(SIGN_RING, number, shade, shift))
    return replace(scene(size_yx=(128, 128), distractors=0), discs=(disc,))


def test_every_number_has_the_same_ink_and_other_pixels():
    images = {number: lone_sign(number).render(0, 0, 128, 128).astype(float) for number in LABELS[1:]}
    means = [image[44:85, 44:85].mean() for image in images.values()]
    assert max(means) - min(means) < 0.15
    for a, b in combinations(images.values(), 2):
        assert np.abs(a - b).max() > 120


def nearest_mean_accuracy(downsample, count=900):
    """How often the mean image of each number tells the number of an aligned crop of 48 × 48 pixels."""
    rng = np.random.default_rng(0)
    crops, numbers = [], []
    for i in range(count):
        y, x = rng.integers(100, 1000, 2).tolist()
        shift = tuple(rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2).tolist())
        sign = lone_sign(LABELS[1 + i % 3], shift, (y, x), int(rng.choice(RADII)), float(rng.choice(SHADES)))
        move = shift if downsample == 1 else (0, 0)  # at full resolution a reader finds the number itself
        top, left = (int(c) + m - 24 for c, m in zip((y, x), move, strict=True))
        crop = sign.render(top // downsample * downsample, left // downsample * downsample, 48, 48)
        crops.append(crop.reshape(48 // downsample, downsample, 48 // downsample, downsample, 3).mean((1, 3)))
        numbers.append(i % 3)
    crops, numbers = np.array(crops).reshape(count, -1), np.array(numbers)
    train = np.arange(count) < count * 2 // 3
    means = np.array([crops[train & (numbers == n)].mean(0) for n in range(3)])
    guesses = ((crops[~train, None] - means) ** 2).sum(-1).argmin(-1)
    return (guesses == numbers[~train]).mean()


def test_numbers_are_readable_at_full_resolution_and_not_on_coarse_levels():
    assert nearest_mean_accuracy(1) > 0.85
    assert nearest_mean_accuracy(8) < 0.45
    assert nearest_mean_accuracy(16) < 0.45


def test_signs_are_visible_on_coarse_levels():
    made = scene(distractors=0, signs=1, size_yx=(256, 256))
    coarse = made.render(0, 0, 256, 256).reshape(16, 16, 16, 16, 3).mean((1, 3))
    redness = coarse[..., 0] - coarse[..., 1:].mean(-1)
    where = np.unravel_index(redness.argmax(), redness.shape)
    assert np.abs(np.multiply(where, 16) + 8 - (made.signs[0].y, made.signs[0].x)).max() < 30
    assert redness.max() > 4 * np.median(np.abs(redness - np.median(redness))) + np.median(redness)


def test_a_tile_of_a_gigapixel_scene_draws_only_its_discs_in_little_memory():
    big = sign_scene(0, seed=0, size_yx=(32768, 32768), label="70", signs=24)
    big.render(0, 0, 512, 512)  # textures and sprites are made once
    disc = big.discs[5000]
    tracemalloc.start()
    big.render(disc.y - 256, disc.x - 256, 512, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 512 * 512 * 3
    touched = list(big.discs_in(disc.y - 256, disc.x - 256, 512, 512))
    assert disc in touched
    assert len(touched) < 30
    expected = [d for d in big.discs if abs(d.y - disc.y) < 256 and abs(d.x - disc.x) < 256]
    assert set(expected) <= set(touched)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "60"}, "unknown label"),
        ({"signs": 0}, "at least one sign"),
        ({"distractors": -1}, "no less than 0"),
        ({"size_yx": (48, 900)}, "holds no disc"),
        ({"size_yx": (120, 120)}, "do not fit"),
    ],
)
def test_bad_scenes_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        scene(**changes)


# --- signs: files -----------------------------------------------------------------------------------------


def write_small(folder, **changes):
    return write_signs(folder, **({"count": 10, "size": (200, 300), "seed": 1, "tile": 64} | changes))


def test_write_signs_writes_the_scenes_and_a_balanced_manifest(tmp_path):
    seen = []
    manifest = write_small(
        tmp_path / "set", splits=(0.5, 0.1, 0.4), workers=2, progress=lambda done, total: seen.append((done, total))
    )
    entries = read_manifest(manifest, labelled=True)
    assert manifest.read_text().splitlines()[:2] == [
        "slide_id,path,label,split",
        "signs-00000,images/signs-00000.tif,none,train",
    ]
    assert Counter(entry.split for entry in entries) == {"train": 5, "val": 1, "test": 4}
    assert Counter(entry.label for entry in entries if entry.split == "test") == dict.fromkeys(LABELS, 1)
    assert seen == [(i + 1, 10) for i in range(10)]
    for index, entry in enumerate(entries):
        made = sign_scene(index, seed=1, size_yx=(200, 300), label=entry.label)
        np.testing.assert_array_equal(tifffile.imread(entry.path), made.render(0, 0, 200, 300))
        assert len(made.signs) == (0 if entry.label == "none" else 3)


def test_write_signs_takes_explicit_split_counts_and_labels(tmp_path):
    entries = read_manifest(write_small(tmp_path, splits=(7, 1, 2), labels=("70", "none")))
    assert Counter(entry.split for entry in entries) == {"train": 7, "val": 1, "test": 2}
    assert {entry.label for entry in entries} == {"70", "none"}


def test_write_signs_makes_only_what_is_missing(tmp_path):
    manifest = write_small(tmp_path)
    paths = [Path(entry.path) for entry in read_manifest(manifest)]
    content = [path.read_bytes() for path in paths]
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[3].unlink()
    manifest.unlink()
    assert write_small(tmp_path, workers=2) == manifest
    assert [path.read_bytes() for path in paths] == content
    assert [i for i, path in enumerate(paths) if path.stat().st_mtime_ns != stamps[i]] == [3]


def test_a_folder_never_mixes_two_sets(tmp_path):
    write_small(tmp_path)
    with pytest.raises(UsageError, match=r"recipe\.json: the folder holds another set \(other seed, signs\)"):
        write_small(tmp_path, seed=2, signs=4)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(UsageError, match="unknown origin"):
        write_small(tmp_path)


def test_a_damaged_recipe_is_named(tmp_path):
    write_small(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UsageError, match=r"recipe\.json: cannot be read"):
        write_small(tmp_path)


def test_a_failed_start_does_not_block_the_folder(tmp_path):
    with pytest.raises(UsageError, match="do not fit"):
        write_small(tmp_path, distractors=500)
    assert not (tmp_path / "manifest.csv").exists()
    assert write_small(tmp_path).exists()


def test_one_scene_reports_its_tiles(tmp_path):
    seen = []
    write_small(tmp_path, count=1, splits=(0, 0, 1), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 20) for i in range(20)]


def test_write_sign_scene_in_jpeg_is_close_to_the_rendering(tmp_path):
    made = scene()
    write_sign_scene(tmp_path / "scene.tif", made, tile=256, compression="jpeg")
    with tifffile.TiffFile(tmp_path / "scene.tif") as tif:
        page = tif.pages[0]
        assert (page.compression.name, page.tile, page.shape) == ("JPEG", (256, 256), (700, 900, 3))
        difference = page.asarray().astype(int) - made.render(0, 0, 700, 900)
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count 0"),
        ({"splits": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"splits": (5, 0, 4)}, "whole numbers"),
        ({"splits": (1.5, 0.0, -0.5)}, "splits"),
        ({"labels": ()}, "no labels"),
        ({"tile": 100}, "multiple of 16"),
        ({"workers": 0}, "workers"),
    ],
)
def test_bad_sets_are_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        write_small(tmp_path, **changes)


# --- IDX --------------------------------------------------------------------------------------------------


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
