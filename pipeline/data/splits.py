"""Split slides into training, validation and test, by case and stratified by label, or as a run has them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.groups import case_of
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
    strata: Mapping[str, str] | None = None,
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
        By the id of each slide what stands in for its case, as `pipeline.data.groups.join_groups` gives it.
    strata
        By the id of each slide what stands in for its label.
    """
    if any(entry.split for entry in entries):
        return list(entries)
    groups = groups or {entry.slide_id: case_of(entry) for entry in entries}
    strata = strata or {entry.slide_id: entry.label for entry in entries}
    cases: dict[str, list[str]] = {}
    for entry in entries:
        cases.setdefault(groups[entry.slide_id], []).append(strata[entry.slide_id])
    # Everything is sorted, so that the order of the manifest's rows does not matter.
    by_label: dict[str, list[str]] = {}
    for case in sorted(cases):
        by_label.setdefault(most_common(cases[case]), []).append(case)
    split = {}
    for label in sorted(by_label):
        members = by_label[label]
        random.Random(f"{seed}/{label}").shuffle(members)  # noqa: S311 - a split is no secret
        tests, validations = round(test * len(members)), round(validation * len(members))
        for i, case in enumerate(members):
            split[case] = "test" if i < tests else "val" if i < tests + validations else "train"
    return [replace(entry, split=split[groups[entry.slide_id]]) for entry in entries]


def most_common(labels: Iterable[str]) -> str:
    """Return the most frequent label, of several the first in the alphabet."""
    return Counter(sorted(labels)).most_common(1)[0][0]


def count_splits(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """Count the labels of each split that there is, in the order of `SPLITS`."""
    counts = {name: Counter(entry.label for entry in entries if entry.split == name) for name in SPLITS}
    return {name: labels for name, labels in counts.items() if labels}


def own_split(entry: Entry) -> str:
    """Return the split that a manifest gives a slide for every training; empty where its fold decides."""
    return "" if entry.fold else entry.split


class RunSplits:
    """The splits of a training run, for slides of any manifest.

    A slide is known by its path or, as data may move, by its id, unless the run's pyramid of that id is still where
    it was and has other pixels, as in another cohort. Where this cannot be told the slide counts as known, because
    the accuracy on training slides must not be taken for that on new ones. Under whatever name, it is known by its
    pixels, too (`pipeline.data.duplicates`).

    Parameters
    ----------
    rows
        The ``entries`` of the run's run.json.
    identities
        Its ``identities``: those of the pixels, by the ids of the slides; runs of before have none.
    earlier
        The splits of the training whose model the run began with, if it did: what that has seen counts, too.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        identities: Mapping[str, str] | None = None,
        earlier: RunSplits | None = None,
    ) -> None:
        self._earlier = earlier
        # A case is known by all of its slides.
        slides = [slide for row in rows for slide in (row.get("slides") or [row])]
        self._by_id: dict[str, Mapping[str, Any]] = {row["slide_id"]: row for row in (*rows, *slides)}
        self._by_path: dict[str, Mapping[str, Any]] = {row["path"]: row for row in slides}
        self._by_case = {row["case_id"]: row["split"] for row in rows if row["case_id"]}
        self._identities = identities or {}
        self._by_pixels: dict[str, set[str]] = {}
        for slide_id, identity in self._identities.items():
            if slide_id in self._by_id:
                self._by_pixels.setdefault(identity, set()).add(self._by_id[slide_id]["split"])

    @classmethod
    def of_run(cls, about: Mapping[str, Any]) -> RunSplits:
        """Take them from what a run.json says."""
        init = about.get("init")  # runs of before have none
        return cls(about["entries"], about["identities"], cls(init["entries"], init["identities"]) if init else None)

    def row(self, entry: Entry) -> Mapping[str, Any] | None:
        """Return the run's row of a slide, or None where the run does not have the slide."""
        row = self._by_path.get(entry.path)
        if row is None:
            row = self._by_id.get(entry.slide_id)
            if row is None or _differ(row["path"], entry.path):
                return None
        return row

    def pixels(self, entry: Entry) -> set[str]:
        """Return the identities of the pixels of a slide, or of all slides of a case, that the run knows."""
        rows = [self.row(slide) for slide in entry.slides or [entry]]
        return {known for row in rows if row and (known := self._identities.get(row["slide_id"]))}

    def of(self, entry: Entry) -> str:
        """Return the split of a slide in the run; it is empty where the run does not have the slide."""
        row = self.row(entry)
        return str(row["split"]) if row else ""

    def seen(self, entry: Entry, pixels: Iterable[str] = ()) -> str:
        """Return ``train`` or ``val`` where the training has seen the slide, one of its pixels, or one of its case.

        Parameters
        ----------
        entry
            The slide.
        pixels
            The identities of its pixels, those that are known.
        """
        row = self.row(entry)
        found = {str(row["split"]) if row else self._by_case.get(entry.case_id, "")}
        for identity in self.pixels(entry).union(pixels):
            found |= self._by_pixels.get(identity, set())
        seen = next((split for split in SEEN if split in found), "")
        return seen or (self._earlier.seen(entry, pixels) if self._earlier else "")

    def fill(self, entries: Sequence[Entry]) -> list[Entry]:
        """Give entries what the run knows of them and the manifest does not: labels, cases and splits.

        Of slides in folds the run's split counts, as each fold's training has others.
        """
        splits = not any(own_split(entry) for entry in entries)
        found = []
        for entry in entries:
            split = self.of(entry) or entry.split if splits or entry.fold else entry.split
            full = self.complete(entry)
            found.append(full if full.split == split else replace(full, split=split))
        return found

    def complete(self, entry: Entry) -> Entry:
        """Give a slide what it has in the run and not of its own: label, case, and further columns."""
        row = self.row(entry)
        if row is None:
            return entry
        known = {name: getattr(entry, name) or row[name] for name in ("label", "case_id")}
        return replace(entry, **known, extra={**row["extra"], **entry.extra})


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
