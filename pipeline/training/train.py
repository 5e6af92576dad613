"""``train``: from a manifest of pyramids and labels to a model."""

from __future__ import annotations

import platform
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cluster
from nested_ats.targets import Classes
from pipeline.config import Config, digest, dump_config, parse_config, plain
from pipeline.data.manifest import Entry, plain_entries
from pipeline.data.selection import Failure, Selection, select
from pipeline.data.targets import columns, row_of
from pipeline.errors import UsageError
from pipeline.files import alone, make_folder, write_atomic, write_json
from pipeline.progress import OnProgress, progress
from pipeline.results.measures import measure_names
from pipeline.runs import CONFIG, LOCK, METRICS, MODEL, RUN, STATE, clear_run, read_metrics, read_run
from pipeline.sections import ClassesTarget
from pipeline.training.epochs import describe
from pipeline.training.init import find_init
from pipeline.training.mirror import Mirror
from pipeline.training.normalize import normalized
from pipeline.training.trainer import train_worker

_COPY_TIMEOUT_S = 1200  # workers wait so long for rank 0, which may copy a state over a slow line
_PACKAGES = ("nested-ats", "torch", "zarr", "numcodecs", "tifffile", "dask", "ray")


def train(
    entries: Sequence[Entry],
    config: Config,
    folder: Path,
    *,
    address: str = "none",
    workers: int | tuple[int, int] = 1,
    device: str = "auto",
    mirror: str | None = None,
    init: Path | None = None,
    overwrite: bool = False,
    fail_fast: bool = False,
) -> tuple[dict[str, float], list[Failure]]:
    """Train a model, or go on with a run that was interrupted.

    Parameters
    ----------
    entries
        Slides with labels; a split is assigned where the manifest has none.
    config
        The resolved configuration.
    folder
        Folder of the run (see `pipeline.runs`). If it holds a run of the same configuration and slides, that goes on.
    address
        ``none`` trains in this process, ``local`` on Ray workers of this machine, else on those of a cluster.
    workers
        Number of Ray workers, or a range, of which as many start as there is room for.
    device
        ``cpu``; ``cuda``, with Ray a GPU for each worker; or ``auto``, which is ``cuda`` where that is possible.
    mirror
        URL in an object store to which the run is copied at every checkpoint, and from which it goes on.
    init
        A finished run, or the folder of a model, whose weights the training begins with (`nested_ats.take_weights`);
        all workers must see it.
    overwrite
        Start anew, whatever is in `folder` and in its copy.
    fail_fast
        Stop at the first slide that cannot be used, also later on, instead of leaving it out.

    Returns
    -------
    metrics, failures
        Metrics of the last epoch, and the slides left out.

    Raises
    ------
    UsageError
        `folder` or `mirror` holds another run, another process trains there, or labels or splits allow no training;
        or there is no model at `init`.
    nested_ats.ModelFileError
        The model at `init` has other networks, or is damaged.
    DataError
        No slide, or with `fail_fast` not every slide, can be used; or the loss became infinite.
    """
    copy = Mirror(mirror, folder) if mirror else None
    chosen = select(entries, config, fail_fast=fail_fast)
    config = chosen.config
    options: dict[str, Any] = {"mirror": mirror, "init": init, "fail_fast": fail_fast, "overwrite": overwrite}
    arguments = worker_arguments(chosen, config, folder, **options)
    fingerprint = arguments["fingerprint"]
    make_folder(folder)
    unit = "steps" if address == "none" else "epochs"
    with alone(folder / LOCK, "another training is running there"), progress("train", unit) as update:
        check_folder(folder, fingerprint, overwrite=overwrite)
        if copy:
            copy.check(fingerprint, overwrite=overwrite)
        _prepare(folder, arguments, chosen, overwrite=overwrite)
        if copy:
            copy.claim(overwrite=overwrite)
        # Workers elsewhere cannot call back; their epochs are followed in the run's folder.
        function = partial(train_worker, on_step=update) if address == "none" else train_worker
        with _follow(folder, config, update) if address != "none" else nullcontext():
            metrics, unreadable = cluster.fit(
                function,
                arguments,
                address=address,
                workers=workers,
                device=device,
                progress=copy.version if copy else partial(_replaced, folder / STATE),
                timeout_s=_COPY_TIMEOUT_S if copy else 120,
            )
    return metrics, chosen.failures + [Failure(slide_id, reason) for slide_id, reason in unreadable.items()]


