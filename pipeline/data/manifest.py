"""The manifest has one row a slide, in a table of any kind, and is checked as a whole before any work.

Columns are slide_id, path and label, and optionally case_id, split, fold, mpp and mask; the column names of TRIDENT
(wsi), Slideflow (slide) and STAMP (PATIENT, FILENAME) are understood. Other columns are kept as they are, for the
manifests and tables that are made of this one. Identifiers are texts, so leading zeros survive. Paths are relative
to the manifest's folder. A path may be several, ``B04.tif;B03.tif``, the bands of one scene; a column ``page`` (a
number from 0, or ``channels``) names one of a file's pages, and becomes part of the path, ``scan.tif#page=2``.
"""

from __future__ import annotations

import csv
import difflib
import gc
import io
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.data.tables import WORKBOOK, read_table, table_name
from pipeline.errors import UsageError
from pipeline.files import write_atomic
from storage.images.image import RASTER_SUFFIXES, TIFF_SUFFIXES
from storage.place.location import BETWEEN, PAGE, files_of, is_page, scene_name, split_page
from storage.place.urls import is_remote

if TYPE_CHECKING:
    from pandas import DataFrame

SPLITS = ("train", "val", "test")
ALIASES = {"wsi": "path", "slide": "slide_id", "PATIENT": "case_id", "FILENAME": "path"}
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, *RASTER_SUFFIXES, ".mrxs", ".vms", ".svslide")
FEATURES_SUFFIX = ".h5"  # of a file of features that stands for its slide
_SUFFIXES = (
    FEATURES_SUFFIX,
    ".ome.zarr",
    ".zarr",
    *(f".ome{suffix}" for suffix in TIFF_SUFFIXES),
    *IMAGE_SUFFIXES,
)  # longer ones first


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One slide of a manifest."""

    slide_id: str  # unique
    path: str  # the absolute path or the URL of an image or a pyramid; with a page, or several with ; between
    label: str = ""  # the name of the class; empty where unknown
    case_id: str = ""  # a patient or site, whose slides never part between splits; empty: a case of its own
    split: str = ""  # train, val or test; empty where the manifest has none
    fold: str = ""  # the cross-validation fold
    mpp: float | None = None  # micrometres per pixel of the finest level; this overrules what the file says
    mask: str = ""  # path or URL of its mask, GeoJSON or an image: where there is something to see
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)  # further columns, as they were
    slides: tuple[Entry, ...] = ()  # those of a case that is one sample; `path` is then the first one's


COLUMNS = tuple(column.name for column in fields(Entry) if column.name not in ("extra", "slides"))
_COMPARED_LABELS = 300  # more are no classes


def read_manifest(source: Path | DataFrame, *, labelled: bool = False) -> list[Entry]:
    """Read and check a manifest.

    Parameters
    ----------
    source
        A CSV file in UTF-8 or UTF-16 with commas, semicolons or tabs, as spreadsheets write it; a Parquet file; a
        workbook of Excel (extra ``tables``); or a pandas DataFrame, whose paths are relative to the current folder.
    labelled
        Whether every slide needs a label.

    Returns
    -------
    list of Entry
        At least one entry, in the manifest's order, with absolute paths.

    Raises
    ------
    UsageError
        The file cannot be read, or has problems, which are all named: misspelt or missing columns, missing values,
        duplicate ids, unknown splits, a case in two splits, an mpp that is no positive number, NUL characters.
    """
    header, columns = read_table(source)
    path = source if isinstance(source, Path) else Path(table_name(source))
    names = [ALIASES.get(name, name) for name in header]
    problems = [f"unknown column {name} (did you mean {near}?)" for name in names if (near := _misspelt(name, names))]
    problems += [f"column {name} given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"column {i + 1} has values and no name" for i, name in enumerate(names) if not name]
    needed = ["path", *(["label"] if labelled else [])]
    problems += [f"missing column {name}" for name in needed if name not in names]
    if problems:
        problems.append(f"known columns: {', '.join(COLUMNS)}; others are kept as they are")
        raise _problem(path, problems)
    if not columns[0]:
        raise _problem(path, ["no slides"])
    table = dict(zip(names, columns, strict=True))
    problems = _take_pages(table)
    problems += [f"row {row + 2}: {text}" for row, text in sorted(_check_cells(table, labelled=labelled))]
    table["slide_id"] = [slide_id or slide_name(place) for slide_id, place in _rows(table, ("slide_id", "path"))]
    problems += _check_whole(table)
    if problems:
        raise _problem(path, problems)
    return _entries(table, path.parent)


def plain_entries(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Turn entries into plain values that can be sent to workers; `read_entry` turns them back."""
    return [asdict(entry) for entry in entries]


