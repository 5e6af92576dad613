"""Slides of the same pixels under several names, which would let a model be tested on what it was trained on.

Two slides are taken for the same where `storage.Slide.identity` is: equal images, pyramids, or slide files. A slide
and its pyramid, or a scan that was stored anew with other tiles, are not found to be the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.data.given import FeatureFile
from pipeline.data.manifest import Entry, is_features
from pipeline.data.slides import open_slide
from pipeline.net import Net
from pipeline.progress import each_slide
from storage import Slide, processors

_NAMED = 10  # groups in a message


def find_identities(entries: Sequence[Entry]) -> dict[str, str]:
    """Open slides and return the identity of the pixels of each by its id; those that have none are missing."""

    def look(entry: Entry) -> str | None:
        with Net(), FeatureFile(entry) if is_features(entry.path) else open_slide(entry.path) as slide:
            return identity_of(slide)
        return None

    found = each_slide("open", entries, look, threads=processors())
    return {entry.slide_id: identity for entry, identity in zip(entries, found, strict=True) if identity}


def identity_of(slide: Slide | FeatureFile) -> str | None:
    """Return the identity of a slide's pixels, or None where it has none or what it is made of cannot be read."""
    with Net():
        return slide.identity
    return None


def copies(entries: Sequence[Entry], identities: Mapping[str, str]) -> list[list[Entry]]:
    """Return the groups of several slides that have the same pixels, in the order of the slides."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.slide_id in identities:
            groups.setdefault(identities[entry.slide_id], []).append(entry)
    return [group for group in groups.values() if len(group) > 1]


def name_copies(entries: Sequence[Entry], identities: Mapping[str, str]) -> list[str]:
    """Say in a line, where there are any, which slides have the same pixels."""
    groups = copies(entries, identities)
    return [f"slides of the same pixels: {_name(groups)}"] if groups else []


def copy_remarks(entries: Sequence[Entry], identities: Mapping[str, str]) -> list[str]:
    """Say in a line each which slides of the same pixels are in several splits, and which have several labels."""
    groups = copies(entries, identities)
    torn = [group for group in groups if len({entry.split for entry in group}) > 1]
    quarrel = [group for group in groups if len({entry.label for entry in group}) > 1]
    found = []
    if torn:
        found.append(
            f"slides of the same pixels are in several splits: {_name(torn, 'split')}; as test slides they count as "
            "seen, and evaluate leaves them out"
        )
    if quarrel:
        found.append(
            f"slides of the same pixels have several labels: {_name(quarrel, 'label')}; leave them out, as "
            "nobody can say which label is right"
        )
    return found


def _name(groups: Sequence[Sequence[Entry]], column: str = "") -> str:
    words = [
        " = ".join(f"{entry.slide_id} ({getattr(entry, column)})" if column else entry.slide_id for entry in group)
        for group in groups[:_NAMED]
    ]
    more = f" and {len(groups) - _NAMED} more" if len(groups) > _NAMED else ""
    return ", ".join(words) + more
