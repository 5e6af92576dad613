"""Label images in a pyramid of this package, as OME-Zarr has them: which pixels are of something, such as tissue.

A label is itself a pyramid, below ``labels`` in that of its image: it has checksums, appears when it is whole, and
all that reads pyramids reads it. It is as coarse as the view that it was found on, and has as many levels as its
image. The image's own metadata stay as they are: a failure must not cost the pyramid, and readers may hold them.

Specification: https://ngff.openmicroscopy.org/0.5/#labels-md.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import typed
from storage.conversion.build import ArraySource
from storage.conversion.converter import write
from storage.conversion.plan import ConvertOptions, plan
from storage.errors import ConversionError, CorruptImageError, NotAPyramidError
from storage.format.ngff import load_json
from storage.format.ome_zarr import is_own, parse_pyramid, pyramid_info
from storage.place.stores import open_store
from storage.place.urls import is_remote

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from storage.format.ome_zarr import PyramidInfo
    from storage.place.stores import Store

GROUP = "labels/zarr.json"
NAMES = ("tissue", "valid")  # of the labels that are replaced with their image (``OWN_KEYS``)


def write_label(
    location: str | os.PathLike[str],
    name: str,
    mask: NDArray[np.bool_],
    *,
    downsample: float,
    made_of: dict[str, Any],
) -> None:
    """Write a mask of an image into the image's pyramid, where an earlier one of that name is replaced.

    Parameters
    ----------
    location
        A pyramid of this package: its folder, or its s3, gs or az URL.
    name
        What the mask is of: ``tissue`` or ``valid``.
    mask
        (H, W), over the whole of the image.
    downsample
        Height and width of a pixel of the mask in pixels of the image's finest level.
    made_of
        What decides the mask, as JSON values, by which `read_label` tells it from others.

    Raises
    ------
    NotAPyramidError, MissingImageError, TransferError
        There is no pyramid of this package.
    CorruptImageError
        Its metadata is damaged.
    ConversionError
        The pyramid cannot be written to, or has a label of that name that is not of this package.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, not {name!r}")
    place = os.fspath(location).rstrip("/")
    with closing(open_store(place)) as store:
        root = load_json(store.get, "zarr.json", place)
        if not is_own(root):
            raise NotAPyramidError(f"{place}: was not written by this package, and gets no labels; convert it first")
        image = pyramid_info(root, store.get, place)
        target = f"{place}/labels/{name}"
        present = _present(store, name, target)
        try:
            if not is_remote(place):
                _make_folder(Path(place, "labels"))
            source = ArraySource(mask.astype(np.uint8)[None])
            info = replace(_plan(source, image, target, downsample), provenance=made_of, is_label=True)
            write(source, info, target, overwrite=present is not None and present.provenance != made_of)
            _list(store, name)
        except OSError as error:
            raise ConversionError(f"{target}: cannot be written ({error.strerror}: {error.filename})") from error


def _plan(source: ArraySource, image: PyramidInfo, target: str, downsample: float) -> PyramidInfo:
    """Describe the pyramid of a label that lies over its image."""
    (y, x), (first_y, first_x) = image.levels[0].scale_yx, image.levels[0].translation_yx
    return plan(
        source,
        ConvertOptions(),
        target,
        scale_yx=(y * downsample, x * downsample),
        unit=image.unit,
        first_yx=(first_y + y * (downsample - 1) / 2, first_x + x * (downsample - 1) / 2),
        count=len(image.levels),
    )


def _present(store: Store, name: str, target: str) -> PyramidInfo | None:
    """What is there of this name: one of ours, or nothing."""
    try:
        return parse_pyramid(lambda key: store.get(f"labels/{name}/{key}"), target)
    except NotAPyramidError as error:
        try:
            store.get(f"labels/{name}/zarr.json")
        except FileNotFoundError:
            return None
        raise ConversionError(f"{target}: is not of this package and stays; rename or remove it") from error
    except CorruptImageError as error:
        raise ConversionError(f"{target}: is damaged; remove it, and run again") from error


def _make_folder(folder: Path) -> None:
    if folder.is_symlink():
        raise ConversionError(f"{folder}: is a link, which is not written to; remove it")
    folder.mkdir(exist_ok=True)


def _list(store: Store, name: str) -> None:
    """Enter a label in the list of all, whose other entries stay."""
    group: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    try:
        group = load_json(store.get, GROUP, store.name)
        attributes = typed.mapping(group.get("attributes"), "attributes")
        ome = typed.mapping(attributes.get("ome"), "ome")
        names = typed.items(ome.get("labels", []), "labels")
    except NotAPyramidError:
        attributes, ome, names = {}, {}, []
    except ValueError as error:
        raise ConversionError(f"{store.name}/{GROUP}: is damaged ({error}); remove the folder labels") from error
    if name not in names:
        ome = {"version": "0.5"} | ome | {"labels": [*names, name]}
        group["attributes"] = attributes | {"ome": ome}
        store.put(GROUP, [json.dumps(group).encode()])
