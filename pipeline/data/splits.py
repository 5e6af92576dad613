"""Split slides into training, validation and test, by case and stratified by label, or as a run has them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.manifest import SPLITS, Entry
from pipeline.errors import UsageError
from pipeline.files import read_inside

SEEN = ("train", "val")  # splits whose slides decide what a model becomes


def assign_splits(
    entries: Sequence[Entry],
    *,
    validation: float,
    test: float,
    seed: int,
    groups: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Give every slide a split, unless the manifest gives them.

    The slides of one case stay together. Cases are shuffled by `seed` and, label by label (a case counts under
    its most frequent label), the first share goes to test, the next to validation and the rest to training.

    Parameters
    ----------
    entries
        The slides, with labels.
    validation, test
        The shares, in [0, 1), of the cases of each label; they are rounded to whole cases.
    seed
        Equal seeds give equal splits, whatever the order of `entries`.
    groups
        By the id of each slide what stands in for its case, as `pipeline.data.blocks.spatial_groups` gives it.
    """
    if any(entry.split for entry in entries):
        return list(entries)
    case_of = {entry.slide_id: _case(entry) for entry in entries} if groups is None else groups
    cases: dict[str, list[str]] = {}
    for entry in entries:
        cases.setdefault(case_of[entry.slide_id], []).append(entry.label)
    # Everything is sorted, so that the order of the manifest's rows does not matter.
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
    return [replace(entry, split=split[case_of[entry.slide_id]]) for entry in entries]


def count_splits(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """Count the labels of each split that there is, in the order of `SPLITS`."""
    counts = {name: Counter(entry.label for entry in entries if entry.split == name) for name in SPLITS}
    return {name: labels for name, labels in counts.items() if labels}


class RunSplits:
    """The splits of a training run, for slides of any manifest.

    A slide is known by its path or, as data may move, by its id, unless the run's pyramid of that id is still where
    it was and has other pixels, as in another cohort. Where this cannot be told the slide counts as known, because
    the accuracy on training slides must not be taken for that on new ones.

    Parameters
    ----------
    rows
        The ``entries`` of the run's run.json.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # A case is known by all of its slides.
        slides = [slide for row in rows for slide in (row.get("slides") or [row])]
        self._by_id = {row["slide_id"]: row for row in (*rows, *slides)}
        self._by_path = {row["path"]: row for row in slides}
        self._by_case = {row["case_id"]: row["split"] for row in rows if row["case_id"]}

    def of(self, entry: Entry) -> str:
        """Return the split of a slide in the run; it is empty where the run does not have the slide."""
        row = self._by_path.get(entry.path)
        if row is None:
            row = self._by_id.get(entry.slide_id)
            if row is None or _differ(row["path"], entry.path):
                return ""
        split: str = row["split"]
        return split

    def seen(self, entry: Entry) -> str:
        """Return ``train`` or ``val`` where the training has seen the slide, or another one of its case."""
        split: str = self.of(entry) or self._by_case.get(entry.case_id, "")
        return split if split in SEEN else ""

    def fill(self, entries: Sequence[Entry]) -> list[Entry]:
        """Give entries the run's splits, unless the manifest gives them."""
        if any(entry.split for entry in entries):
            return list(entries)
        return [replace(entry, split=self.of(entry)) for entry in entries]


def count_seen(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the predicted slides that the training has seen, by its split."""
    return {split: sum(row.get("seen") == split for row in rows) for split in SEEN}


def seen_words(counts: Mapping[str, int], total: int) -> str:
    """Say how many slides the training has seen; the answer is empty where there are none."""
    parts = " and ".join(f"{count} as {name}" for name, count in counts.items() if count)
    return f"{sum(counts.values())} of {total} slides were seen in training ({parts})" if parts else ""


def _differ(path: str, other: str) -> bool:
    """Tell whether these pyramids in folders differ, by their roots, which hold the checksums of all parts."""
    try:
        return read_inside(Path(path), "zarr.json") != read_inside(Path(other), "zarr.json")
    except (OSError, UsageError):
        return False


def _case(entry: Entry) -> str:
    # A prefix keeps a slide without a case apart from a case of the same name.
    return f"case {entry.case_id}" if entry.case_id else f"slide {entry.slide_id}"
