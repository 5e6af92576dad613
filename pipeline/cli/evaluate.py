"""``nested-ats evaluate``: its options, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, Split
from pipeline.cli.output import say_next


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder that predict wrote.")],
    split: Split = None,
    include_seen: Annotated[
        bool, typer.Option("--include-seen", help="Count slides too that the model was trained or validated on.")
    ] = False,
    by_case: Annotated[
        str | None,
        typer.Option(help="Make one answer of the slides of a case: mean, max or noisy-or of theirs."),
    ] = None,
    positive: Annotated[str, typer.Option(help="Of two classes the one that max and noisy-or are about.")] = "",
    by: Annotated[
        str | None,
        typer.Option(help="Column of the manifest, as of sites: give the figures of each of its values too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with the labels of the manifest, on slides that the training has not seen."""
    from pipeline.results.by_case import choose_how
    from pipeline.results.evaluate import evaluate as measure
    from pipeline.results.report import describe_metrics

    how = choose_how(by_case)
    metrics = measure(predictions, split=split, include_seen=include_seen, by_case=how, positive=positive, by=by)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    for name, value in describe_metrics(metrics):
        print(f"{name:18} {value}")
    if metrics["verdict"]:
        print(metrics["verdict"])
    say_next("report", "RUN", predictions, "--out", "report.html")
