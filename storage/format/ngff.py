"""OME-Zarr metadata of other writers: versions 0.4 (zarr v2) and 0.5 (zarr v3), as far as images go.

Notable: axes may be any of t, c, z, y, x in any order as long as y and x are there; plates, wells and labels are
refused by name; the first image of a ``bioformats2raw`` folder is found below it.

Specifications: https://ngff.openmicroscopy.org/0.4/ and https://ngff.openmicroscopy.org/0.5/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage import typed
from storage.errors import CorruptImageError, NotAPyramidError
from storage.limits import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable

AXES = frozenset("tczyx")
MAX_STEPS = 8  # transformations of a level
_PATH = re.compile(r"[^\x00-\x1f\x7f\\%?#]+")  # what a server could take for another place is no name of a level
MICROMETERS = {  # per unit; a length in any other unit is taken as unknown
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "decimeter": 1e5,
    "meter": 1e6,
    "kilometer": 1e9,
}
IMAGE_LABEL = "image-label"
OTHERS = {  # kinds of groups that are no image, by their key, and what to open instead
    "plate": "a plate; open one of its images, as in {where}/A/1/0",
    "well": "a well of a plate; open one of its images, as in {where}/0",
    IMAGE_LABEL: "a label image; open the image it belongs to",
    "labels": "a group of labels; open the image they belong to",
}


@dataclass(frozen=True)
class Dataset:
    """One level: the path of its array, and by axis the size of a pixel and the place of the first one's centre."""

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True)
class Multiscale:
    """The first multiscale image of a group."""

    zarr_format: int
    name: str
    axes: tuple[str, ...]
    micrometers_yx: tuple[float, float] | None  # per unit of y and x, None where unknown
    labels: tuple[str, ...]  # of the channels; may be empty
    datasets: tuple[Dataset, ...]  # finest first, paths below what was opened


def find_image(read: Callable[[str], bytes], where: str, root: dict[str, Any]) -> Multiscale:
    """Find the image of a group.

    Parameters
    ----------
    read
        Returns the bytes below a key, raising ``FileNotFoundError``.
    where
        The group's location, for messages.
    root
        Its ``zarr.json``, empty if there is none (zarr v2).

    Raises
    ------
    NotAPyramidError
        There is no image here, or one of a kind that is not read.
    CorruptImageError
        The metadata is damaged.
    """
    try:
        zarr_format, attributes = _attributes(read, "", where, root)
        prefix = ""
        if "bioformats2raw.layout" in attributes and "plate" not in attributes:
            prefix = "0/"
            inner = load_json(read, "0/zarr.json", where) if root else {}
            _, attributes = _attributes(read, prefix, where, inner)
        return parse_image(attributes, where, zarr_format, prefix)
    except ValueError as error:
        raise CorruptImageError(f"{where}: damaged metadata ({error})") from error


