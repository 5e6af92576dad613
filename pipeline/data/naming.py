"""Name the slides of image files, by file or by path, and in every run alike."""

from __future__ import annotations

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from pipeline.data.manifest import Entry, printable, slide_name
from pipeline.errors import UsageError
from storage import made_from
from storage.place.urls import is_remote

NAME_BY = ("name", "path")


def path_name(place: str, source: str) -> str:
    """Name an image by its path below what was given, with its suffix, as in ``site/007.svs``.

    Parameters
    ----------
    place
        The path or URL of the image.
    source
        The folder, pattern or URL that the image was found by; one that was given itself goes by its file's name.
    """
    if is_remote(source):
        below = place.removeprefix(source.rstrip("/") + "/")
        return printable(place.rstrip("/").rsplit("/", 1)[-1] if below == place else below)
    if os.path.isdir(source):
        root = Path(source)
    elif os.path.lexists(source):
        root = Path(source).parent
    else:  # the first parts of a pattern are a folder
        root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(source).parts))
    return printable(Path(os.path.relpath(place, root)).as_posix())


def keep_names(entries: Sequence[Entry], known: Mapping[str, Entry]) -> list[Entry]:
    """Let images that were converted before keep the ids that they have, be it by file or by path.

    Otherwise another way of naming would convert them twice, and one image would be two slides.

    Parameters
    ----------
    entries
        The images, named after their files or paths.
    known
        The slides that were converted before, by id, with the paths of their pyramids.
    """
    shared = Counter(entry.slide_id for entry in entries)
    settled = {entry.slide_id for entry in entries if entry.slide_id in known and shared[entry.slide_id] == 1}
    named: defaultdict[str, set[str]] = defaultdict(set)
    for name in known.keys() - settled:
        named[name.rsplit("/", 1)[-1]].add(name)
        named[slide_name(name)].add(name)
    kept = []
    for entry in entries:
        names = [] if entry.slide_id in settled else sorted(named[slide_name(entry.path)])
        old = next((name for name in names if made_from(known[name].path, entry.path)), entry.slide_id)
        named[slide_name(entry.path)].discard(old)
        kept.append(replace(entry, slide_id=old))
    return kept


def paths_by_id(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Collect the paths of the images of each id."""
    paths: dict[str, list[str]] = {}
    for entry in entries:
        paths.setdefault(entry.slide_id, []).append(entry.path)
    return paths


def check_alone(entry: Entry, paths: Mapping[str, Sequence[str]]) -> None:
    """Refuse an image whose id other images have, too, see `paths_by_id`.

    Raises
    ------
    UsageError
        The message says which they are, and how to tell them apart.
    """
    others = [path for path in paths[entry.slide_id] if path != entry.path]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"{entry.path}: {others[0]}{more} would be slide {entry.slide_id} too; tell them apart by --name-by path "
            "and a folder that holds both, or in a manifest"
        )
