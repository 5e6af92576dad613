"""The manifest: one row a slide, in CSV or Parquet, checked as a whole before any work.

Columns are slide_id, path and label, and optionally case_id, split, fold and mpp; the column names of TRIDENT
(wsi), Slideflow (slide) and STAMP (PATIENT, FILENAME) are understood. Identifiers are strings: leading zeros
survive. Paths are relative to the manifest's folder.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

from pipeline.errors import UsageError
from pipeline.files import write_atomic

SPLITS = ("train", "val", "test")
_ALIASES = {"wsi": "path", "slide": "slide_id", "PATIENT": "case_id", "FILENAME": "path"}
_TIFFS = (".tif", ".tiff", ".svs", ".btf", ".tf2", ".tf8", ".scn", ".bif", ".ndpi", ".qptiff")
IMAGE_SUFFIXES = (*_TIFFS, ".png", ".jpg", ".jpeg", ".bmp")
_SUFFIXES = (".ome.zarr", ".zarr", *(f".ome{suffix}" for suffix in _TIFFS), *IMAGE_SUFFIXES)  # the longer ones first


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One slide of a manifest."""

    slide_id: str  # unique
    path: str  # of a TIFF or a pyramid, absolute or a URL
    label: str = ""  # class name; empty where unknown
    case_id: str = ""  # patient or site: slides of one case never part between splits; empty: a case of its own
    split: str = ""  # train, val or test; empty where the manifest has none
    fold: str = ""  # cross-validation fold
    mpp: float | None = None  # micrometres per pixel of the finest level, over what the file says


COLUMNS = tuple(field.name for field in fields(Entry))


def read_manifest(path: Path, *, labelled: bool = False) -> list[Entry]:
    """Read and check a manifest.

    Parameters
    ----------
    path
        CSV (UTF-8, with or without a byte-order mark) or Parquet.
    labelled
        Whether every slide needs a label.

    Returns
    -------
    list of Entry
        At least one, in the manifest's order, with absolute paths.

    Raises
    ------
    UsageError
        The file cannot be read, or has problems, which are all named: unknown or missing columns, missing
        values, duplicate ids, unknown splits, a case in two splits, an mpp that is no positive number.
    """
    header, rows = _read_table(path)
    names = [_ALIASES.get(name, name) for name in header]
    problems = [f"unknown column {name}" for name in names if name not in COLUMNS]
    problems += [f"column {name} given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    needed = ["path", *(["label"] if labelled else [])]
    problems += [f"missing column {name}" for name in needed if name not in names]
    if problems:
        problems.append(f"known columns: {', '.join(COLUMNS)}")
        raise _problem(path, problems)
    entries = []
    for number, row in enumerate(rows, start=2):
        entry, wrong = _parse_row(dict(zip(names, row, strict=True)), path.parent, labelled=labelled)
        problems += [f"row {number}: {text}" for text in wrong]
        entries.append(entry)
    problems += _check_all(entries)
    if not entries:
        problems.append("no slides")
    if problems:
        raise _problem(path, problems)
    return entries


def write_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write a CSV manifest, atomically; paths under its folder become relative, empty columns are left out."""
    rows = [asdict(entry) for entry in entries]
    for row in rows:
        if "://" not in row["path"]:
            row["path"] = _relative(Path(row["path"]), path.parent)
    columns = [name for name in COLUMNS if name in ("slide_id", "path") or any(row[name] for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def slide_name(path: str) -> str:
    """Slide id of a file that has none: its name without the image suffix, as a manifest can hold it."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
            break
    # Names are bytes: those that are no UTF-8 are shown as Python shows them, and blanks at the ends are lost in CSV.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").strip()


def has_image_suffix(place: str) -> bool:
    """Whether a path or URL is named like an image file; what a URL asks for (``?...``) is no part of its name."""
    name = place.partition("?")[0] if "://" in place else place
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _relative(path: Path, folder: Path) -> str:
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _problem(path: Path, problems: Sequence[str]) -> UsageError:
    shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
    return UsageError(f"{path}: {shown}")


def _read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give the manifest's path") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise UsageError(f"{path}: empty; the first row names the columns, as in slide_id,path,label")
    uneven = [str(i + 1) for i, row in enumerate(rows) if len(row) != len(rows[0])]
    if uneven:
        raise UsageError(f"{path}: row {', '.join(uneven[:5])}: not {len(rows[0])} fields as in the first row")
    return [name.strip() for name in rows[0]], rows[1:]


def _read_parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise UsageError(f"{path}: not a Parquet file: {error}") from error
    text = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [list(row) for row in zip(*text, strict=True)]


def _parse_row(row: dict[str, str], folder: Path, *, labelled: bool) -> tuple[Entry, list[str]]:
    row = {name: value.strip() for name, value in row.items()}
    wrong = []
    place = row["path"]
    if not place:
        wrong.append("path is empty")
    elif "://" not in place:
        place = os.path.abspath(folder / place)
    if labelled and not row["label"]:
        wrong.append("label is missing")
    if row.get("split", "") not in ("", *SPLITS):
        wrong.append(f"split is {row['split']!r}, not one of {', '.join(SPLITS)}")
    try:
        mpp = float(row["mpp"]) if row.get("mpp") else None
        wrong += [f"mpp {mpp:g} is not between 0 and 1000"] if mpp is not None and not 0 < mpp < 1000 else []
    except ValueError:
        mpp = None
        wrong.append(f"mpp is {row['mpp']!r}, not a number")
    text = {name: row.get(name, "") for name in ("label", "case_id", "split", "fold")}
    entry = Entry(slide_id=row.get("slide_id") or slide_name(row["path"]), path=place, mpp=mpp, **text)
    return entry, wrong


def _check_all(entries: Sequence[Entry]) -> list[str]:
    problems = []
    seen: dict[str, int] = {}
    splits: dict[str, set[str]] = {}
    for entry in entries:
        seen[entry.slide_id] = seen.get(entry.slide_id, 0) + 1
        if entry.case_id and entry.split:
            splits.setdefault(entry.case_id, set()).add(entry.split)
    problems += [f"slide_id {name} occurs {count} times" for name, count in seen.items() if count > 1]
    problems += [f"case {name} is in splits {', '.join(sorted(s))}" for name, s in splits.items() if len(s) > 1]
    some = {bool(entry.split) for entry in entries}
    if len(some) > 1:
        problems.append("split is given for some slides and not for others")
    return problems
