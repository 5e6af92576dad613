"""``nested-ats calibrate``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed, say

_FEW = 30  # slides, of which a temperature is hardly known
_FLAT = 20  # a temperature at which probabilities are all but equal


def calibrate(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or of folds.")],
    draws: options.Draws = None,
    trust_encoder: options.TrustEncoder = False,
    cluster: options.Cluster = "none",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    device: options.Device = "auto",
) -> None:
    """Fit one temperature to the validation slides, by which predict and heatmap divide the logits from then on."""
    from pipeline.net import Net
    from pipeline.runs import fold_runs

    options.check_cluster(cluster, workers, device)
    how = {"draws": draws, "trust_encoder": trust_encoder, "device": device, "address": cluster, "workers": workers}
    runs = fold_runs(run)
    if not runs:
        _fit(run, how)
        return
    failed = []
    for each in runs:
        with Net() as net:
            _fit(each, how)
        if net.error:
            failed.append((each.name, net.error))
    exit_if_failed(failed, len(runs))


def _fit(run: Path, how: dict[str, Any]) -> None:
    from pipeline.results.calibrate import calibrate as fit

    found = fit(run, **how)
    changes = [
        f"{words} {found['before'][name]:.3f} -> {found['after'][name]:.3f}"
        for name, words in (("cross_entropy", "cross-entropy"), ("ece", "calibration error"))
    ]
    print(f"{run}: temperature {found['temperature']:.3f} by {found['slides']} slides; on these {', '.join(changes)}")
    if found["temperature"] > _FLAT:
        say("note: so high a temperature says that the model's probabilities tell nothing; has it learned anything?")
    if found["slides"] < _FEW:
        say(f"note: {found['slides']} validation slides hardly tell a temperature; more are better")
