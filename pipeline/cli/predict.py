"""``nested-ats predict``: its options, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed, say


def predict(
    run: options.Run,
    slides: options.Slides,
    out: options.Out,
    split: options.Split = None,
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
    slide_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a slide; a Ray worker that takes longer is replaced.")
    ] = 3600.0,
    overwrite: options.Overwrite = False,
) -> None:
    """Classify slides; run again, it classifies only what is missing."""
    from pipeline.data.splits import count_seen, seen_words
    from pipeline.results.predict import predict as classify
    from pipeline.results.predictions import TABLE

    options.check_cluster(cluster, workers, device)
    rows = classify(
        options.chosen_slides(slides, split, run),
        run,
        out,
        draws=draws,
        samples=options.sample_counts(samples),
        target_error=target_error,
        exact=exact,
        trust_encoder=trust_encoder,
        address=cluster,
        workers=workers,
        device=device,
        timeout_s=slide_timeout,
        overwrite=overwrite,
    )
    print(out / f"{TABLE}.csv")
    seen = seen_words(count_seen(rows), len(rows))
    if seen:
        say(f"{seen}; the column seen tells which, and evaluate leaves them out")
    exit_if_failed([(row["slide_id"], row["error"]) for row in rows if row["status"] != "ok"], len(rows))
