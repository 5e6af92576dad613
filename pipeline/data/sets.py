"""Make data sets offline: number signs in textured scenes, and the writing of any such set.

A set is a folder of images with a ``manifest.csv`` (slide_id, path, label, split). It can be gone on with:
``recipe.json`` is written first and says what the folder holds, each image appears when it is whole, and a second run
with the same arguments makes only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import SPLITS, Entry, write_manifest
from pipeline.data.signs import LABELS, SignScene, sign_scene
from pipeline.errors import UsageError
from pipeline.files import make_folder, write_json
from storage import write_tiff

Progress = Callable[[int, int], None]
"""It is called with how many are done and how many there are."""

# Raise this when the same arguments give other pixels than before, so that no folder mixes the two.
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
        Where the set goes; the folder is new, empty, or has the same set begun earlier.
    count
        The number of scenes.
    size
        The side of a scene in pixels, or its (height, width).
    splits
        The shares of train, val and test, which sum to 1, or three whole numbers that sum to `count`.
    signs, distractors
        How many discs a scene has of each, see `sign_scene`.
    labels
        The labels that the scenes of each split get in turn, so that the classes are balanced.
    tile
        The side of a TIFF tile in pixels.
    compression
        The compression of the TIFFs, see `storage.write_tiff`.
    workers
        How many scenes are written at the same time, in threads.
    progress
        It is called with the number of scenes done and `count`; in a set of one scene, with tiles instead.

    Returns
    -------
    Path
        The manifest.

    Raises
    ------
    UsageError
        An argument is wrong, or the folder holds something else.
    """
    size_yx = (size, size) if isinstance(size, int) else size
    split_of = split_names(count, splits)
    if not labels:
        raise UsageError(f"no labels: give some of {', '.join(LABELS)}")
    recipe = {"set": "signs", "count": count, "size_yx": size_yx, "seed": seed, "splits": splits, "signs": signs}
    recipe |= {"distractors": distractors, "labels": list(labels), "tile": tile, "compression": compression}
    scene_progress = progress if count == 1 else None

    def image(index: int) -> SetImage:
        label = labels[(index - split_of.index(split_of[index])) % len(labels)]
        make = partial(
            sign_scene, index, seed=seed, size_yx=size_yx, signs=signs, distractors=distractors, label=label
        )
        return SetImage(
            f"signs-{index:05d}",
            label,
            split_of[index],
            write=lambda path: write_sign_scene(
                path, make(), tile=tile, compression=compression, progress=scene_progress
            ),
        )

    return write_set(folder, recipe, [image(i) for i in range(count)], workers, None if scene_progress else progress)


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
        It is called with the number of tiles rendered and of all tiles.
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


@dataclass(frozen=True)
class SetImage:
    """One image of a set; `write` writes it to a path, where it appears when it is whole."""

    slide_id: str
    label: str
    split: str
    write: Callable[[Path], None]
    suffix: str = ".tif"


def write_set(
    folder: Path, recipe: dict[str, Any], images: list[SetImage], workers: int, progress: Progress | None
) -> Path:
    """Write the images that are missing, then the manifest, whose path is returned.

    Parameters
    ----------
    folder
        Where the set goes; the folder is new, empty, or has the same set begun earlier.
    recipe
        Whatever decides the pixels, as JSON can hold it; its ``tile`` is the side of a TIFF's tiles.
    images
        The images of the set, in the order of the manifest.
    workers
        How many images are written at the same time, in threads.
    progress
        It is called with the number of images done and of all images.

    Raises
    ------
    UsageError
        An argument is wrong, or the folder holds something else.
    """
    tile = recipe["tile"]
    if workers < 1:
        raise UsageError(f"{workers} workers: give at least 1")
    if tile < 16 or tile % 16:
        raise UsageError(f"tile {tile}: the side of a TIFF tile is a multiple of 16")
    image_folder = _open_set(folder, recipe | {"version": RECIPE_VERSION})
    paths = [image_folder / f"{image.slide_id}{image.suffix}" for image in images]

    def write(path: Path, image: SetImage) -> None:
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


def split_names(count: int, splits: tuple[float, float, float]) -> list[str]:
    """Return the split of each of `count` images: all of train, then val, then test."""
    whole = all(isinstance(share, int) for share in splits)
    if (
        count < 1
        or len(splits) != len(SPLITS)
        or min(splits) < 0
        or abs(sum(splits) - (count if whole else 1)) > 1e-6
    ):
        raise UsageError(
            f"count {count}, splits {splits}: give three shares that sum to 1, or whole numbers that sum to {count}"
        )
    ends = np.rint(np.cumsum(splits) * (1 if whole else count)).astype(int)
    return [SPLITS[np.searchsorted(ends, index, side="right")] for index in range(count)]
