"""Tables that say which slide or case is in which split or fold: ours, CLAM's and STAMP's.

ours    a table with a column slide_id or case_id, and split, fold or both, such as what ``nested-ats split`` writes
CLAM    ``splits_0.csv``: columns train, val and test of slide ids; a folder of them has one for each fold
STAMP   ``splits.json``: patients to train and to test on, for each fold
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.data.folds import fold_names, pick_folds, take_fold
from pipeline.data.manifest import ALIASES, SPLITS, Entry, slide_name
from pipeline.data.tables import read_table
from pipeline.data.targets import check_table, strata
from pipeline.errors import UsageError
from pipeline.files import read_inside

_NAMED = 5
Place = tuple[str, str]  # split and fold; either may be empty


class _Stamp(BaseModel):
    """A ``splits.json``."""

    class Split(BaseModel):
        """One fold."""

        train_patients: list[str]
        test_patients: list[str]

    splits: list[Split]


def read_splits(entries: Sequence[Entry], path: Path, *, drop: bool = False) -> list[Entry]:
    """Give slides the splits and folds of a table; those that they have are replaced.

    Parameters
    ----------
    entries
        The slides.
    path
        A table of ours, of CLAM or of STAMP.
    drop
        Leave out slides that the table does not have, instead of refusing.

    Raises
    ------
    UsageError
        The table is none of these, puts a slide into two splits, or lacks every slide or, without `drop`, any.
    """
    key, places = _read(path)
    found = [places.get(getattr(entry, key)) for entry in entries]
    without = [entry.slide_id for entry, place in zip(entries, found, strict=True) if place is None]
    if len(without) == len(entries) or (without and not drop):
        named = ", ".join(without[:_NAMED]) + (", ..." if len(without) > _NAMED else "")
        of_table = ", ".join(list(places)[:_NAMED])
        raise UsageError(
            f"{path}: {len(without)} of {len(entries)} slides are not in it: {named} (it has {key} {of_table}, ...); "
            "--missing drop leaves them out"
        )
    return [
        replace(entry, split=place[0], fold=place[1])
        for entry, place in zip(entries, found, strict=True)
        if place is not None
    ]


def fold_entries(
    entries: Sequence[Entry], splits: Path | None, wanted: str | None, config: Config, *, drop: bool = False
) -> dict[str, list[Entry]]:
    """Return the slides, with their splits, of each training that a user asks for, by fold.

    Parameters
    ----------
    entries
        The slides of the manifest.
    splits
        A table of splits or folds (`read_splits`), or a folder of CLAM's; None takes what the manifest has.
    wanted
        One fold, several with commas between, or ``all``; None is one training by the splits, named ``""``.
    config
        Its target, seed and ``data.validation`` decide which slides validate (`pipeline.data.folds.take_fold`).
    drop
        See `read_splits`.

    Raises
    ------
    UsageError
        There are no such folds, a table is wrong, or slides lack what the target wants to know.
    """
    if splits is not None and splits.is_dir():
        files = split_files(splits)
        if wanted is None:
            raise UsageError(f"{splits}: a folder has a table for each fold; give --fold 0, --fold all, or one table")
        return {fold: read_splits(entries, files[fold], drop=drop) for fold in pick_folds(list(files), wanted)}
    placed = list(entries) if splits is None else read_splits(entries, splits, drop=drop)
    if wanted is None:
        return {"": placed}
    chosen = pick_folds(fold_names(placed), wanted)
    check_table(config.target, placed)
    names = {entry.slide_id: name for entry, name in zip(placed, strata(config.target, placed), strict=True)}
    share, seed = config.data.validation, config.seed
    return {fold: take_fold(placed, fold, validation=share, seed=seed, strata=names) for fold in chosen}


def _read(path: Path) -> tuple[str, Mapping[str, Place]]:
    """Read which column of a manifest names what the table has, and the place of each."""
    if path.suffix.lower() == ".json":
        return "case_id", _read_stamp(path)
    header, columns = read_table(path)
    table = {ALIASES.get(name, name): column for name, column in zip(header, columns, strict=True)}
    if {"train", "test"} <= table.keys() and "split" not in table:
        return "slide_id", _read_clam(path, table)
    key = next((name for name in ("slide_id", "case_id") if name in table), None)
    if key is None and "path" in table:
        key, table["slide_id"] = "slide_id", [slide_name(cell) for cell in table["path"]]
    if key is None or not {"split", "fold"} & table.keys():
        raise UsageError(
            f"{path}: not a table of splits (columns {', '.join(header[:20])}): it needs slide_id or case_id, and "
            "split or fold; or columns train, val and test of slide ids, as CLAM has them"
        )
    empty = [""] * len(table[key])
    rows = zip(table[key], table.get("split", empty), table.get("fold", empty), strict=True)
    return key, _unique(path, [(name, (split, fold)) for name, split, fold in rows])


def _read_clam(path: Path, table: Mapping[str, Sequence[str]]) -> Mapping[str, Place]:
    """Read columns of slide ids, or, with the ids before them, of True and False."""
    splits = [name for name in SPLITS if name in table]
    if all(cell in ("True", "False") for name in splits for cell in table[name]):
        ids = next((column for name, column in table.items() if name not in splits), [])
        marks = [(name, split, mark) for split in splits for name, mark in zip(ids, table[split], strict=True)]
        return _unique(path, [(name, (split, "")) for name, split, mark in marks if mark == "True"])
    return _unique(path, [(slide_name(cell), (split, "")) for split in splits for cell in table[split] if cell])


def _read_stamp(path: Path) -> Mapping[str, Place]:
    """Read patients, whose fold is the one that tests on them."""
    try:
        raw = json.loads(read_inside(path.parent, path.name))
        splits = _Stamp.model_validate(raw).splits
    except FileNotFoundError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give the table's path") from error
    except (ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not STAMP's splits.json ({reason})") from error
    tested = [(patient, ("", str(fold))) for fold, each in enumerate(splits) for patient in each.test_patients]
    never = {patient for each in splits for patient in each.train_patients} - {patient for patient, _ in tested}
    return _unique(path, tested + [(patient, ("train", "")) for patient in sorted(never)])


def _unique(path: Path, rows: Sequence[tuple[str, Place]]) -> Mapping[str, Place]:
    places = set(rows)
    torn = [name for name, count in Counter(name for name, _ in places).items() if count > 1]
    if torn:
        words = ", ".join(
            f"{name} ({' and '.join(sorted(' '.join(place).strip() for other, place in places if other == name))})"
            for name in sorted(torn)[:_NAMED]
        )
        raise UsageError(f"{path}: {len(torn)} are in several splits or folds: {words}")
    if unknown := sorted({split for _, (split, _) in rows} - {"", *SPLITS}):
        raise UsageError(f"{path}: split {', '.join(unknown)}: not one of {', '.join(SPLITS)}")
    return dict(rows)


def split_files(folder: Path) -> dict[str, Path]:
    """Return the tables of the folds in a folder of CLAM's, ``splits_0.csv`` and so on, by fold."""
    found = {
        match[1]: path for path in folder.glob("splits_*.csv") if (match := re.fullmatch(r"splits_(\d+)", path.stem))
    }
    if not found:
        raise UsageError(f"{folder}: no splits_0.csv, splits_1.csv, ... here; give a table, or a folder of CLAM's")
    return {fold: found[fold] for fold in sorted(found, key=int)}
