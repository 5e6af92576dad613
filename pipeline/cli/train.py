"""``nested-ats train``: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import AsJson, Cluster, Device, FailFast, Out, Overwrite, check_cluster
from pipeline.cli.output import exit_if_failed, print_all, print_outcome, say, say_next
from pipeline.cli.tables import Tables, labelled_slides, with_tables

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.data.manifest import Entry


@with_tables
def train(
    manifest: Annotated[Path, typer.Option(help="CSV, Parquet or Excel: slide_id, path, label, ...")],
    out: Out,
    tables: Tables,
    config: Annotated[Path | None, typer.Option(help="YAML; default: the built-in configuration.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, as in train.epochs=10.")] = None,
    splits: Annotated[
        Path | None,
        typer.Option(help="Table of splits or folds: ours, CLAM's splits_0.csv or a folder of them, STAMP's JSON."),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            "--fold", "--folds", help="Train by this fold; several (0,1,2) or all have a run each below --out."
        ),
    ] = None,
    cluster: Cluster = "none",
    workers: Annotated[
        str,
        typer.Option(
            help="Ray workers; a range, as in 1-4, uses as many as there is room for. Of several folds each has one."
        ),
    ] = "1",
    device: Device = "auto",
    mirror: Annotated[
        str | None, typer.Option(help="s3://, gs:// URL to copy the run to at every checkpoint, and to go on from.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="A run or model whose weights to begin with, as of smaller images.")
    ] = None,
    overwrite: Overwrite = False,
    fail_fast: FailFast = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print configuration and costs, write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from one label per slide; the same command goes on with an interrupted run."""
    from pipeline.config import load_config
    from pipeline.data.split_table import fold_entries
    from pipeline.data.targets import columns
    from pipeline.errors import UsageError

    if dry_run and as_json:
        raise UsageError("--json: a dry run prints a configuration; leave out one of them")
    chosen = load_config(config, settings)
    group = _range(workers)
    check_cluster(cluster, group[1], device)
    entries = labelled_slides(manifest, tables, wanted=columns(chosen.target))
    folds = fold_entries(entries, splits, fold, chosen, drop=tables.missing == "drop")
    options: dict[str, Any] = {"device": device, "mirror": mirror, "init": init}
    options |= {"overwrite": overwrite, "fail_fast": fail_fast}
    if dry_run:
        _look(folds, chosen, out, options)
    elif len(folds) > 1:
        _train_folds(folds, chosen, out, options | {"address": cluster, "workers": group[1]}, as_json=as_json)
        say_next("predict", out, manifest, "--out-of-fold", "--out", f"{out}-answers")
    else:
        options |= {"address": cluster, "workers": group}
        _train_one(next(iter(folds.values())), chosen, out, options, as_json=as_json)
        tested = any(entry.split == "test" for entry in entries)
        which = [manifest, "--split", "test", "--out", out / "test"] if tested else ["SLIDES", "--out", "answers"]
        say_next("predict", out, *which)


def _look(folds: Mapping[str, list[Entry]], config: Config, out: Path, options: dict[str, Any]) -> None:
    from pipeline.config import dump_config
    from pipeline.training.dry_run import dry_run
    from pipeline.training.folds import fold_folder

    fold, entries = next(iter(folds.items()))
    if len(folds) > 1:
        say(f"{len(folds)} folds: what follows is of fold {fold}")
    print(dump_config(config), end="", flush=True)
    lines, failures = dry_run(entries, config, fold_folder(out, fold) if len(folds) > 1 else out, **options)
    print_all([f"# {line}" for line in lines])  # comments: what is printed remains a configuration
    exit_if_failed([(failure.slide_id, failure.error) for failure in failures], len(entries))


def _train_one(entries: list[Entry], config: Config, out: Path, options: dict[str, Any], *, as_json: bool) -> None:
    from pipeline.training.train import train as run

    metrics, failed = run(entries, config, out, **options)
    failures, place = [(failure.slide_id, failure.error) for failure in failed], str(options["mirror"] or out)
    if as_json:
        print_outcome(failures, len(entries), run=place, metrics=metrics)
    else:
        print(_words(metrics))
        print_all([metrics["verdict"]] if metrics.get("verdict") else [])
        print(place)
    exit_if_failed(failures, len(entries))


def _train_folds(
    folds: Mapping[str, list[Entry]], config: Config, out: Path, options: dict[str, Any], *, as_json: bool
) -> None:
    from pipeline.training.folds import train_folds

    left_out: dict[str, str] = {}
    failed: list[tuple[str, str]] = []
    told: list[dict[str, Any]] = []
    for done in train_folds(folds, config, out, **options):
        left_out |= {failure.slide_id: failure.error for failure in done.failures}
        if done.error:
            failed.append((f"fold {done.fold}", done.error))
            say(f"fold {done.fold}: failed; the others go on")
        elif not as_json:
            print(f"fold {done.fold}: {_words(done.metrics)}  {done.folder}", flush=True)
        metrics = dict(done.metrics or {})
        told.append({"fold": done.fold, "run": str(done.folder), "metrics": metrics, "error": done.error})
    slides = {entry.slide_id for entries in folds.values() for entry in entries}
    if as_json:
        print_outcome(list(left_out.items()), len(slides), folds=told)
    if failed and left_out:
        say(f"{len(left_out)} of {len(slides)} slides were left out: {'; '.join(map(': '.join, left_out.items()))}")
    exit_if_failed(failed, len(folds)) if failed else exit_if_failed(list(left_out.items()), len(slides))


def _words(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not isinstance(value, str))


def _range(workers: str) -> tuple[int, int]:
    from pipeline.errors import UsageError

    least, dash, most = workers.partition("-")
    with suppress(ValueError):
        if 1 <= int(least) <= int(most if dash else least):
            return int(least), int(most if dash else least)
    raise UsageError(f"--workers {workers}: give a number or a range of numbers from 1 on, as in 1-4")
