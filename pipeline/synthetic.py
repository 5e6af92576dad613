"""Data sets made offline: number signs in textured scenes, and Megapixel MNIST.

Both are folders of tiled TIFFs (or, for the authors' view of Megapixel MNIST, of OME-Zarr images) with a
``manifest.csv`` (slide_id, path, label, split), and both are resumable: ``recipe.json`` is written first and says
what the folder holds, each image appears when it is whole, and a second run with the same arguments makes only what
is missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.files import make_folder, write_json
from pipeline.manifest import SPLITS, Entry, write_manifest
from pipeline.synthetic_mnist import DigitPool, MnistScene, load_pools, mnist_scene
from pipeline.synthetic_signs import LABELS, SignScene, sign_scene
from storage import write_tiff

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""

# Raise it when the same arguments come to give other pixels, so that no folder mixes the two.
RECIPE_VERSION = 1


def write_signs(
    folder: Path,
    *,
    count: int,
    size: int | tuple[int, int] = 1024,
    seed: int = 0,
    splits: tuple[float, float, float] = (0.8, 0.0, 0.2),
    signs: int = 3,
    distractors: int | None = None,
    labels: Sequence[str] = LABELS,
    tile: int = 512,
    compression: str | None = "deflate",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write a set of sign scenes, the stand-in for the speed-limit data of section 4.4.

    Parameters
    ----------
    folder
        Where the set goes: new, empty, or the same set begun earlier.
    count
        Number of scenes.
    size
        Side of a scene in pixels, or its (height, width).
    splits
        Shares of train, val and test that sum to 1, or three whole numbers that sum to `count`.
    signs, distractors
        Discs to the scene, see `sign_scene`.
    labels
        Labels that the scenes of each split get in turn, so that the classes are balanced.
    tile
        Side of a TIFF tile in pixels.
    compression
        As in `storage.write_tiff`.
    workers
        Scenes written at the same time, in threads.
    progress
        Called with scenes done and `count`; for a set of one scene, with tiles done and their number.

    Returns
    -------
    Path
        The manifest.

    Raises
    ------
    UsageError
        Bad arguments, or the folder holds something else.
    """
    size_yx = (size, size) if isinstance(size, int) else size
    split_of = _split_names(count, splits)
    if not labels:
        raise UsageError(f"no labels: give some of {', '.join(LABELS)}")
    recipe = {"set": "signs", "count": count, "size_yx": size_yx, "seed": seed, "splits": splits, "signs": signs}
    recipe |= {"distractors": distractors, "labels": list(labels), "tile": tile, "compression": compression}
    scene_progress = progress if count == 1 else None

    def image(index: int) -> _Image:
        label = labels[(index - split_of.index(split_of[index])) % len(labels)]
        make = partial(
            sign_scene, index, seed=seed, size_yx=size_yx, signs=signs, distractors=distractors, label=label
        )
        return _Image(
            f"signs-{index:05d}",
            label,
            split_of[index],
            write=lambda path: write_sign_scene(
                path, make(), tile=tile, compression=compression, progress=scene_progress
            ),
        )

    return _write_set(folder, recipe, [image(i) for i in range(count)], workers, None if scene_progress else progress)


def write_sign_scene(
    path: Path,
    scene: SignScene,
    *,
    tile: int = 512,
    compression: str | None = "deflate",
    progress: Progress | None = None,
) -> None:
    """Write one scene, of any size, as a tiled TIFF in the memory of a few tiles.

    Parameters
    ----------
    progress
        Called with tiles rendered and their number.
    """
    height, width = scene.size_yx

    def tiles() -> Iterator[NDArray[np.uint8]]:
        corners = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
        for done, (y, x) in enumerate(corners, start=1):
            part = scene.render(y, x, min(tile, height - y), min(tile, width - x))
            if progress is not None:
                progress(done, len(corners))
            yield part

    write_tiff(path, tiles(), shape=(height, width, 3), dtype="uint8", tile=tile, compression=compression)