def _attributes(
    read: Callable[[str], bytes], prefix: str, where: str, root: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Zarr format and OME attributes of a group."""
    if not root:
        try:
            return 2, load_json(read, f"{prefix}.zattrs", where)
        except NotAPyramidError:
            inside = f" in {prefix}" if prefix else ""
            raise NotAPyramidError(
                f"{where}: neither zarr.json nor .zattrs here{inside}; convert the image first"
            ) from None
    if root.get("node_type") == "array":
        raise NotAPyramidError(f"{where}: a single array; open the image it belongs to, usually the folder above")
    attributes = typed.mapping(root.get("attributes"), "attributes")
    return 3, typed.mapping(attributes.get("ome"), "ome")


def load_json(read: Callable[[str], bytes], key: str, where: str) -> dict[str, Any]:
    """Read a metadata file; ``NotAPyramidError`` where it is missing, ``CorruptImageError`` where it is damaged."""
    try:
        return typed.parse_object(read(key))
    except FileNotFoundError:
        raise NotAPyramidError(f"{where}: no {key} here; convert the image first") from None
    except ValueError as error:
        raise CorruptImageError(f"{where}: {key} is damaged ({error})") from error


def parse_image(attributes: dict[str, Any], where: str, zarr_format: int = 3, prefix: str = "") -> Multiscale:
    """Check the OME attributes of an image; the paths of its levels begin with ``prefix``.

    Raises ``NotAPyramidError`` for what is not read, ``ValueError`` for what is damaged.
    """
    for key, what in OTHERS.items():
        # An image may list labels beside its own levels; a plate, well or label is never the image meant.
        if key in attributes and not (key == "labels" and "multiscales" in attributes):
            raise NotAPyramidError(f"{where}: {what.format(where=where)}")
    if not attributes.get("multiscales"):
        raise NotAPyramidError(f"{where}: no OME-Zarr image here (no multiscales); convert the image first")
    multiscale = typed.mapping(typed.items(attributes["multiscales"], "multiscales")[0], "multiscales")
    version = attributes.get("version") if zarr_format == 3 else multiscale.get("version", "0.4")
    version = typed.label(version, "of no version")[:20]
    expected = {2: "0.4", 3: "0.5"}[zarr_format]
    axes = typed.items(multiscale.get("axes", []), "axes")
    if not version.startswith(expected) or not all(isinstance(axis, dict) for axis in axes):
        raise NotAPyramidError(
            f"{where}: OME-Zarr {version} in zarr v{zarr_format}; only 0.4 (zarr v2) and 0.5 (zarr v3) are read"
        )
    names = tuple(typed.text(typed.member(axis, "name"), "the name of an axis") for axis in axes)
    if not set(names) <= AXES or len(set(names)) != len(names) or not {"y", "x"} <= set(names):
        shown = ", ".join(names)[:80] or "missing"
        raise NotAPyramidError(f"{where}: its axes are {shown}; only t, c, z, y, x are read")
    units = {axis["name"]: MICROMETERS.get(typed.label(axis.get("unit"), "")) for axis in axes}
    after = multiscale.get("coordinateTransformations", [])
    datasets = tuple(
        _dataset(typed.mapping(dataset, "a level"), after, prefix, len(names), where)
        for dataset in typed.items(multiscale.get("datasets"), "datasets", most=LIMITS.levels)
    )
    if not datasets:
        raise ValueError("an image without levels")
    omero = typed.mapping(attributes.get("omero"), "omero")
    channels = typed.items(omero.get("channels", []), "channels")
    labels = [channel.get("label") if isinstance(channel, dict) else None for channel in channels]
    return Multiscale(
        zarr_format=zarr_format,
        name=typed.label(multiscale.get("name"), where.rstrip("/").rpartition("/")[2]),
        axes=names,
        micrometers_yx=(units["y"], units["x"]) if units["y"] and units["x"] else None,
        labels=tuple(typed.label(name, str(i)) for i, name in enumerate(labels)),
        datasets=datasets,
    )


def _dataset(dataset: dict[str, Any], after: Any, prefix: str, axes: int, where: str) -> Dataset:
    path = typed.text(typed.member(dataset, "path"), "path")
    if not _PATH.fullmatch(path) or any(part in ("", ".", "..") for part in path.split("/")):
        raise NotAPyramidError(f"{where}: the level path {path!r} leaves the pyramid")
    scale, translation = [1.0] * axes, [0.0] * axes
    own = typed.items(typed.member(dataset, "coordinateTransformations"), "coordinateTransformations", most=MAX_STEPS)
    for step in (*own, *typed.items(after, "coordinateTransformations", most=MAX_STEPS)):
        kind = typed.member(step, "type")
        if kind == "identity":
            continue
        if kind not in ("scale", "translation") or kind not in step:
            raise NotAPyramidError(
                f"{where}: level {path} has a transformation that is not read ({typed.shown(kind)})"
            )
        if kind == "translation":
            moved = typed.numbers(step[kind], kind, axes)
            translation = [a + b for a, b in zip(translation, moved, strict=True)]
            continue
        values = typed.numbers(step[kind], kind, axes, typed.SMALLEST)
        scale = [a * b for a, b in zip(scale, values, strict=True)]
        translation = [a * b for a, b in zip(translation, values, strict=True)]
    typed.numbers(scale, "scale", axes, typed.SMALLEST)  # of all steps together
    typed.numbers(translation, "translation", axes)
    return Dataset(prefix + path, tuple(scale), tuple(translation))
