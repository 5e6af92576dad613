"""The metrics of an epoch: summed over slides and workers, put into words, and drawn as curves.

Shape letters: S slides, A answers.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from cluster import Context
from nested_ats.targets import KINDS_OF_TARGETS, Target
from pipeline.data.manifest import Entry
from pipeline.data.targets import row_of, truth
from pipeline.errors import UsageError
from pipeline.results.intervals import case_numbers
from pipeline.results.measures import measure, ranking
from pipeline.results.verdict import in_words, verdict
from pipeline.runs import CURVES, Position, read_metrics
from pipeline.sections import AnyTarget

TOTALS = ("loss", "first", "right", "entropy", "uniform_entropy", "background", "patches", "slides")
_LOSSES = dict.fromkeys(target.loss_name for target in KINDS_OF_TARGETS.values())


def means(totals: Tensor, target: Target) -> dict[str, float]:
    """Means over the slides of an epoch so far; that of background is over the drawn patches, if there are any.

    The first term of the loss goes by the target's name for it, and ``accuracy`` is there if answers are right or
    wrong.
    """
    sums = dict(zip(TOTALS, totals.tolist(), strict=True))
    background, patches, slides = (sums.pop(name) for name in ("background", "patches", "slides"))
    names = {"first": target.loss_name, "right": "accuracy"}
    found = {names.get(name, name): value / slides if slides else math.nan for name, value in sums.items()}
    if not target.countable:
        del found["accuracy"]
    return found | ({"background": background / patches} if patches else {})


def stored_share(looked_up: Tensor) -> dict[str, float]:
    """Share of patches whose features were kept, from (2,) found and looked up; empty if none was looked up."""
    found, asked = looked_up.tolist()
    return {"stored": found / asked} if asked else {}


def describe(metrics: Mapping[str, float]) -> str:
    """Describe the metrics of an epoch in a few words, for a progress bar."""
    words = [f"{in_words(name)} {metrics[name]:.3f}" for name in (*_LOSSES, "accuracy") if name in metrics]
    stored = f" {metrics['stored']:.0%} of patches stored" if "stored" in metrics else ""
    return f"{' '.join(words)} entropy {metrics['entropy']:.2f}{stored}"


def validation_figures(
    target: Target, config: AnyTarget, entries: Sequence[Entry], answers: Tensor, figure: str
) -> dict[str, float]:
    """Return the measures of validation slides that are wanted, and `ranking` with its 95 % interval, if any.

    Parameters
    ----------
    target, config
        What was answered, and where it stands in the table.
    entries
        The S slides.
    answers
        (S, A + 1): their answers, and 1 for a slide that could be read.
    figure
        The name of a measure (`TrainConfig.best_by`).
    """
    found = answers.double().cpu().numpy()
    read = [i for i, answer in enumerate(found) if answer[-1]]
    if not read:
        return {}
    outcomes = truth(target, config, [row_of(entries[i]) for i in read], raw=True).double().numpy()
    cases = case_numbers((entries[i].case_id, entries[i].slide_id) for i in read)
    measures, name = measure(target, outcomes, found[read, :-1], cases), ranking(target).name
    wanted = {f"val_{each}": measures[each]["value"] for each in (figure, name) if each in measures}
    limits = dict(zip(("low", "high"), measures[name]["interval_95"] or (), strict=False))
    wanted |= {f"val_{name}_{side}": value for side, value in limits.items()}
    return {each: value for each, value in wanted.items() if value is not None}


def judged_by_validation(metrics: Mapping[str, float], target: Target) -> bool:
    """Whether the validation slides of an epoch suffice to judge it by: on those of one class any answer is best."""
    return f"val_{ranking(target).name}" in metrics


def epoch_verdict(metrics: Mapping[str, float], target: Target, guess: float) -> str:
    """Judge an epoch's metrics in words (`verdict`), by the validation slides where they suffice.

    Parameters
    ----------
    metrics
        Metrics of the epoch.
    target
        What is answered.
    guess
        The loss, on the slides that it is judged by, of the best answer that is the same for all.
    """
    by = ranking(target)
    prefix = "val_" if judged_by_validation(metrics, target) else ""
    sides = [f"val_{by.name}_low", f"val_{by.name}_high"]
    return verdict(
        target,
        loss=metrics[f"{prefix}{target.loss_name}"],
        guess=guess,
        ranked=metrics.get(f"val_{by.name}"),
        interval=[metrics[side] for side in sides] if all(side in metrics for side in sides) else None,
        entropy=metrics["entropy"],
        uniform=metrics["uniform_entropy"],
        background=metrics.get("background"),
    )


class Curves:
    """TensorBoard curves, written by rank 0, and the user's own tracker; epochs to be repeated are dropped from them.

    Parameters
    ----------
    folder, position, context
        The run, how far it has come, and the worker's place in its group.
    tracker
        ``train.tracker``: is called with the metrics of each epoch by rank 0. One that raises is warned of, once, and
        left alone from then on: what watches a training must not end it.

    Raises
    ------
    UsageError
        The tracker cannot be imported.
    """

    def __init__(self, folder: Path, position: Position, context: Context, tracker: str | None = None) -> None:
        self.writer, self.track = None, None
        if context.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.track = import_callable(tracker, "train.tracker") if tracker else None
            there = (folder / CURVES).is_dir()
            self.writer = SummaryWriter(str(folder / CURVES), purge_step=position.epoch + 1)
            for metrics in [] if there else read_metrics(folder):  # of a run that goes on from its copy
                self.write(metrics)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Add an epoch to the curves."""
        for name, value in metrics.items():
            if self.writer and name not in ("epoch", "verdict"):
                self.writer.add_scalar(name, value, int(metrics["epoch"]))
        if self.track:
            try:
                self.track(dict(metrics))
            except Exception as error:  # noqa: BLE001 - it is the user's code
                print(f"warning: train.tracker: {error!r}; it is not called again", file=sys.stderr, flush=True)
                self.track = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer:
            self.writer.close()


def import_callable(name: str, key: str) -> Callable[[dict[str, Any]], Any]:
    """Import ``package.module:callable`` of the user's; `key` names the setting in errors (UsageError)."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{key}: {name} cannot be imported ({error}); it must be on Python's path here, as in "
            "PYTHONPATH=. nested-ats train"
        ) from error
    if not callable(found):
        raise UsageError(f"{key}: {name} is no function")
    return found  # type: ignore[no-any-return]
