"""Telling whether a target holds nothing yet, the very pyramid that is to be made, or something else."""

from __future__ import annotations

import contextlib
import os

import numpy as np

from storage import typed
from storage.conversion.target import partial_of
from storage.errors import ConversionError, StorageError, TransferError
from storage.format.ome_zarr import PyramidInfo, parse_pyramid
from storage.place.files import fingerprint
from storage.place.location import split_page
from storage.place.stores import open_store
from storage.place.urls import is_remote


def made_from(target: str | os.PathLike[str], source: str | os.PathLike[str]) -> bool:
    """Whether a pyramid was made from this very file, as far as its fingerprint tells."""
    try:
        made, page = _read(os.fspath(target)).provenance, split_page(source)[1]
        own = typed.mapping(made.get("options"), "options").get("pages")
        return made.get("source") == fingerprint(source) and page in (None, own)
    except (StorageError, OSError, ValueError):
        return False


def already_there(target: str, info: PyramidInfo, *, overwrite: bool) -> PyramidInfo | None:
    """Return the target's description if it is the pyramid asked for; None if it is to be made.

    Raises
    ------
    ConversionError
        The target holds something else, or is damaged, and is not to be overwritten.
    """
    if not partial_of(target).is_occupied(target):
        return None
    if overwrite:
        partial_of(target).check_replaceable(target)
        return None
    try:
        present = _read(target)
    except TransferError:
        raise
    except (StorageError, OSError):
        raise ConversionError(
            f"{target}: exists and is not a sound pyramid; remove it or ask to overwrite it"
        ) from None
    if not info.provenance or present.provenance != info.provenance:
        differing = " and ".join(
            sorted(key for key in info.provenance if present.provenance.get(key) != info.provenance[key])
        )
        raise ConversionError(
            f"{target}: holds a pyramid of another source or other options (its {differing or 'origin'} differs); "
            "remove it or ask to overwrite it"
        )
    if not is_remote(target):
        _check_lengths(target, present)
    return present


def _read(target: str) -> PyramidInfo:
    with contextlib.closing(open_store(target)) as store:
        return parse_pyramid(store.get, store.name)


def _check_lengths(target: str, present: PyramidInfo) -> None:
    """Check that the shards of a local pyramid are there with their lengths."""
    for level in present.levels:
        for place in np.ndindex(level.shard_grid):
            path = os.path.join(target, level.shard_key(*place))
            try:
                length = os.path.getsize(path)
            except FileNotFoundError:
                length = 0
            except OSError as error:
                raise ConversionError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
            if length != level.table.length[place]:
                raise ConversionError(f"{target}: is damaged, {level.shard_key(*place)}; ask to overwrite it")
