"""Megapixel MNIST as a folder of single-channel images with a manifest; `example_data.mnist` says how they are made."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from example_data.mnist import DigitPool, MnistScene, load_pools, mnist_scene
from pipeline.data.sets import Progress, SetImage, split_names, write_set
from storage import write_tiff


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
    """Write Megapixel MNIST (section 4.2) as single-channel images; see `example_data.mnist` for the recipe.

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
        As in `pipeline.data.sets.write_set`; `tile` is the side of a TIFF's tiles in pixels.

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
    split_of = split_names(train + test, (train, 0, test))
    recipe = {"set": "megapixel-mnist", "size": size, "train": train, "test": test, "noise": noise, "seed": seed}
    recipe |= {"tile": tile, "digits": [_digest(pool.images, pool.labels) for pool in pools]}
    recipe |= {"noise_patterns": [_digest(pool.noise) for pool in pools]}
    recipe |= {"view": view} if view != "pyramid" else {}  # sets made before there was a choice stay what they are
    write, suffix = (_write_mnist, ".tif") if view == "pyramid" else (_write_pasted, ".ome.zarr")

    def image(index: int) -> SetImage:
        pool = pools[split_of[index] == "test"]
        scene = mnist_scene(index, seed=seed, pool=pool, size=size, noise=noise)
        name = f"mnist-{index:05d}"
        return SetImage(name, scene.label, split_of[index], partial(write, scene=scene, pool=pool, tile=tile), suffix)

    return write_set(folder, recipe, [image(i) for i in range(train + test)], workers, progress)


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


def _digest(*arrays: NDArray[np.uint8]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
