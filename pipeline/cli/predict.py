"""``nested-ats predict``: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed, print_outcome, say, say_next


def predict(
    run: Annotated[
        Path, typer.Argument(help="Folder of a training run, or of folds; the mean of several: name all of them.")
    ],
    slides: options.Slides,
    out: options.Out,
    split: options.Split = None,
    out_of_fold: Annotated[
        bool, typer.Option("--out-of-fold", help="Answer each slide by the models alone that have not seen it.")
    ] = False,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Leave answers as they are, whatever calibrate has found.")
    ] = False,
    last: options.Last = False,
    draws: options.Draws = None,
    samples: options.Samples = "",
    target_error: Annotated[
        float | None,
        typer.Option(min=0, help="Stop drawing at this expected error of the probabilities; --draws is the most."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Encode every patch of the opened regions; slower, no draws there.")
    ] = False,
    trust_encoder: options.TrustEncoder = False,
    cluster: options.Cluster = "none",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    device: options.Device = "auto",
    slide_timeout: options.SlideTimeout = 3600.0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Classify slides; run again, it classifies only what is missing. Of several runs the mean is taken."""
    from pipeline.data.discovery import name_slides
    from pipeline.data.splits import count_seen, seen_words
    from pipeline.results.ensemble import predict_ensemble
    from pipeline.results.predict import predict as classify
    from pipeline.results.table import TABLE

    options.check_cluster(cluster, workers, device)
    runs, places = options.several_runs(run, slides)
    how: dict[str, Any] = {"draws": draws, "samples": options.sample_counts(samples), "target_error": target_error}
    how |= {
        "exact": exact,
        "uncalibrated": no_calibration,
        "last": last,
        "trust_encoder": trust_encoder,
        "device": device,
    }
    where: dict[str, Any] = {
        "address": cluster,
        "workers": workers,
        "timeout_s": slide_timeout,
        "overwrite": overwrite,
    }
    if len(runs) > 1 or out_of_fold:
        say(f"{len(runs)} models: {', '.join(map(str, runs))}")
        entries = name_slides(places)
        rows: Sequence[Mapping[str, Any]] = predict_ensemble(
            entries, runs, out, split=split, out_of_fold=out_of_fold, **where, **how
        )
    else:
        rows = classify(options.chosen_slides(places, split, runs[0]), runs[0], out, **where, **how)
    failures = [(row["slide_id"], row["error"]) for row in rows if row["status"] != "ok"]
    if as_json:
        print_outcome(failures, len(rows), table=str(out / f"{TABLE}.csv"), seen=count_seen(rows))
    else:
        print(out / f"{TABLE}.csv")
    seen = seen_words(count_seen(rows), len(rows))
    if seen:
        say(f"{seen}; the column seen tells which, and evaluate leaves them out")
    exit_if_failed(failures, len(rows))
    if any(row["label"] for row in rows):
        say_next("evaluate", out)
