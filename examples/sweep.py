"""Try settings of a training side by side by Ray Tune, and stop those that fall behind.

    python examples/sweep.py --manifest labels.csv --config config.yaml --out sweep \
        --try train.learning_rate=1e-3,3e-3 --try model.scale=4,8,16 [--trials 8] [--at-once 2] [--metric val_auc]

Every trial is a training run of its own below ``--out``, as ``nested-ats train`` makes one: ``nested-ats runs sweep``
compares them, and each can be predicted with. Ray gets the figures of every epoch through ``train.tracker``. With fewer
trials than there are combinations these are drawn at random. Choose by validation slides, never by test slides.
"""

from __future__ import annotations

import argparse
import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

import cluster
from cluster.session import require_ray
from pipeline.config import load_config
from pipeline.data.manifest import read_manifest
from pipeline.errors import UsageError
from pipeline.files import file_name
from pipeline.interrupt import run_main
from pipeline.training.train import train

_LOWER_IS_BETTER = ("loss", "entropy", "likelihood", "error", "mae")


def combinations(tried: list[str], trials: int | None, seed: int) -> list[list[str]]:
    """Return the overrides of each trial: all combinations, or so many of them, drawn without repetition.

    Parameters
    ----------
    tried
        Texts ``key=value,value``.
    trials
        The most; None takes all.
    seed
        Decides which are drawn.
    """
    columns = []
    for text in tried:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UsageError(f"--try {text}: write it as key=value,value, as in train.learning_rate=1e-3,3e-3")
        columns.append([f"{key}={value}" for value in values.split(",")])
    every = [list(each) for each in itertools.product(*columns)]
    return every if trials is None or trials >= len(every) else random.Random(seed).sample(every, trials)


def trial(space: dict[str, Any], *, manifest: str, config: str | None, out: str) -> None:
    """Train by one combination; Ray runs this in a process of its own."""
    chosen = load_config(Path(config) if config else None, [*space["settings"], "train.tracker=ray.tune:report"])
    train(read_manifest(Path(manifest)), chosen, Path(out) / trial_name(space["settings"]))


def trial_name(settings: list[str]) -> str:
    """Name the run of a trial after its settings, as in ``learning_rate=1e-3,scale=4``."""
    pairs = (setting.partition("=") for setting in settings)
    return file_name(",".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs))


def sweep(
    manifest: Path,
    config: Path | None,
    out: Path,
    tried: list[list[str]],
    *,
    metric: str,
    at_once: int = 1,
    address: str = "local",
) -> list[tuple[str, float | None, str]]:
    """Run the trials.

    Parameters
    ----------
    manifest, config
        Of all trainings.
    out
        The folder of their runs, on a disk that all machines of the cluster share.
    tried
        See `combinations`.
    metric
        Figure of an epoch by which trials are compared, such as ``val_auc`` or ``val_cross_entropy``.
    at_once
        Trials that run side by side, with a processor each.
    address
        ``local``, or the address of a Ray cluster.

    Returns
    -------
    For each trial its name, the last value of the metric, and why it failed or an empty text; the best first.
    """
    require_ray()
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    epochs = [load_config(config, each).train.epochs for each in tried]  # settings are checked before Ray starts
    lower = any(word in metric for word in _LOWER_IS_BETTER)
    read = str(config.absolute()) if config else None
    function = partial(trial, manifest=str(manifest.absolute()), config=read, out=str(out.absolute()))
    how = tune.TuneConfig(
        metric=metric,
        mode="min" if lower else "max",
        scheduler=ASHAScheduler(time_attr="epoch", max_t=max(epochs), grace_period=max(1, min(epochs) // 4)),
        max_concurrent_trials=at_once,
    )
    with cluster.session(address, num_cpus=at_once if address == "local" else None):
        found = tune.Tuner(
            tune.with_resources(function, {"cpu": 1}),
            param_space={"settings": tune.grid_search(tried)},
            tune_config=how,
            run_config=tune.RunConfig(name="ray", storage_path=str(out.absolute()), verbose=0),
        ).fit()
    rows = []
    for result in found:
        settings = (result.config or {})["settings"]
        rows.append((trial_name(settings), (result.metrics or {}).get(metric), str(result.error or "")))
    return sorted(rows, key=lambda row: (row[1] is None, (row[1] or 0.0) * (1 if lower else -1)))


def main() -> None:
    """Read the command line, run the trials and print them, the best first."""
    parser = argparse.ArgumentParser(description="Try settings of a training side by side.")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--try", dest="tried", action="append", required=True, metavar="KEY=VALUE,VALUE")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--metric", default="val_cross_entropy")
    parser.add_argument("--cluster", default="local")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tried = combinations(given.tried, given.trials, given.seed)
    rows = sweep(
        given.manifest,
        given.config,
        given.out,
        tried,
        metric=given.metric,
        at_once=given.at_once,
        address=given.cluster,
    )
    for name, value, error in rows:
        print(f"{'failed' if value is None else f'{value:.4f}':>8}  {name}  {error}")


if __name__ == "__main__":
    run_main(main)
