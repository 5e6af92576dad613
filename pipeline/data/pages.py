"""Slides of the pages of files that have several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.data.manifest import Entry
from pipeline.net import Net
from storage.images.opening import image_pages
from storage.place.location import PAGE, files_of


def page_slides(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Make a slide of each page of files that have several, ``SLIDE_p0`` and so on; others stay as they are.

    So do files that cannot be read, which is found out where they are opened.
    """
    for entry in entries:
        pages = [0]
        if files_of(entry.path) == [entry.path]:  # neither a page nor several files
            with Net():
                pages = image_pages(entry.path)
        if len(pages) == 1:
            yield entry
            continue
        for page in pages:
            yield replace(entry, slide_id=f"{entry.slide_id}_p{page}", path=f"{entry.path}{PAGE}{page}")
