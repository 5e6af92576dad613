"""Splits of slides into training, validation and test, by case and stratified by label."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pipeline.manifest import Entry


def assign_splits(entries: Sequence[Entry], *, validation: float, test: float, seed: int) -> list[Entry]:
    """Give every slide a split, unless the manifest gives them.

    The slides of one case stay together. Cases are shuffled by `seed` and, label by label (a case counts under
    its most frequent label), the first share goes to test, the next to validation and the rest to training.

    Parameters
    ----------
    entries
        Slides, with labels.
    validation, test
        Shares of the cases, in [0, 1), of each label, rounded to whole cases.
    seed
        Equal seeds give equal splits, whatever the order of `entries`.
    """
    if any(entry.split for entry in entries):
        return list(entries)
    cases: dict[str, list[str]] = {}
    for entry in entries:
        cases.setdefault(_case(entry), []).append(entry.label)
    # Sorted throughout, so that the order of the manifest's rows does not matter.
    by_label: dict[str, list[str]] = {}
    for case in sorted(cases):
        by_label.setdefault(Counter(sorted(cases[case])).most_common(1)[0][0], []).append(case)
    split = {}
    for label in sorted(by_label):
        members = by_label[label]
        random.Random(f"{seed}/{label}").shuffle(members)  # noqa: S311 - a split is no secret
        tests, validations = round(test * len(members)), round(validation * len(members))
        for i, case in enumerate(members):
            split[case] = "test" if i < tests else "val" if i < tests + validations else "train"
    return [replace(entry, split=split[_case(entry)]) for entry in entries]


def _case(entry: Entry) -> str:
    # A prefix keeps a slide without a case apart from a case of the same name.
    return f"case {entry.case_id}" if entry.case_id else f"slide {entry.slide_id}"
