"""Sign scenes: the rendering, the recipe, the files."""

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pipeline.data.manifest import read_manifest
from pipeline.data.sets import write_sign_scene, write_signs
from pipeline.data.signs import (
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
from pipeline.errors import UsageError


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
    disc = Disc(*yx, radius, DiscKind(SIGN_RING, number, shade, shift))  # type: ignore[call-arg]
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
        assert (page.compression.name, page.tile, page.shape) == ("JPEG", (256, 256), (700, 900, 3))  # type: ignore[attr-defined]
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
