"""Slides that must not part: those of one case, and whatever else joins them, such as a site or a block."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from pipeline.data.manifest import Entry


def join_groups(entries: Sequence[Entry], *shared: Mapping[str, Hashable]) -> dict[str, str]:
    """Join slides that share a case or something else, also by way of others.

    Parameters
    ----------
    entries
        The slides.
    shared
        Each maps the ids of slides to what they may share with others; what is empty or missing is shared with none.

    Returns
    -------
    The name of each slide's group by its id: the id of the group's first slide in the alphabet.
    """
    parent = {entry.slide_id: entry.slide_id for entry in entries}

    def root(slide_id: str) -> str:
        while parent[slide_id] != slide_id:
            parent[slide_id] = parent[parent[slide_id]]
            slide_id = parent[slide_id]
        return slide_id

    cases = {entry.slide_id: entry.case_id for entry in entries}
    for of_slide in (cases, *shared):
        first: dict[Hashable, str] = {}
        for slide_id in sorted(parent):
            value = of_slide.get(slide_id)
            if value not in (None, ""):
                one, other = sorted((root(first.setdefault(value, slide_id)), root(slide_id)))
                parent[other] = one
    return {slide_id: root(slide_id) for slide_id in parent}


def case_of(entry: Entry) -> str:
    """Name a slide's case; a slide without one is a case of its own, which no other case has the name of."""
    return f"case {entry.case_id}" if entry.case_id else f"slide {entry.slide_id}"
