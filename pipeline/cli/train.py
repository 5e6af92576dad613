"""``nested-ats train``: its options, and what it prints."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import Cluster, Device, FailFast, Out, Overwrite, check_cluster
from pipeline.cli.output import exit_if_failed, print_all


def train(
    manifest: Annotated[Path, typer.Option(help="CSV or Parquet: slide_id, path, label, ...")],
    out: Out,
    config: Annotated[Path | None, typer.Option(help="YAML; default: the built-in configuration.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, as in train.epochs=10.")] = None,
    cluster: Cluster = "none",
    workers: Annotated[
        str, typer.Option(help="Ray workers; a range, as in 1-4, uses as many as there is room for.")
    ] = "1",
    device: Device = "auto",
    mirror: Annotated[
        str | None, typer.Option(help="s3://, gs:// URL to copy the run to at every checkpoint, and to go on from.")
    ] = None,
    overwrite: Overwrite = False,
    fail_fast: FailFast = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print configuration and costs, write nothing.")
    ] = False,
) -> None:
    """Train a model from one label per slide; the same command goes on with an interrupted run."""
    from pipeline.config import dump_config, load_config
    from pipeline.data.manifest import read_manifest
    from pipeline.data.targets import columns

    chosen = load_config(config, settings)
    entries = read_manifest(manifest, labelled="label" in columns(chosen.target))
    group = _range(workers)
    check_cluster(cluster, group[1], device)
    options: dict[str, Any] = {"device": device, "mirror": mirror, "overwrite": overwrite, "fail_fast": fail_fast}
    if dry_run:
        from pipeline.training.dry_run import dry_run as look

        print(dump_config(chosen), end="", flush=True)
        lines, failures = look(entries, chosen, out, **options)
        print_all([f"# {line}" for line in lines])  # comments: what is printed remains a configuration
    else:
        from pipeline.training.train import train as run

        metrics, failures = run(entries, chosen, out, address=cluster, workers=group, **options)
        print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not isinstance(value, str)))
        if metrics.get("verdict"):
            print(metrics["verdict"])
        print(mirror or out)
    exit_if_failed([(failure.slide_id, failure.error) for failure in failures], len(entries))


def _range(workers: str) -> tuple[int, int]:
    from pipeline.errors import UsageError

    least, dash, most = workers.partition("-")
    with suppress(ValueError):
        if 1 <= int(least) <= int(most if dash else least):
            return int(least), int(most if dash else least)
    raise UsageError(f"--workers {workers}: give a number or a range of numbers from 1 on, as in 1-4")