def worker_arguments(
    chosen: Selection,
    config: Config,
    folder: Path,
    *,
    mirror: str | None,
    fail_fast: bool,
    init: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Arguments of `pipeline.training.trainer.train_worker`, from the parameters of `train`.

    Raises
    ------
    UsageError
        The validation slides do not have the figure that the best epoch is to be chosen by.
        Or there is no model at `init`.
    nested_ats.ModelFileError
        That is damaged.
    DataError
        No training slide can be read, where `data.normalize` wants their statistics.
    """
    _check_best_by(chosen, config)
    arguments = {
        "config": plain(config),
        "entries": plain_entries([entry for entry in chosen.entries if entry.split != "test"]),
        "target": chosen.target.plain,
        "channels": chosen.channels,
        "folder": str(folder.absolute()),
        "mirror": mirror,
        "init": init and find_init(init, chosen.target),
    }
    fingerprint = _fingerprint(config, arguments)
    if config.data.normalize:
        arguments["config"] = plain(normalized(config, chosen.entries, folder, "" if overwrite else fingerprint))
    return arguments | {"fingerprint": fingerprint, "fail_fast": fail_fast}


def _check_best_by(chosen: Selection, config: Config) -> None:
    """See that there is what the best epoch is chosen by; by the loss, the last one is kept without validation."""
    figure, rows = config.train.best_by, [row_of(entry) for entry in chosen.entries if entry.split == "val"]
    if figure == "loss":
        return
    if figure not in (known := measure_names(chosen.target)):
        raise UsageError(
            f"train.best_by: {figure} is none of a {chosen.target.kind} target: loss, {', '.join(known)}"
        )
    if not rows:
        raise UsageError(f"train.best_by: {figure} needs validation slides, and there are none; set data.validation")
    labels = {str(row[columns(config.target)[0]]) for row in rows}
    if figure == "auc" and isinstance(chosen.target, Classes) and len(labels) == 1:
        raise UsageError(
            f"train.best_by: auc needs validation slides of two classes, and all are of {labels.pop()}; take loss, a "
            "larger data.validation, or fewer folds"
        )


def _fingerprint(config: Config, arguments: dict[str, Any]) -> str:
    """Identify a run; the place of slides and the number of epochs may change and do not count."""
    told = set(columns(config.target)) - {"label"}
    learnt = [
        (
            *(row["slide_id"], row["label"], row["split"]),
            *(row["extra"].get(name, "") for name in sorted(told)),
            *(slide["slide_id"] for slide in row["slides"]),
        )
        for row in arguments["entries"]
    ]
    identity = {**arguments, "folder": "", "entries": learnt}
    del identity["mirror"]
    init = identity.pop("init")
    if init:
        identity["init"] = init["sha256"]
    if config.target == ClassesTarget():  # as of runs that know no other target
        del identity["target"]
        identity["classes"] = arguments["target"]["classes"]
    decisive = plain(config)
    if config.target == ClassesTarget():
        del decisive["target"]
    decisive["train"] |= {"epochs": 0, "checkpoint_minutes": 0, "parts": 0}
    decisive["train"].pop("tracker")  # it watches
    if config.train.augment.hed == 0:
        del decisive["train"]["augment"]["hed"]  # runs of before know no other
    decisive["data"] |= {"cache": None}
    if config.data.normalize is None:
        del decisive["data"]["normalize"]
    if config.data.unit == "slide":
        del decisive["data"]["unit"]
    if config.data.chosen is None:
        del decisive["data"]["channels"]  # the number itself is among the arguments
    if config.train.best_by == "loss":
        del decisive["train"]["best_by"]  # runs of before have no other
    del decisive["data"]["features"]  # decides only time
    decisive["model"].pop("allow_gaps", None)  # a permission, which changes no result
    identity["config"] = decisive
    return digest(identity)


def check_folder(folder: Path, fingerprint: str, *, overwrite: bool) -> None:
    """Check that a folder is empty, or that of this run, or of one to be overwritten or not yet begun.

    A run that stopped before its first state, as where the encoder's weights are missing, has nothing to lose.

    Raises
    ------
    UsageError
        The folder holds something else.
    """
    if (folder / RUN).exists():
        other = read_run(folder)["fingerprint"] != fingerprint
        if other and not overwrite and any((folder / name).exists() for name in (STATE, METRICS, MODEL)):
            raise UsageError(
                f"{folder}: holds a run of another configuration or of other slides, or some of its slides cannot be "
                "used now (see run.json); give another --out, or --overwrite to start again"
            )
    elif any(path.name != LOCK and not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise UsageError(f"{folder}: not empty and not a training run; give another --out")


def _prepare(folder: Path, arguments: dict[str, Any], chosen: Selection, *, overwrite: bool) -> None:
    """Write the description of a run into its folder."""
    if overwrite:
        clear_run(folder)
    run = {
        "fingerprint": arguments["fingerprint"],
        "target": arguments["target"],
        "channels": arguments["channels"],
        "config": arguments["config"],
        "init": arguments["init"],
        "versions": versions(),
        "entries": plain_entries(chosen.entries),
        "identities": chosen.identities,
    }
    write_json(folder / RUN, run)
    write_atomic(folder / CONFIG, dump_config(parse_config(arguments["config"], "configuration")))


def _replaced(path: Path) -> int | None:
    """Time in nanoseconds at which a file was last replaced; None if there is none."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that decide results, and the commit of this code."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    git = shutil.which("git")
    if git:
        here = Path(__file__).parent
        commit = subprocess.run(  # noqa: S603 - fixed arguments
            [git, "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        if commit.returncode == 0:
            found["commit"] = commit.stdout.strip()
    return found


@contextmanager
def _follow(folder: Path, config: Config, update: OnProgress) -> Iterator[None]:
    """Show the epochs that workers elsewhere have finished, as the run's metrics tell."""
    done = threading.Event()

    def watch() -> None:
        seen = -1
        while not done.wait(1.0):
            metrics = read_metrics(folder)
            if metrics and len(metrics) != seen:
                seen = len(metrics)
                update(seen, config.train.epochs, f"epoch {seen} {describe(metrics[-1])}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
