"""Folds of a cross-validation: dealt out so that no case parts and every class is spread evenly, and used one by one.

What is joined, a case or all cases of a site, goes to one fold. Where that is single cases, folds differ by at most
one case of each class; sites cannot be dealt out as evenly, and how far apart folds are is told by `fold_gaps`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.data.groups import case_of
from pipeline.data.manifest import Entry
from pipeline.data.splits import assign_splits, most_common
from pipeline.errors import UsageError

ALL = "all"
_FIXED = ("val", "test")  # splits that are the same in every fold's training


@dataclass
class _Bin:
    """What a fold, or a group of slides that stay together, holds."""

    cases: Counter[str] = field(default_factory=Counter)  # by class
    slides: int = 0


def assign_folds(
    entries: Sequence[Entry],
    folds: int,
    *,
    seed: int,
    groups: Mapping[str, str] | None = None,
    strata: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Give every training slide a fold, from 0 on.

    Groups are shuffled by `seed` and, those of the most cases first, each goes to the fold that has the smallest
    share of its classes, of several to that of the fewest slides. A case is of the class of most of its slides.

    Parameters
    ----------
    entries
        The slides; those of split ``test`` or ``val`` get no fold.
    folds
        How many folds there are, >= 2.
    seed
        Equal seeds give equal folds, whatever the order of `entries`.
    groups
        By the id of each slide the group that stays together (`pipeline.data.groups.join_groups`); by default a case.
    strata
        By the id of each slide the class that is to be spread evenly; by default its label.

    Raises
    ------
    UsageError
        There are fewer groups than folds.
    """
    dealt = [entry for entry in entries if entry.split not in _FIXED]
    group_of = groups or {entry.slide_id: case_of(entry) for entry in dealt}
    held = _hold(dealt, group_of, strata or {entry.slide_id: entry.label for entry in dealt})
    if len(held) < folds:
        raise UsageError(f"--folds {folds}: there are {len(held)} groups of slides that stay together; ask for fewer")
    totals = sum((each.cases for each in held.values()), Counter[str]())
    order = sorted(held)
    random.Random(f"{seed}/folds").shuffle(order)  # noqa: S311 - a split is no secret
    order.sort(key=lambda name: (-held[name].cases.total(), -held[name].slides))
    bins = [_Bin() for _ in range(folds)]
    fold_of = {}
    for name in order:
        group = held[name]
        fold = min(range(folds), key=lambda number: _cost(bins[number], group, totals))
        bins[fold].cases += group.cases
        bins[fold].slides += group.slides
        fold_of[name] = str(fold)
    return [
        replace(entry, fold="" if entry.split in _FIXED else fold_of[group_of[entry.slide_id]]) for entry in entries
    ]


def _hold(entries: Sequence[Entry], groups: Mapping[str, str], strata: Mapping[str, str]) -> dict[str, _Bin]:
    """Count what each group holds, the groups by name."""
    cases: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in entries:
        cases[groups[entry.slide_id], case_of(entry)].append(strata[entry.slide_id])
    held: defaultdict[str, _Bin] = defaultdict(_Bin)
    for (group, _), classes in cases.items():
        held[group].cases[most_common(classes)] += 1
        held[group].slides += len(classes)
    return held


def _cost(fold: _Bin, group: _Bin, totals: Counter[str]) -> tuple[float, int, int]:
    """What speaks against a fold for a group: how uneven its classes would be, its slides, and its cases."""
    uneven = sum(
        ((fold.cases[name] + count) ** 2 - fold.cases[name] ** 2) / totals[name] ** 2
        for name, count in group.cases.items()
    )
    return uneven, fold.slides, fold.cases.total()


def fold_names(entries: Sequence[Entry]) -> list[str]:
    """Return the folds that there are, numbers in their order."""
    return sorted({entry.fold for entry in entries if entry.fold}, key=lambda name: (len(name), name))


def pick_folds(names: Sequence[str], wanted: str) -> list[str]:
    """Return the folds that a user means by ``all``, or by names with commas between.

    Raises
    ------
    UsageError
        There are no folds, or not these.
    """
    if len(names) < 2:
        raise UsageError(
            f"--fold {wanted}: neither the manifest nor --splits has a column fold with two folds or more; "
            "nested-ats split --folds 5 writes one"
        )
    chosen = names if wanted == ALL else [name.strip() for name in wanted.split(",")]
    if unknown := [name for name in chosen if name not in names]:
        raise UsageError(f"--fold {wanted}: no fold {', '.join(unknown)}; there are {', '.join(names)}, or {ALL}")
    return list(dict.fromkeys(chosen))


def take_fold(
    entries: Sequence[Entry],
    fold: str,
    *,
    validation: float,
    seed: int,
    strata: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Give slides the splits of one fold's training.

    With a held-out test (slides of split ``test``) that stays the test, and `fold` is for validation. Without one
    `fold` is the test, and the share `validation` of the cases of the other folds is drawn for validation
    (`assign_splits`), unless the manifest has slides of split ``val``.

    Parameters
    ----------
    entries
        The slides; those without a fold have a split, and keep it in every fold's training.
    fold
        The name of the fold.
    validation
        The share of cases of each label, in [0, 1), to validate on.
    seed
        Decides which cases these are.
    strata
        By the id of each slide what stands in for its label.

    Raises
    ------
    UsageError
        Slides have neither fold nor split, or a case is in several folds.
    """
    _check_folds(entries)
    held_out = any(entry.split == "test" for entry in entries)
    inner = "val" if held_out else "test"
    rest = [entry for entry in entries if entry.fold != fold and entry.split not in _FIXED]
    if not held_out and not any(entry.split == "val" for entry in entries):
        bare = [replace(entry, split="") for entry in rest]
        drawn = assign_splits(bare, validation=validation, test=0.0, seed=seed, strata=strata)
    else:
        drawn = [replace(entry, split="train") for entry in rest]
    split_of = {entry.slide_id: entry.split for entry in drawn}
    taken = [
        entry if entry.split in _FIXED else replace(entry, split=split_of.get(entry.slide_id, inner))
        for entry in entries
    ]
    return [replace(entry, fold="") for entry in taken]  # from here on, the split alone counts


def _check_folds(entries: Sequence[Entry]) -> None:
    if without := [entry.slide_id for entry in entries if not entry.fold and not entry.split]:
        named = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        raise UsageError(f"{len(without)} slides have neither fold nor split: {named}; give each one of them")
    folds: defaultdict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.case_id and entry.fold:
            folds[entry.case_id].add(entry.fold)
    torn = [f"{case} ({', '.join(sorted(found))})" for case, found in sorted(folds.items()) if len(found) > 1]
    if torn:
        raise UsageError(f"cases in several folds: {', '.join(torn[:5])}; nested-ats split keeps them together")


def count_folds(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """Count the labels of the slides of each fold that there is."""
    return {name: Counter(entry.label for entry in entries if entry.fold == name) for name in fold_names(entries)}


def fold_gaps(entries: Sequence[Entry]) -> dict[str, int]:
    """Say for each class by how many cases the folds differ at most."""
    held = _hold(
        [entry for entry in entries if entry.fold],
        {entry.slide_id: entry.fold for entry in entries},
        {entry.slide_id: entry.label for entry in entries},
    )
    classes = sorted({name for each in held.values() for name in each.cases})
    counts = {name: [each.cases[name] for each in held.values()] for name in classes}
    return {name: max(each) - min(each) for name, each in counts.items()}
