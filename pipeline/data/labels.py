"""Join a table of labels, as clinics keep them, to the slides of a manifest; what does not fit is counted and named.

Nothing is decided silently: each kind of misfit has a rule of `Rules`, whose default refuses wherever a wrong guess
would change a label or lose a slide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.data.manifest import ALIASES, COLUMNS, Entry, difference, near_labels, slide_name
from pipeline.data.tables import read_table, table_name
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pandas import DataFrame

KEYS = ("slide_id", "case_id")
_CHOICES = {
    "missing": ("fail", "drop"),
    "unused": ("ignore", "fail"),
    "conflicts": ("fail", "drop", "first"),
    "alike": ("fail", "keep", "merge"),
}
_EMPTY = {"", "na", "n/a", "#n/a", "nan", "null", "<na>"}  # what programs write for a missing value, in small letters
_NAMED = 5


@dataclass(frozen=True)
class Rules:
    """What becomes of slides and labels that do not fit each other.

    Attributes
    ----------
    missing
        A slide without a label: ``fail``, or ``drop`` the slide.
    unused
        A label without a slide: ``ignore`` it, or ``fail``.
    conflicts
        A slide or case with several labels: ``fail``, ``drop`` its slides, or take the ``first`` label.
    alike
        Labels that differ in case, blanks or one letter alone: ``fail``, ``keep`` them as classes of their own, or
        ``merge`` the rarer into the more frequent one.

    Raises
    ------
    UsageError
        A value is none of these.
    """

    missing: str = "fail"
    unused: str = "ignore"
    conflicts: str = "fail"
    alike: str = "fail"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} {getattr(self, name)}: choose {', '.join(choices)}")


class _Row(NamedTuple):
    label: str
    case_id: str
    extra: dict[str, str]


def join_labels(
    entries: Sequence[Entry],
    table: Path | DataFrame,
    target: str | Sequence[str],
    *,
    join: str | None = None,
    rules: Rules | None = None,
) -> tuple[list[Entry], list[str]]:
    """Give slides the labels of a table, and its other columns.

    What several columns tell, such as time and event, stays in these columns: the slides get no label.

    Parameters
    ----------
    entries
        The slides; labels that they have are replaced.
    table
        A file that `pipeline.data.tables.read_table` reads, or a pandas DataFrame.
    target
        The column that becomes the label; or columns that are taken along, of which no slide may lack all.
    join
        The column by which rows belong to slides: ``slide_id`` or ``case_id``, or, where the table calls it by
        another name, ``case_id=NAME``. By default the first of these two that the table has.
    rules
        What becomes of what does not fit.

    Returns
    -------
    entries, remarks
        The slides that have a label, in their order, and a line for each kind of misfit that was found. A column
        case_id of the table counts where the manifest names no case.

    Raises
    ------
    UsageError
        Columns are missing, no row belongs to a slide, or a rule refuses; slides, cases and labels are named.
    """
    rules, name = rules or Rules(), table_name(table)
    targets = [target] if isinstance(target, str) else list(target)
    key, rows = _read_rows(table, targets, join)
    if key == "slide_id":  # which may be the names of files
        ids = {entry.slide_id for entry in entries}
        rows = [(value if value in ids else slide_name(value), row) for value, row in rows]
    remarks: list[str] = []
    chosen = _settle(rows, key, name, rules, remarks)
    wanted = {entry.slide_id: getattr(entry, key) for entry in entries}
    if not chosen.keys() & set(wanted.values()):
        raise UsageError(
            f"{name}: no {key} of its rows is that of a slide: there {_listed(chosen)}, in the manifest "
            f"{_listed(dict.fromkeys(value for value in wanted.values() if value))}; give another --join"
        )
    bare = [f"{slide_id}" for slide_id, value in wanted.items() if not (value in chosen and chosen[value].label)]
    if bare:
        words = f"{name}: {len(bare)} of {len(entries)} slides have no {' / '.join(targets)}: {_listed(bare)}"
        _decide(rules.missing == "fail", words, "--missing drop leaves them out", remarks)
    used = set(wanted.values())
    unused = [value for value, row in chosen.items() if value not in used and row.label]
    if unused:
        words = f"{name}: {len(unused)} of {len(chosen)} labels have no slide: {_listed(unused)}"
        _decide(rules.unused == "fail", words, "--unused ignore goes on without them", remarks)
    left_out = set(bare)
    pairs = [(entry, chosen[wanted[entry.slide_id]]) for entry in entries if entry.slide_id not in left_out]
    kept = [
        replace(entry, case_id=entry.case_id or row.case_id, extra={**entry.extra, **row.extra})
        for entry, row in pairs
    ]
    if not isinstance(target, str):
        return kept, remarks
    for number, (_, row) in enumerate(pairs):
        extra = {column: cell for column, cell in kept[number].extra.items() if column != target}
        kept[number] = replace(kept[number], label=row.label, extra=extra)
    return _tell_apart(kept, name, rules, remarks), remarks


def choose_target(
    entries: Sequence[Entry], target: str, *, rules: Rules | None = None
) -> tuple[list[Entry], list[str]]:
    """Take a further column of the manifest itself for the label; see `join_labels` for the rest."""
    rules = rules or Rules()
    if not any(target in entry.extra for entry in entries):
        there = ", ".join(dict.fromkeys(name for entry in entries for name in entry.extra)) or "none"
        raise UsageError(f"--target {target}: the manifest has no such column; further columns: {there}")
    remarks: list[str] = []
    bare = [entry.slide_id for entry in entries if _is_empty(entry.extra.get(target, ""))]
    if bare:
        words = f"manifest: {len(bare)} of {len(entries)} slides have no {target}: {_listed(bare)}"
        _decide(rules.missing == "fail", words, "--missing drop leaves them out", remarks)
    left_out = set(bare)
    kept = [replace(entry, label=entry.extra[target]) for entry in entries if entry.slide_id not in left_out]
    return _tell_apart(kept, "manifest", rules, remarks), remarks


def _read_rows(
    table: Path | DataFrame, targets: Sequence[str], join: str | None
) -> tuple[str, list[tuple[str, _Row]]]:
    """Read which column of the manifest counts, and the rows with its value for each."""
    name, (header, columns) = table_name(table), read_table(table)
    names = [column if column in targets else ALIASES.get(column, column) for column in header]
    key, _, called = (join or next((each for each in KEYS if each in names), "")).partition("=")
    if join is None and not key and "path" in names:
        key, called = "slide_id", "path"  # of STAMP's and TRIDENT's tables, which name files
    called = ALIASES.get(called, called) or key
    if key not in KEYS:
        raise UsageError(
            f"--join {join or ''}: choose slide_id, case_id, or case_id=COLUMN; {_columns(name, header)}"
        )
    for column in (called, *targets):
        if names.count(column) != 1:
            found = "several columns" if column in names else "no column"
            raise UsageError(f"{name}: {found} {column}; {_columns(name, header)}")
    cells = dict(zip(names, columns, strict=True))
    others = [each for each in names if each not in COLUMNS and each != called]
    cases = cells.get("case_id", [""] * len(cells[called]))
    answers = zip(*(cells[column] for column in targets), strict=True)
    rows = [
        (value, _Row(_joined(answer), case, {each: cells[each][i] for each in others}))
        for i, (value, answer, case) in enumerate(zip(cells[called], answers, cases, strict=True))
        if value
    ]
    return key, rows


def _columns(name: str, header: Sequence[str]) -> str:
    return f"the columns of {name} are {', '.join(header[:30])}"


def _joined(cells: Sequence[str]) -> str:
    """Join what is told of a slide; empty where nothing is."""
    return "" if all(map(_is_empty, cells)) else " / ".join(cells)


def _is_empty(label: str) -> bool:
    return label.lower() in _EMPTY


def _settle(
    rows: Sequence[tuple[str, _Row]], key: str, name: str, rules: Rules, remarks: list[str]
) -> dict[str, _Row]:
    """Choose one row for each slide or case."""
    several: dict[str, list[_Row]] = {}
    for value, row in rows:
        several.setdefault(value, []).append(row)
    labels = {value: list(dict.fromkeys(row.label for row in found if row.label)) for value, found in several.items()}
    twice = [value for value, found in several.items() if len(found) > 1 and len(labels[value]) < 2]
    if twice:
        remarks.append(
            f"{name}: {len(twice)} {key} have several rows with one label: {_listed(twice)}; the first counts"
        )
    torn = [value for value, found in labels.items() if len(found) > 1]
    if torn:
        words = ", ".join(f"{value} ({' and '.join(labels[value])})" for value in torn[:_NAMED])
        more = ", ..." if len(torn) > _NAMED else ""
        _decide(
            rules.conflicts == "fail",
            f"{name}: {len(torn)} {key} have several labels: {words}{more}",
            "--conflicts first takes the first label, --conflicts drop leaves them out",
            remarks,
        )
    chosen = {value: next((row for row in found if row.label), found[0]) for value, found in several.items()}
    if rules.conflicts == "drop":
        chosen |= {value: chosen[value]._replace(label="") for value in torn}
    return chosen


def _tell_apart(entries: list[Entry], name: str, rules: Rules, remarks: list[str]) -> list[Entry]:
    """See to labels that are probably meant as one."""
    counts = Counter(entry.label for entry in entries)
    pairs = near_labels(counts)
    if not pairs or rules.alike == "keep":
        return entries
    words = ", ".join(
        f"{one!r} ({counts[one]} slides) and {other!r} ({counts[other]}) differ {difference(one, other)}"
        for one, other in pairs[:_NAMED]
    )
    advice = "--alike merge makes the rarer the more frequent one, --alike keep takes them for two classes"
    _decide(rules.alike == "fail", f"{name}: labels that look alike: {words}", advice, remarks)
    renamed = _merged(pairs)
    return [replace(entry, label=renamed.get(entry.label, entry.label)) for entry in entries]


def _merged(pairs: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    """Map each label to the most frequent one that it is like, also by way of others; pairs have the rarer first."""
    renamed: dict[str, str] = {}
    for rarer, other in reversed(pairs):  # the most frequent ones first
        renamed[rarer] = renamed.get(other, other)
    return renamed


def _decide(refuse: bool, words: str, advice: str, remarks: list[str]) -> None:
    if refuse:
        raise UsageError(f"{words}; mend the table, or: {advice}")
    remarks.append(words)


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    shown = list(names)
    return ", ".join(shown[:_NAMED]) + (", ..." if len(shown) > _NAMED else "")
