"""Find the slides that a user means by files, folders, patterns, URLs or a manifest."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.data.manifest import (
    IMAGE_SUFFIXES,
    Entry,
    has_image_suffix,
    is_manifest,
    printable,
    read_manifest,
    slide_name,
    whole_path,
)
from pipeline.data.naming import NAME_BY, keep_names, path_name
from pipeline.errors import UsageError
from storage import list_below
from storage.place.urls import is_remote
from storage.read.slide import dicom_file

_METADATA = ("zarr.json", ".zattrs", ".zgroup")  # OME-Zarr 0.5 has the first, and 0.4 the others


def find_images(
    sources: Sequence[str], *, name_by: str = "name", known: Mapping[str, Entry] | None = None
) -> list[Entry]:
    """Find the images of files, folders with their subfolders, URLs of either, patterns, or one manifest.

    Parameters
    ----------
    sources
        What the command line names; a place that is given twice is one slide.
    name_by
        With "name", slides go by the names of their files, of which several may be alike (`naming.check_alone`), and
        with "path" by `path_name`. A manifest names its slides itself.
    known
        The slides that were converted before, see `pipeline.convert.known_slides`: they keep their names.

    Raises
    ------
    UsageError
        Nothing is there, a folder cannot be read, or a manifest is wrong or not alone.
    """
    if name_by not in NAME_BY:
        raise UsageError(f"--name-by {name_by}: choose {' or '.join(NAME_BY)}")
    if len(sources) == 1 and is_manifest(sources[0]):
        if name_by == "path":
            raise UsageError(f"--name-by path: {sources[0]} names its slides itself; give it a column slide_id")
        return read_manifest(Path(sources[0]))
    entries: dict[str, Entry] = {}
    for source in sources:
        if is_manifest(source):
            raise UsageError(f"{source}: give a manifest alone, without other images")
        found = expand(source, _is_image, has_image_suffix)
        if not found:
            raise UsageError(f"{source}: no image here ({', '.join(IMAGE_SUFFIXES)})")
        for place in found:
            path = whole_path(place)
            name = slide_name(path) if name_by == "name" else path_name(place, source)
            entries.setdefault(path, Entry(slide_id=name, path=path))
    return keep_names(list(entries.values()), known or {})


def expand(source: str, wanted: Callable[[Path], bool], named: Callable[[str], bool]) -> list[str]:
    """Return, sorted, what an argument stands for: what is wanted below a folder or a pattern, else itself.

    Parameters
    ----------
    source
        A path, a pattern with ``*``, ``?``, ``[...]`` or ``**``, or a URL.
    wanted
        It tells whether to take a file or folder.
    named
        It tells whether to take what has this name at a URL.

    Raises
    ------
    UsageError
        A folder cannot be read.
    storage.TransferError
        A URL cannot be listed.
    """
    if is_remote(source):
        return [source] if named(source.rstrip("/")) else list_below(source, named) or [source]
    path = Path(source)
    if path.exists() and (not path.is_dir() or wanted(path)):
        return [source]
    if path.is_dir():
        return _search(path, wanted)
    if not glob.has_magic(source):
        return [source]
    found: set[str] = set()
    for place in glob.glob(source, recursive=True):
        if wanted(Path(place)):
            found.add(place)
        elif Path(place).is_dir():
            found |= set(_search(Path(place), wanted))
    return sorted(place for place in found if found.isdisjoint(map(str, Path(place).parents)))


def _search(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Find what is wanted below a folder; what is found, pyramids and hidden folders are not searched.

    Links to folders are followed, but a folder that several lead to, or that holds a link to itself, is searched
    once, by the path that comes first in the alphabet.
    """
    found: set[Path] = set()
    seen: set[tuple[int, int]] = set()
    try:
        for place, folders, files in os.walk(folder, followlinks=True, onerror=_fail):
            about = os.stat(place)
            if (about.st_dev, about.st_ino) in seen:
                folders.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            here = Path(place)
            found |= {here / name for name in [*files, *folders] if wanted(here / name)}
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and ".zarr" not in name and here / name not in found
            )
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be read: {error.strerror}; mend that, or name what is to be read"
        ) from error
    return sorted(map(str, found))


def _fail(error: OSError) -> NoReturn:
    raise error


def name_slides(places: Sequence[str]) -> list[Entry]:
    """Read one manifest, or name slides at paths and URLs after their files; a place given twice is one slide.

    Raises
    ------
    UsageError
        Two slides would have one name, or the manifest is wrong.
    """
    if len(places) == 1 and is_manifest(places[0]):
        return read_manifest(Path(places[0]))
    slides: dict[str, Entry] = {}
    for place in places:
        path = whole_path(place)
        entry = Entry(slide_id=slide_name(path), path=path)
        other = slides.setdefault(entry.slide_id, entry).path
        if other != path:
            raise UsageError(
                f"{path} and {other} would both be slide {entry.slide_id}; name them apart in a manifest"
            )
    return list(slides.values())


def find_slides(places: Sequence[str]) -> list[Entry]:
    """Find all that can be opened: image files, pyramids and DICOM series, in folders too, or one manifest.

    Slides go by the names of their files, and those of which two are alike by their paths.

    Raises
    ------
    UsageError
        Nothing is there, a folder cannot be read, or a manifest is wrong or not alone.
    """
    if len(places) == 1 and is_manifest(places[0]):
        return read_manifest(Path(places[0]))
    sources: dict[str, str] = {}
    for source in places:
        if is_manifest(source):
            raise UsageError(f"{source}: give a manifest alone, without other slides")
        found = expand(source, _is_slide, lambda name: has_image_suffix(name) or is_pyramid_name(name))
        if not found:
            raise UsageError(f"{source}: no slide here; name one, a folder of them, or a manifest")
        sources |= {whole_path(place): source for place in found}
    names = {path: (slide_name(path), path_name(path, source), printable(path)) for path, source in sources.items()}
    counts = [Counter(each) for each in zip(*names.values(), strict=True)]
    return [
        Entry(slide_id=next(name for name, count in zip(each, counts, strict=True) if count[name] == 1), path=path)
        for path, each in names.items()
    ]


def _is_slide(path: Path) -> bool:
    return _is_image(path) or is_pyramid(path) or bool(dicom_file(str(path)))


def _is_image(path: Path) -> bool:
    """Tell whether to take a file; a link that leads nowhere is taken, so that it is reported and not missed."""
    named = has_image_suffix(path.name) and not path.name.startswith(".")
    return named and (os.path.isfile(path) or not os.path.exists(path))  # a pipe would be waited for


def is_pyramid_name(place: str) -> bool:
    """Tell whether what has this name at a URL should be a pyramid."""
    return place.endswith(".zarr")


def is_pyramid(path: Path) -> bool:
    """Tell whether a folder is or should be a pyramid; an unfinished one is none beside the finished one."""
    if path.name.startswith(".") or not path.is_dir():
        return False
    if path.name.endswith(".partial"):
        return path.with_suffix("").name.endswith(".zarr") and not path.with_suffix("").exists()
    return path.name.endswith(".zarr") or any((path / name).is_file() for name in _METADATA)