def write_megapixel_mnist(
    folder: Path,
    *,
    images: Path | None = None,
    labels: Path | None = None,
    test_images: Path | None = None,
    test_labels: Path | None = None,
    digit_split: float = 0.8,
    size: int = 1500,
    train: int = 5000,
    test: int = 1000,
    noise: int = 50,
    view: Literal["pyramid", "pasted"] = "pyramid",
    seed: int = 0,
    tile: int = 256,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write Megapixel MNIST (section 4.2) as single-channel images; see `pipeline.synthetic_mnist` for the recipe.

    Parameters
    ----------
    folder
        Where the set goes: new, empty, or the same set begun earlier.
    images, labels, test_images, test_labels, digit_split
        The digits, see `load_pools`; those of training and test images are always different ones.
    size
        Side of an image in pixels.
    train, test
        Number of images in the two splits.
    noise
        Noise patches to the image.
    view
        ``pyramid`` writes TIFFs, to be converted. ``pasted`` writes OME-Zarr images, to be used as they are, whose
        second level is the authors' low-resolution view (`MnistScene.render_view`), at downsample size / side.
    tile, workers, progress
        As in `write_signs`.

    Returns
    -------
    Path
        The manifest; labels are "0" to "9".

    Raises
    ------
    UsageError, DataError
        Bad arguments, bad digits (see `load_pools`), or the folder holds something else.
    """
    pools = load_pools(images, labels, test_images=test_images, test_labels=test_labels, digit_split=digit_split)
    split_of = _split_names(train + test, (train, 0, test))
    recipe = {"set": "megapixel-mnist", "size": size, "train": train, "test": test, "noise": noise, "seed": seed}
    recipe |= {"tile": tile, "digits": [_digest(pool.images, pool.labels) for pool in pools]}
    recipe |= {"noise_patterns": [_digest(pool.noise) for pool in pools]}
    recipe |= {"view": view} if view != "pyramid" else {}  # sets made before there was a choice stay what they are
    write, suffix = (_write_mnist, ".tif") if view == "pyramid" else (_write_pasted, ".ome.zarr")

    def image(index: int) -> _Image:
        pool = pools[split_of[index] == "test"]
        scene = mnist_scene(index, seed=seed, pool=pool, size=size, noise=noise)
        name = f"mnist-{index:05d}"
        return _Image(name, scene.label, split_of[index], partial(write, scene=scene, pool=pool, tile=tile), suffix)

    return _write_set(folder, recipe, [image(i) for i in range(train + test)], workers, progress)


def _write_mnist(path: Path, *, scene: MnistScene, pool: DigitPool, tile: int) -> None:
    canvas = scene.render(pool)
    corners = ((y, x) for y in range(0, scene.size, tile) for x in range(0, scene.size, tile))
    tiles = (canvas[y : y + tile, x : x + tile] for y, x in corners)
    write_tiff(path, tiles, shape=canvas.shape, dtype="uint8", tile=tile, compression="deflate")


def _write_pasted(path: Path, *, scene: MnistScene, pool: DigitPool, tile: int) -> None:
    """Write canvas and view as the two levels of an OME-Zarr 0.5 image that appears when it is whole.

    Each level is one chunk whatever the tile: its pixels are mostly zeros, and one read gives all patches.
    """
    del tile
    import zarr

    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    group = zarr.open_group(partial, mode="w", zarr_format=3)
    datasets: list[Any] = []
    for number, pixels in enumerate((scene.render(pool), scene.render_view(pool))):
        array = group.create_array(str(number), shape=pixels.shape, dtype=pixels.dtype, chunks=pixels.shape)
        array[...] = pixels
        scale = scene.size / len(pixels)
        # Centres of pixels: those of a coarse level lie half a coarse pixel less half a fine one further in.
        steps = {"scale": [scale] * 2, "translation": [(scale - 1) / 2] * 2}
        transformations = [{"type": kind, kind: values} for kind, values in steps.items()]
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    axes: Any = [{"name": name, "type": "space"} for name in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    partial.rename(path)


@dataclass(frozen=True)
class _Image:
    slide_id: str
    label: str
    split: str
    write: Callable[[Path], None]
    suffix: str = ".tif"


def _write_set(
    folder: Path, recipe: dict[str, Any], images: list[_Image], workers: int, progress: Progress | None
) -> Path:
    """Write the images that are missing, then the manifest."""
    tile = recipe["tile"]
    if workers < 1:
        raise UsageError(f"{workers} workers: give at least 1")
    if tile < 16 or tile % 16:
        raise UsageError(f"tile {tile}: the side of a TIFF tile is a multiple of 16")
    image_folder = _open_set(folder, recipe | {"version": RECIPE_VERSION})
    paths = [image_folder / f"{image.slide_id}{image.suffix}" for image in images]

    def write(path: Path, image: _Image) -> None:
        if not path.exists():
            image.write(path)

    with ThreadPoolExecutor(workers) as executor:
        for done, _ in enumerate(executor.map(write, paths, images), start=1):
            if progress is not None:
                progress(done, len(images))
    entries = [
        Entry(slide_id=image.slide_id, path=str(path), label=image.label, split=image.split)
        for path, image in zip(paths, images, strict=True)
    ]
    write_manifest(folder / "manifest.csv", entries)
    return folder / "manifest.csv"


def _open_set(folder: Path, recipe: dict[str, Any]) -> Path:
    """Make the folder, or check that it holds the set of this recipe; return the folder of its images."""
    images, path = folder / "images", folder / "recipe.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); choose another folder") from error
        wanted = json.loads(json.dumps(recipe))
        if found != wanted and any(images.glob("[!.]*")):
            there = found if isinstance(found, dict) else {}
            keys = [key for key in {**wanted, **there} if there.get(key) != wanted.get(key)]
            raise UsageError(f"{path}: the folder holds another set (other {', '.join(keys)}); choose another folder")
    elif images.exists():
        raise UsageError(f"{images}: images of unknown origin (no recipe.json); choose another folder")
    make_folder(folder)
    write_json(path, recipe)
    return make_folder(images)


def _split_names(count: int, splits: tuple[float, float, float]) -> list[str]:
    """Return the split of each of `count` images: all of train, then val, then test."""
    whole = all(isinstance(share, int) for share in splits)
    if (
        count < 1
        or len(splits) != len(SPLITS)
        or min(splits) < 0
        or abs(sum(splits) - (count if whole else 1)) > 1e-6
    ):
        raise UsageError(f"count {count}, splits {splits}: three shares that sum to 1, or whole numbers to the count")
    ends = np.rint(np.cumsum(splits) * (1 if whole else count)).astype(int)
    return [SPLITS[np.searchsorted(ends, index, side="right")] for index in range(count)]


def _digest(*arrays: NDArray[np.uint8]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
