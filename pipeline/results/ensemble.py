"""Predictions of several runs as one: the mean of what their models answer, and how far the models are apart.

Each model predicts into a folder of its own below ``models/``, as `pipeline.results.predict` does it alone, so that a
run that was stopped goes on. With ``out_of_fold`` a slide is answered by the models alone that have not seen it.

Shape letters: M models, A answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from nested_ats.targets import DiscreteSurvival, Target, read_target
from pipeline.config import digest
from pipeline.data.cases import group_cases
from pipeline.data.manifest import Entry
from pipeline.data.splits import SEEN, RunSplits, own_split
from pipeline.errors import UsageError
from pipeline.files import alone, file_name, make_folder, write_json
from pipeline.results import predictions
from pipeline.results.classifier import failed
from pipeline.results.predict import predict
from pipeline.results.settings import Options, Settings, prediction_settings
from pipeline.results.table import write_table
from pipeline.results.thresholds import Thresholds
from pipeline.results.verdict import run_shares
from pipeline.runs import read_run, short

MEMBERS = "models"  # folder of the folders of predictions of each model
SPREAD = "spread_"  # standard deviation of a class's probability over the models
_SUMS, _MEANS = ("draws", "requests", "bytes_read", "seconds"), predictions.SIGNS

Row = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One run whose model takes part."""

    name: str  # unique among the members, and that of its folder
    run: Path
    about: Mapping[str, Any]  # its run.json
    settings: Settings

    @cached_property
    def target(self) -> Target:
        """What its model answers."""
        return read_target(self.about["target"])

    @cached_property
    def splits(self) -> RunSplits:
        """The splits of its slides."""
        return RunSplits.of_run(self.about)


Answers = list[tuple[Member, Mapping[str, Any]]]  # of models, to one slide


def members(runs: Sequence[Path], **options: Unpack[Options]) -> list[Member]:
    """Look at the runs, all of which must have finished and answer the same.

    Each model draws by a seed of its own, so that the errors of their draws are independent.

    Raises
    ------
    UsageError
        A run has not finished, is given twice, or answers something else than the first.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is given twice; give each one once")
    names = [run.resolve().name for run in runs]
    found = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        unique = file_name(name if names.count(name) == 1 else f"{number}-{name}")
        settings = prediction_settings(run, **options)
        seed = hashlib.sha256(f"{settings.seed}/{settings.model_sha256}".encode()).digest()[:7]
        found.append(Member(unique, run, read_run(run), replace(settings, seed=int.from_bytes(seed))))
    common = common_target([member.target for member in found])
    for member in found[1:]:
        if member.settings.unit != found[0].settings.unit:
            raise UsageError(f"{found[0].run} and {member.run}: a model of slides and one of cases have no mean")
        one, other = found[0].target, member.target
        if common is None:
            answers = " and ".join(f"{each.kind} {', '.join(each.names)}" for each in (one, other))
            raise UsageError(
                f"{found[0].run} and {member.run}: models of other answers ({answers}) have no mean; a fold whose "
                "training slides lack a class does not know it"
            )
    return found


def common_target(targets: Sequence[Target]) -> Target | None:
    """Return what all models answer, or can be made to: survival past times that all of them reach; None: nothing.

    Folds without `target.times` have times by their own events. The first time of all is the earliest of the first
    times, and so on, so that none lies beyond what a model knows.
    """
    if len({(target.kind, target.names) for target in targets}) == 1:
        return targets[0]
    survival = [target for target in targets if isinstance(target, DiscreteSurvival)]
    if len(survival) < len(targets):
        return None
    return DiscreteSurvival(tuple(min(each) for each in zip(*(target.times for target in survival), strict=False)))


def _resampled(row: Mapping[str, Any], own: Target, common: Target) -> Mapping[str, Any]:
    """Answers of a model at the common times: linear between its own, as events spread evenly within an interval.

    So are standard errors and limits, which then are no smaller than they should be.
    """
    if not isinstance(own, DiscreteSurvival) or not isinstance(common, DiscreteSurvival) or own == common:
        return row
    times = np.array([0.0, *own.times])
    at_zero = (1.0, 0.0, 1.0, 1.0)  # all survive, for certain
    old = (predictions.answer_columns(own), *predictions.error_columns(own))
    new = (predictions.answer_columns(common), *predictions.error_columns(common))
    found = dict(row)
    for names, wanted, start in zip(old, new, at_zero, strict=True):
        own_values = [found.pop(name) for name in names]
        values = [start, *(np.nan if value is None else value for value in own_values)]
        found |= dict(zip(wanted, np.interp(common.times, times, values).tolist(), strict=True))
    return found


def _split_of(entry: Entry, found: Sequence[Member]) -> str:
    """Return the manifest's split of a slide, or that on which all members agree that have the slide."""
    splits = {split for member in found if (split := member.splits.of(entry))}
    return own_split(entry) or (splits.pop() if len(splits) == 1 else "")


