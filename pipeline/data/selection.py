"""Find the slides of a manifest that can be trained on, by opening all of them before anything is made."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from nested_ats.networks.builtin import ENCODERS, GIVEN
from nested_ats.networks.encoders import read_choice
from nested_ats.networks.hub import RANDOM
from nested_ats.targets import Classes, Target
from pipeline.config import Config
from pipeline.data.cases import group_cases
from pipeline.data.duplicates import copy_remarks, identity_of
from pipeline.data.given import FeatureFile
from pipeline.data.manifest import Entry, remarks
from pipeline.data.samples import open_sample
from pipeline.data.slides import SlideImage, check_slide
from pipeline.data.splits import assign_splits
from pipeline.data.targets import by_stratum, check_table, columns, learn_target, row_of
from pipeline.errors import DataError, UsageError
from pipeline.net import Net
from pipeline.progress import each_slide
from pipeline.sections import AnyTarget, ClassesTarget
from storage.format.levels import Level

_OPENED_AT_ONCE = 16  # opening waits for the disk or the network
_FINER = 4  # times, along each axis, are a level's pixels made of at each read without a word
_LONG_CHUNK = 4096  # pixels
_ONE_SCALE = 1.1  # times the smallest pixel are others said to be of the same size


@dataclass(frozen=True)
class Failure:
    """A slide that was left out, and why."""

    slide_id: str
    error: str


@dataclass(frozen=True)
class Selection:
    """What can be trained on."""

    config: Config  # with the encoder of features that are given, if they tell it
    entries: list[Entry]  # slides that can be used, each with a split
    target: Target  # what the training slides have the model answer
    channels: int  # how many channels all of them have
    downsamples: list[tuple[float, ...]]  # for each slide those of the levels that the model reads, coarse to fine
    failures: list[Failure]  # the other slides
    identities: dict[str, str]  # of the pixels of slides that have one, by slide id


@dataclass(frozen=True)
class _Found:
    """What was found out by opening a slide."""

    entry: Entry
    channels: int = 0
    downsamples: tuple[float, ...] = ()
    slow: str = ""  # what makes reading it slow, in words
    mpp: float | None = None  # micrometres per pixel of its finest level
    assumed: bool = False  # whether these are `DataConfig.assume_mpp`
    identity: str | None = None  # of its pixels
    opacity: bool = False  # whether it has a channel of opacity, which is not shown to the model
    made_by: str = ""  # the encoder of its features, where these were given and tell it
    error: str = ""


def select(entries: Sequence[Entry], config: Config, *, fail_fast: bool) -> Selection:
    """Open every slide and see what can be trained on; remarks on the manifest go to standard error.

    Parameters
    ----------
    entries
        The slides with their labels; splits are assigned where the manifest has none.
    config
        The resolved configuration.
    fail_fast
        Whether to stop at the first slide that cannot be used.

    Raises
    ------
    UsageError
        Labels or splits allow no training; the slides that were left out are named before.
    DataError
        No slide, or with `fail_fast` not every slide, can be used.
    """
    check_table(config.target, entries)
    for remark in [*_encoder_remarks(config), *remarks(entries, classes=isinstance(config.target, ClassesTarget))]:
        _say(f"warning: {remark}")
    shares: dict[str, Any] = {"validation": config.data.validation, "test": config.data.test, "seed": config.seed}
    entries = by_stratum(config.target, entries, lambda labelled: assign_splits(labelled, **shares))
    found = _open_all(entries, config, fail_fast=fail_fast)
    opened = [one for one in found if not one.error]
    if not opened:
        raise DataError(f"no slide can be used; the first: {found[0].error}")
    _warn_of_slides(opened, config)
    channels, odd = _other_channels(opened, config)
    made_by, others = _other_makers([one for one in opened if one.entry.slide_id not in odd])
    odd |= others
    if odd and fail_fast:
        raise DataError(next(f"slide {slide_id}: {reason}" for slide_id, reason in odd.items()))
    reasons = {one.entry.slide_id: one.error for one in found if one.error} | odd
    failures = [Failure(entry.slide_id, reasons[entry.slide_id]) for entry in entries if entry.slide_id in reasons]
    usable = [one for one in opened if one.entry.slide_id not in odd]
    if not usable:
        raise DataError(f"no slide can be used; the first: {failures[0].error}")
    kept = [one.entry for one in usable]
    try:
        target = _target(kept, config.target)
    except UsageError:
        for failure in failures:  # they may be the cause of the error, and are named before it
            _say(f"slide {failure.slide_id} is left out: {failure.error}")
        raise
    identities = {one.entry.slide_id: one.identity for one in usable if one.identity}
    for remark in copy_remarks(kept, identities):
        _say(f"warning: {remark}")
    if config.data.unit == "case":
        kept = group_cases(kept, columns(config.target))
    config = _name_maker(config, made_by)
    return Selection(config, kept, target, channels, [one.downsamples for one in usable], failures, identities)


def _warn_of_slides(opened: Sequence[_Found], config: Config) -> None:
    """Say what is better known of slides before a training."""
    if slow := [one for one in opened if one.slow]:
        _say(
            f"warning: {len(slow)} of {len(opened)} slides are slow to read where they lie, such as "
            f"{slow[0].entry.path}: {slow[0].slow}; nested-ats convert makes pyramids of them, once"
        )
    if config.model.mpp and (assumed := sum(one.assumed for one in opened)):
        _say(
            f"warning: {assumed} of {len(opened)} slides do not tell what their pixels measure, and are taken as of "
            f"{config.data.assume_mpp:g} micrometres (data.assume_mpp)"
        )
    if config.model.mpp is None and (scales := _several_scales([one.mpp for one in opened if one.mpp])):
        _say(
            f"warning: the slides were scanned at {scales} micrometres per pixel, and the model sees them as if "
            "at one; set model.mpp"
        )
    if opacity := sum(one.opacity for one in opened):
        _say(
            f"warning: {opacity} of {len(opened)} slides have a channel of opacity, which tells where there is data, "
            "and which the model does not see; if it is a band, name it in data.channels, as in [R, G, B, A]"
        )


def _other_channels(opened: Sequence[_Found], config: Config) -> tuple[int, dict[str, str]]:
    """Return how many channels the model sees, and why slides are left out that have others, by their ids.

    Raises
    ------
    UsageError
        Training slides are to be changed in a way that these channels do not allow.
    """
    channels, count = Counter(one.channels for one in opened).most_common(1)[0]
    why = f"{count} of {len(opened)} slides have {channels}; convert slides of one kind, or set data.channels"
    if isinstance(config.data.channels, int):
        channels, why = config.data.channels, f"data.channels is {config.data.channels}"
    if config.train.augment.hed and channels != 3:
        raise UsageError(
            f"train.augment.hed: stains are told by red, green and blue, and slides have {channels} channels; use 0"
        )
    return channels, {
        one.entry.slide_id: f"{one.entry.path}: {one.channels} channels, where {why}"
        for one in opened
        if one.channels != channels
    }


def _other_makers(opened: Sequence[_Found]) -> tuple[str, dict[str, str]]:
    """Return which encoder has made the features of most, and why the others are left out, by their ids."""
    makers = Counter(one.made_by for one in opened if one.made_by)
    made_by = makers.most_common(1)[0][0] if makers else ""
    return made_by, {
        one.entry.slide_id: f"{one.entry.path}: features of {one.made_by}, where most are of {made_by}"
        for one in opened
        if one.made_by not in ("", made_by)
    }


def _name_maker(config: Config, made_by: str) -> Config:
    """Write down which encoder has made the features that are given, so that no model takes those of another."""
    choice = read_choice(config.model.encoder)
    if not made_by or choice.options.get("of"):
        return config
    named = choice._replace(options={**choice.options, "of": made_by})
    return config.model_copy(update={"model": replace(config.model, encoder=named.plain)})


def _several_scales(mpps: Sequence[float]) -> str:
    """The scales of slides that differ by more than a tenth, with their numbers, in words; empty where none does."""
    groups: list[list[float]] = []
    for mpp in sorted(mpps):
        if not groups or mpp > groups[-1][0] * _ONE_SCALE:
            groups.append([])
        groups[-1].append(mpp)
    words = [f"{median(group):.3g} ({len(group)})" for group in groups]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(groups) > 1 else ""


def why_slow(level: Level) -> str:
    """What makes reading a level slow, in words; empty if nothing does."""
    if level.made_of and level.downsample > _FINER * level.made_of:
        more = (level.downsample / level.made_of) ** 2
        return f"it lacks downsample {level.downsample:g}, of which each look averages {more:.0f} times the pixels"
    if level.chunk > _LONG_CHUNK:
        return f"pixels are decoded in pieces that are {level.chunk} pixels long"
    return ""


def _encoder_remarks(config: Config) -> list[str]:
    """Warn of an encoder that is not trained and never was, which nobody can mean."""
    choice, trainable = read_choice(config.model.encoder), config.model.trainable
    if (
        trainable == "all"
        or choice.name == GIVEN
        or not (choice.weights == RANDOM or (choice.weights is None and choice.name in ENCODERS))
    ):
        return []
    remark = (
        f"model.trainable: {trainable} leaves random weights in the encoder as they are; name trained ones, as in "
        f"encoder: {{name: {choice.name}, weights: PATH}}, or set trainable to all"
    )
    return [remark]


def _open_all(entries: Sequence[Entry], config: Config, *, fail_fast: bool) -> list[_Found]:
    def look(entry: Entry) -> _Found:
        with Net(entry.slide_id, fail_fast=fail_fast) as net:
            [image] = open_sample(entry, config.model, **config.data.opening).slides
            with image.slide as slide:
                levels = [slide.levels[number] for number in check_slide(image, config.model)]
                identity = identity_of(slide)
            slow = next(filter(None, map(why_slow, levels)), "")
            downsamples = tuple(level.downsample for level in levels)
            mpp = image.own_mpp
            assumed = mpp is not None and mpp == config.data.assume_mpp and not (entry.mpp or slide.mpp)
            return _Found(
                entry,
                len(image.numbers),
                downsamples,
                slow,
                mpp,
                assumed,
                identity,
                opacity=isinstance(image, SlideImage) and image.hides_opacity,
                made_by=slide.made_by if isinstance(slide, FeatureFile) else "",
            )
        return _Found(entry, error=net.error)

    return list(each_slide("open", entries, look, threads=_OPENED_AT_ONCE))


def _target(entries: Sequence[Entry], config: AnyTarget) -> Target:
    target = learn_target(config, [entry for entry in entries if entry.split == "train"])
    if isinstance(target, Classes):
        column = columns(config)[0]
        unknown = sorted({str(row_of(entry)[column]) for entry in entries} - set(target.classes))
        if unknown:
            raise UsageError(f"labels of validation or test slides that no training slide has: {', '.join(unknown)}")
    return target


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