def read_entry(row: Mapping[str, Any]) -> Entry:
    """Make an entry of plain values."""
    return Entry(**{**row, "slides": tuple(read_entry(slide) for slide in row.get("slides", ()))})


def is_manifest(source: str) -> bool:
    """Tell whether an argument of the command line is a manifest rather than a slide."""
    return PurePosixPath(source).suffix.lower() in (".csv", ".parquet", WORKBOOK)


def write_manifest(path: Path, entries: Iterable[Entry]) -> None:
    """Write a CSV manifest atomically; paths below its folder become relative, and empty columns are left out."""
    rows = [asdict(entry) for entry in entries]
    extra = dict.fromkeys(name for row in rows for name in row["extra"])
    for row in rows:
        for name in ("path", "mask"):
            if row[name] and not is_remote(row[name]):
                row[name] = relative_path(row[name], path.parent)
        row |= row.pop("extra")
    columns = [name for name in COLUMNS if name in ("slide_id", "path") or any(row[name] for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *extra], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def remarks(entries: Sequence[Entry], *, classes: bool = True) -> list[str]:
    """Say in one line each what is probably not meant in a manifest to train from; labels may be no classes."""
    found = []
    if any(entry.fold for entry in entries):
        found.append("column fold: ignored without --fold; give --fold 0, or --fold all for a cross-validation")
    counts = Counter(entry.label for entry in entries if classes)
    for name, other in near_labels(counts):
        found.append(
            f"labels {name!r} ({counts[name]} slides) and {other!r} ({counts[other]}) are two classes that differ "
            f"{difference(name, other)}; if they are one, mend the manifest"
        )
    return found


def slide_name(path: str) -> str:
    """Name a slide after its file, without the image suffix, as a manifest can hold it."""
    if len(files := files_of(path)) > 1:
        return printable(scene_name(files))
    file, page = split_page(path)
    name = file.rstrip("/").rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
            break
    return printable(name if page is None else f"{name}_p{page}")


def printable(name: str) -> str:
    """Make the name of a file one that a manifest can hold.

    Names are bytes: those that are not UTF-8 are shown as Python shows them. Blanks at the ends would be lost in CSV.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").strip()


def has_image_suffix(place: str) -> bool:
    """Tell whether a path or URL has the name of an image file, of which the query of a URL (``?...``) is no part."""
    place = files_of(place)[0]
    name = place.partition("?")[0] if is_remote(place) else place
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_features(path: str) -> bool:
    """Tell whether a slide's place is a file of features rather than an image."""
    return path.lower().endswith(FEATURES_SUFFIX)


def is_image_file(place: str) -> bool:
    """Whether a path or URL is an image file rather than a pyramid; a URL is told by its name."""
    return has_image_suffix(place) if is_remote(place) else os.path.isfile(files_of(place)[0])


def whole_path(path: str, folder: str | None = None) -> str:
    """Make the paths of a location absolute, which are relative to an absolute folder, by default the current one."""
    here = folder or os.getcwd()
    own = path if not path or is_remote(path) else os.path.normpath(path if path[0] == "/" else f"{here}/{path}")
    if BETWEEN not in path or os.path.lexists(own):
        return own
    return BETWEEN.join(whole_path(part, here) for part in files_of(path))


def relative_path(path: str, folder: Path) -> str:
    """Make those paths of a location relative that lie below a folder."""
    return BETWEEN.join(
        part if is_remote(part) else _relative(Path(part), folder)
        for part in (files_of(path) if BETWEEN in path else [path])
    )


def _relative(path: Path, folder: Path) -> str:
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _problem(path: Path, problems: Sequence[str]) -> UsageError:
    shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
    return UsageError(f"{path}: {shown}")


def _misspelt(name: str, names: Sequence[str]) -> str | None:
    """Return the known column that an unknown one probably means, if the table does not have it."""
    if name in COLUMNS:
        return None
    near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.7)
    return near[0] if near and near[0] not in names else None


_Table = dict[str, list[str]]  # the cells of each column