def _choose(entries: Sequence[Entry], split: str, found: Sequence[Member], *, out_of_fold: bool) -> list[Entry]:
    """Choose the slides of a split; out of fold it is enough that they are in it in one of the runs."""
    chosen = [
        entry
        for entry in entries
        if _split_of(entry, found) == split
        or (out_of_fold and not own_split(entry) and any(member.splits.of(entry) == split for member in found))
    ]
    if not chosen:
        raise UsageError(
            f"--split {split}: no slide is in it, neither by the manifest nor in all of {len(found)} runs; where it "
            "differs between folds, --out-of-fold takes each slide by the runs in which it is"
        )
    return chosen


def predict_ensemble(
    entries: Sequence[Entry],
    runs: Sequence[Path],
    folder: Path,
    *,
    split: str | None = None,
    out_of_fold: bool = False,
    overwrite: bool = False,
    address: str = "none",
    workers: int = 1,
    timeout_s: float = 3600.0,
    **options: Unpack[Options],
) -> list[Row]:
    """Classify slides by the mean of several models.

    Parameters
    ----------
    entries
        The slides; labels, cases and splits that they lack are taken from the runs.
    runs
        The folders of runs that have finished.
    folder
        Gets the table, and the predictions of each model below ``models/``.
    split
        If given, only slides of this split are classified: that of the manifest, or else of the runs.
    out_of_fold
        Whether each slide is answered by the models alone that have not seen it; where all have, by those that were
        only validated on it.
    overwrite, address, workers, timeout_s, options
        See `pipeline.results.predict.predict`.

    Returns
    -------
    The table's row of each slide, in the order of `entries`. The answers are means over the models, ``se_`` their
    standard errors over draws, ``low_`` and ``high_`` their 95 % intervals over draws (MOVER), ``spread_`` the
    standard deviation over the models, ``models`` their number, and ``seen`` says whether one of them has seen the
    slide.

    Raises
    ------
    UsageError
        The runs do not fit each other (`members`), or `folder` holds other predictions.
    """
    found = members(runs, **options)
    target = common_target([member.target for member in found])
    assert target is not None  # noqa: S101  members see to it
    predictions.check_columns(entries, target, more=["models", *(SPREAD + name for name in target.names)])
    slides = _choose(entries, split, found, out_of_fold=out_of_fold) if split else list(entries)
    for member in found:
        slides = [member.splits.complete(entry) for entry in slides]
    if found[0].settings.unit == "case":
        slides = group_cases(slides)
    about = _about(found, target, out_of_fold=out_of_fold)
    thresholds: Thresholds = about.get("thresholds", {})
    make_folder(folder)
    with alone(folder / predictions.LOCK, "another prediction is being written there"):
        same = predictions.read_about(folder).get("fingerprint") in (None, about["fingerprint"])
        if not same and not overwrite:
            raise UsageError(
                f"{folder}: holds predictions of other models or settings; give another --out, or --overwrite"
            )
        write_json(folder / predictions.ABOUT, about)
        answers: dict[str, Answers] = {entry.slide_id: [] for entry in slides}
        wanted = {entry.slide_id: _answering(entry, found) if out_of_fold else found for entry in slides}
        for member in found:
            chosen = [entry for entry in slides if member in wanted[entry.slide_id]]
            own: Options = {**options, "seed": member.settings.seed}
            for row in predict(
                chosen,
                member.run,
                folder / MEMBERS / member.name,
                address=address,
                workers=workers,
                timeout_s=timeout_s,
                overwrite=overwrite,
                **own,
            ):
                answers[row["slide_id"]].append((member, row))
        table = [
            _row(entry, answers[entry.slide_id], target, thresholds, out_of_fold=out_of_fold)
            | {"model": about["model"]}
            for entry in slides
        ]
        write_table(folder, table)
        return table


