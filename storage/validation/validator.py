"""``validate``: tell whether a pyramid is what the converter wrote, and if not, what is wrong and where.

A quick validation reads every file and checks it against the pyramid's own table of shards (length and CRC-32). A
full one also decodes every chunk, averages each level and compares it with the next coarser one, and compares level
0 with its source where that is given. It takes the memory of a few shards per thread for images of any size, because
the shards of a level are read by the shard of the next level that they are averaged into.

Pyramids of other writers have no such table. Their metadata is checked, and in a full validation that every chunk
decodes; the result says what could not be checked.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import CorruptImageError, NotAPyramidError, TransferError
from storage.format.ngff import load_json
from storage.format.ome_zarr import is_own
from storage.place.stores import open_store
from storage.place.urls import is_remote
from storage.read.slide import Slide
from storage.threads import processors
from storage.validation.foreign import check_foreign
from storage.validation.problems import Check, Place, Problem
from storage.validation.sharded import check_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

UNFINISHED = "its conversion was interrupted or is running; convert again to go on with it, or delete it"


def validate(
    location: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> list[Problem]:
    """Find everything that is wrong with a pyramid.

    Parameters
    ----------
    location
        A pyramid's folder or URL.
    source
        The path or URL of the image that it was made from, to compare level 0 with; this implies ``full``.
    full
        Whether to decode and compare all levels, and not only check the stored bytes against the table of shards.
    progress
        It is called with (bytes done, bytes in all), counted as decoded pixels, from one thread at a time.
    workers
        The number of threads; if None, that of the processors of this process.

    Returns
    -------
    list of Problem
        The problems by level and place; a sound pyramid has none.

    Raises
    ------
    MissingImageError, NotAPyramidError, TransferError
        The pyramid cannot be looked at.
    StorageError
        The source cannot be opened.
    """
    text = os.fspath(location).rstrip("/")
    check = Check(progress, workers or processors(), full=full or source is not None)
    if _is_unfinished(text):
        check.add(None, None, "unfinished", UNFINISHED)
        return check.problems
    with closing(open_store(text)) as store:
        slide = _open_slide(check, text)
        if slide is not None:
            with slide:
                try:
                    root = load_json(store.get, "zarr.json", text)
                except NotAPyramidError:  # it is zarr v2
                    root = {}
                if is_own(root):
                    check_sharded(check, store, root, source)
                else:
                    check_foreign(check, slide, source)
    return sorted(check.problems, key=_order)


def _order(problem: Problem) -> tuple[int, Place, str]:
    level = -1 if problem.level is None else problem.level
    return (level, problem.place or (-1, -1), problem.message)


def _is_unfinished(location: str) -> bool:
    if is_remote(location):
        return location.endswith(".partial") and _has_objects(location)
    if location.endswith(".partial"):
        return Path(location).is_dir()
    return not Path(location).exists() and Path(f"{location}.partial").is_dir()


def _open_slide(check: Check, location: str) -> Slide | None:
    """Open a pyramid, or note why it cannot be opened."""
    try:
        return Slide(location)
    except CorruptImageError as error:
        check.add(None, None, "metadata", str(error).removeprefix(f"{location}: "))
    except NotAPyramidError:
        if not is_remote(location) or not _has_objects(f"{location}.partial"):
            raise
        check.add(None, None, "unfinished", UNFINISHED)  # the root's metadata is written last
    return None


def _has_objects(url: str) -> bool:
    try:
        return bool(open_store(url).entries())
    except TransferError:
        return False