def _rows(table: _Table, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Iterate over the rows of these columns; cells of a column that is not there are empty."""
    missing = [""] * len(table["path"])
    return zip(*(table.get(name, missing) for name in names), strict=True)


def _check_cells(table: _Table, *, labelled: bool) -> list[tuple[int, str]]:
    """Find what is wrong with single cells: the number of the row, from 0, and the problem."""
    bad: dict[str, dict[str, str]] = {
        "path": {"": "path is empty"},
        "label": {"": "label is missing"} if labelled else {},
        "split": {
            split: f"split is {split!r}, not one of {', '.join(SPLITS)}"
            for split in set(table.get("split", ())) - {"", *SPLITS}
        },
        "mpp": {mpp: reason for mpp in set(table.get("mpp", ())) if (reason := _wrong_mpp(mpp))},
    }
    for name, column in table.items():
        if "\0" in "".join(column):
            nul = {cell: f"{name} holds a NUL character" for cell in column if "\0" in cell}
            bad[name] = nul | bad.get(name, {})
    return [
        (row, reasons[cell])
        for name, reasons in bad.items()
        if reasons
        for row, cell in enumerate(table.get(name, ()))
        if cell in reasons
    ]


def _take_pages(table: _Table) -> list[str]:
    """Make the column of pages, if there is one, part of the paths; return what is wrong with it."""
    pages = table.pop("page", None)
    if pages is None:
        return []
    wrong = sorted({page for page in pages if page and not is_page(page)})
    table["path"] = [f"{path}{PAGE}{page}" if page else path for path, page in zip(table["path"], pages, strict=True)]
    return [f"page is {page!r}, not the number of one, from 0, or channels" for page in wrong]


def _wrong_mpp(text: str) -> str:
    try:
        mpp = number(text)
    except ValueError:
        return f"mpp is {text!r}, not a number"
    return "" if mpp is None or 0 < mpp < 1000 else f"mpp {mpp:g} is not between 0 and 1000"


def number(text: str) -> float | None:
    """Read a number, which has a decimal comma in tables with semicolons; an empty cell has none."""
    return float(text.replace(",", ".")) if text else None


def _check_whole(table: _Table) -> list[str]:
    """Find rows that do not fit each other."""
    ids = table["slide_id"]
    counts = Counter(ids) if len(set(ids)) < len(ids) else Counter()
    problems = [f"slide_id {name} occurs {count} times" for name, count in counts.items() if count > 1]
    pairs = {(case_id, split) for case_id, split in _rows(table, ("case_id", "split")) if case_id and split}
    torn: dict[str, list[str]] = {name: [] for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    for name, split in sorted(pairs) if torn else []:
        if name in torn:
            torn[name].append(split)
    problems += [f"case {name} is in splits {', '.join(found)}" for name, found in torn.items()]
    if len({bool(split) for split in set(table.get("split", ()))}) > 1:
        problems.append("split is given for some slides and not for others")
    return problems


def _entries(table: _Table, folder: Path) -> list[Entry]:
    """Make the entries column by column, in a quarter of the time that their constructor takes for a million rows."""
    whole, rows = partial(whole_path, folder=os.path.abspath(folder)), len(table["path"])
    texts = {name: table.get(name) or [""] * rows for name in COLUMNS}
    for name in ("label", "split", "fold"):
        one: dict[str, str] = {}  # of each value, for all rows
        texts[name] = [one.setdefault(text, text) for text in texts[name]]
    mpps = {text: number(text) for text in set(texts["mpp"])}
    extra = [name for name in table if name not in COLUMNS]
    values: dict[str, Iterable[Any]] = {
        **texts,
        "path": map(whole, texts["path"]),
        "mask": map(whole, texts["mask"]) if "mask" in table else texts["mask"],
        "mpp": map(mpps.__getitem__, texts["mpp"]),
        "extra": (dict(zip(extra, more, strict=True)) for more in _rows(table, extra)) if extra else repeat({}, rows),
        "slides": repeat((), rows),
    }
    with _without_collector():
        entries = [Entry.__new__(Entry) for _ in range(rows)]
        for name, column in values.items():
            deque(map(getattr(Entry, name).__set__, entries, column), maxlen=0)
    return entries


@contextmanager
def _without_collector() -> Iterator[None]:
    """Hold the garbage collector, which looks through millions of new objects again and again for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def near_labels(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Find pairs of labels that are probably meant as one, the rarer label first."""
    names = sorted(counts, key=lambda name: (counts[name], name))
    if len(names) > _COMPARED_LABELS:
        return []
    pairs = ((name, other) for i, name in enumerate(names) for other in names[i + 1 :])
    return [(name, other) for name, other in pairs if difference(name, other)]


def difference(name: str, other: str) -> str:
    """Say how two labels that look alike differ; the answer is empty where they do not look alike.

    One letter counts in labels of four letters and more, unless it is the last one, as in series (type A, type B).
    Numbers do not count, because they tell grades apart.
    """
    one, two = ("".join(label.casefold().split()) for label in (name, other))
    if one == two:
        return "in case or blanks"
    start = _shared(one, two)
    end = _shared(one[start:][::-1], two[start:][::-1])
    odd = one[start : len(one) - end], two[start : len(two) - end]
    single = max(map(len, odd)) == 1 and "".join(odd).isalpha()
    series = end == 0 and all(odd)
    return "by one letter" if single and not series and min(len(one), len(two)) >= 4 else ""


def _shared(one: str, two: str) -> int:
    """Count the letters that two texts share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