def _about(found: Sequence[Member], target: Target, *, out_of_fold: bool) -> Row:
    """Say which models answer, what `evaluate` wants to know of their training, and what decides the answers."""
    model = short(digest(sorted(member.settings.model_sha256 for member in found)))
    about: Row = {"models": {each.name: short(each.settings.model_sha256) for each in found}}
    about["out_of_fold"] = out_of_fold
    fingerprint = digest([about, sorted(member.settings.fingerprint for member in found)])
    facts = {"target": target.plain, "told_by": found[0].about["config"]["target"]}
    if shares := [known for each in found if (known := run_shares(each.about))]:
        names = target.names
        facts["class_shares"] = {name: float(np.mean([each[name] for each in shares])) for name in names}
    chosen = [each.settings.thresholds for each in found]
    if chosen[0] and all(each.keys() == chosen[0].keys() for each in chosen):
        # Of a mean of probabilities it is their mean.
        facts["thresholds"] = {name: float(np.mean([each[name] for each in chosen])) for name in chosen[0]}
    return about | {"fingerprint": fingerprint, "model": model} | facts


def _answering(entry: Entry, found: Sequence[Member]) -> list[Member]:
    """Return the members that have not seen a slide; if all have, those that were validated on it."""
    pixels = set().union(*(member.splits.pixels(entry) for member in found))
    seen = {member.name: member.splits.seen(entry, pixels) for member in found}
    return next((chosen for split in ("", "val") if (chosen := [m for m in found if seen[m.name] == split])), [])


def _row(entry: Entry, answers: Answers, target: Target, thresholds: Thresholds, *, out_of_fold: bool) -> Row:
    """Make the row of a slide of what the models answer."""
    if out_of_fold:  # a copy under another name is told by its pixels, once they were opened
        unseen = [answer for answer in answers if not answer[1]["seen"]]
        answers = unseen or answers
    split = _split_of(entry, [member for member, _ in answers])
    first: Row = dict(predictions.identity(replace(entry, split=split)))
    if not answers:
        return first | {"seen": "train"} | failed("all models have trained on it; leave out --out-of-fold")
    seen = next((split for split in SEEN if any(row["seen"] == split for _, row in answers)), "")
    first |= {"seen": seen, "models": len(answers)}
    wrong = [f"{member.name}: {row['error']}" for member, row in answers if row["status"] != "ok"]
    if wrong:
        return first | failed("; ".join(wrong))
    return first | combine([_resampled(row, each.target, target) for each, row in answers], target, thresholds)


def combine(rows: Sequence[Mapping[str, Any]], target: Target, thresholds: Thresholds | None = None) -> Row:
    """Average the answers of M models to one slide.

    The standard error is that of a mean of independent draws. The interval is MOVER's (Zou and Donner, 2008): the
    distances to the limits of each model's interval are added in squares.
    """
    columns = [predictions.answer_columns(target), *predictions.error_columns(target)]
    mean, error, low, high = (_numbers(rows, names) for names in columns)
    count, middle = len(rows), mean.mean(0)
    spread = mean.std(0, ddof=1) if count > 1 else np.full(len(middle), np.nan)
    parts = [
        middle,
        np.sqrt((error**2).sum(0)) / count,
        middle - np.sqrt(((mean - low) ** 2).sum(0)) / count,
        middle + np.sqrt(((high - mean) ** 2).sum(0)) / count,
        spread,
    ]
    columns.append([SPREAD + name for name in target.names])
    return {
        "prediction": predictions.in_short(target, middle.tolist(), thresholds),
        **{
            name: None if np.isnan(value) else float(value)
            for names, values in zip(columns, parts, strict=True)
            for name, value in zip(names, values, strict=True)
        },
        **{name: _over(rows, name, np.sum) for name in _SUMS},
        **{name: _over(rows, name, np.mean) for name in _MEANS},
        "status": "ok",
        "error": "",
    }


def _numbers(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> NDArray[np.float64]:
    """Numbers of each model and answer, (M, A), NaN for those that are missing."""
    return np.array([[row[name] for name in names] for row in rows], np.float64)


def _over(rows: Sequence[Mapping[str, Any]], name: str, reduce: Any) -> float | int | None:
    values = [row[name] for row in rows if row[name] is not None]
    return reduce(values).item() if values else None
