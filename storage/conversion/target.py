"""Choosing how a target is written: as a folder or as objects of a store."""

from __future__ import annotations

from storage.conversion.folder_target import FolderPartial
from storage.conversion.object_target import ObjectPartial
from storage.place.urls import is_remote


def partial_of(target: str) -> type[FolderPartial | ObjectPartial]:
    """Return the kind of ``Partial`` for a path or URL."""
    return ObjectPartial if is_remote(target) else FolderPartial
