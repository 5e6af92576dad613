"""``nested-ats calibrate``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed, print_outcome, say

_FEW = 30  # slides, of which a temperature is hardly known
_FLAT = 20  # a temperature at which probabilities are all but equal


def calibrate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or of folds.")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            "--threshold",
            help="Answer a label from this probability on: youden, the best on validation slides, or LABEL=NUMBER "
            "(repeatable); default: 0.5. For two classes or several labels.",
        ),
    ] = None,
    draws: options.Draws = None,
    trust_encoder: options.TrustEncoder = False,
    cluster: options.Cluster = "none",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Fit one temperature to the validation slides, by which predict and heatmap divide the logits from then on.

    With --threshold they also answer by that threshold, and evaluate counts by it; probabilities stay as they are.
    """
    from pipeline.net import Net
    from pipeline.results.calibrate import calibrate as fit
    from pipeline.runs import fold_runs

    options.check_cluster(cluster, workers, device)
    how: dict[str, Any] = {"threshold": threshold or (), "address": cluster, "workers": workers}
    how |= {"draws": draws, "trust_encoder": trust_encoder, "device": device}
    runs = fold_runs(run) or [run]
    failed, told = [], []
    for each in runs:
        with Net() as net:
            found = fit(each, **how)
            told.append({"run": str(each), **found})
            if not as_json:
                _print(each, found)
        if net.cause and len(runs) == 1:
            raise net.cause
        if net.error:
            failed.append((each.name, net.error))
    if as_json:
        print_outcome(failed, len(runs), runs=told)
    exit_if_failed(failed, len(runs))


def _print(run: Path, found: dict[str, Any]) -> None:
    for name, value in found["thresholds"].items():
        print(f"{run}: {name} is answered from a probability of {value:.3f} on")
    if found["temperature"] is None:
        say("note: no temperature is fitted: none is for several labels, nor where all slides are answered rightly")
        return
    changes = [
        f"{words} {found['before'][name]:.3f} -> {found['after'][name]:.3f}"
        for name, words in (("cross_entropy", "cross-entropy"), ("ece", "calibration error"))
    ]
    print(f"{run}: temperature {found['temperature']:.3f} by {found['slides']} slides; on these {', '.join(changes)}")
    if found["temperature"] > _FLAT:
        say("note: so high a temperature says that the model's probabilities tell nothing; has it learned anything?")
    if found["slides"] < _FEW:
        say(f"note: {found['slides']} validation slides hardly tell a temperature; more are better")
