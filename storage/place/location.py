"""Locations that name more than a file: one of its pages, or several files that are the bands of one scene.

``scan.tif#page=2`` is the third page of a TIFF, and ``scan.tif#page=channels`` all of them, as channels of one image.
``B04.tif;B03.tif`` are the bands of one scene, in this order. A local file that is really named so is that file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Literal

from storage.place.urls import is_remote

if TYPE_CHECKING:
    from collections.abc import Sequence

Pages = int | Literal["channels"] | None
"""The number of a page, from 0; all pages, each a channel; or None: the baseline image of the file."""

PAGE, BETWEEN = "#page=", ";"
RESOLUTION = re.compile(r"\d+(\.\d+)?m")  # in the names of bands' files


def files_of(location: str | os.PathLike[str]) -> list[str]:
    """Return the files of a location, without the page: one, or those of the bands in their order."""
    place = os.fspath(location)
    if BETWEEN in place and not _exists(place):
        return [part.strip() for part in place.split(BETWEEN) if part.strip()]
    return [split_page(place)[0]]


def split_page(location: str | os.PathLike[str]) -> tuple[str, Pages]:
    """Return the file of a location and the page that it names; None where it names none."""
    place = os.fspath(location)
    file, mark, page = place.rpartition(PAGE)
    if not mark or not is_page(page) or _exists(place):
        return place, None
    return file, "channels" if page == "channels" else int(page)


def is_page(text: str) -> bool:
    """Whether a text names a page, or all of them as channels."""
    return text == "channels" or (text.isascii() and text.isdecimal() and len(text) <= 9)


def short_names(files: Sequence[str]) -> list[str]:
    """The parts of files' names in which they differ, without resolutions where these are not needed: B04, B8A."""
    stems = _parts(files)
    counts = Counter(part for stem in stems for part in set(stem))
    differing = [[part for part in stem if counts[part] < len(files)] or stem for stem in stems]
    plain = [[part for part in stem if not RESOLUTION.fullmatch(part)] for stem in differing]
    for names in (["_".join(parts) for parts in each] for each in (plain, differing, stems)):
        if len(set(names)) == len(names) and all(names):
            return names
    return [str(number) for number in range(len(files))]


def scene_name(files: Sequence[str]) -> str:
    """What the names of a scene's files have in common, else the name of their folder."""
    stems = _parts(files)
    shared = [part for part in stems[0] if all(part in stem for stem in stems) and not RESOLUTION.fullmatch(part)]
    return "_".join(shared) or files[0].rpartition("/")[0].rpartition("/")[2] or "_".join(short_names(files))


def _parts(files: Sequence[str]) -> list[list[str]]:
    """The parts of each file's name."""
    return [re.split(r"[_\-. ]", file.rpartition("/")[2].rpartition(".")[0]) for file in files]


def _exists(place: str) -> bool:
    return not is_remote(place) and os.path.lexists(place)
