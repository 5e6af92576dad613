"""A study in a notebook, a dozen lines: open a cohort, split it, fit a model, predict, evaluate, plot.

    cohort = Cohort.open("labels.csv").split(test=0.25)
    model = cohort.fit("runs/first", "config.yaml")
    answers = model.predict(cohort, split="test")
    answers.evaluate()
    answers.plot()

Nothing is computed here: these are the functions of the commands, and their folders can be used by the commands too.
Each object shows itself as a table in a notebook. Errors are those of the commands (`pipeline.errors`).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from nested_ats.targets import read_target
from pipeline.config import Config, load_config, parse_config
from pipeline.data.discovery import name_slides
from pipeline.data.manifest import SPLITS, Entry, read_manifest
from pipeline.data.splits import RunSplits, assign_splits
from pipeline.errors import UsageError
from pipeline.results import report
from pipeline.results.evaluate import answered, evaluate
from pipeline.results.page import document, table
from pipeline.results.plots import curves
from pipeline.results.predict import predict
from pipeline.results.predictions import read_about, read_predictions
from pipeline.results.settings import Options
from pipeline.results.table import Rows
from pipeline.runs import read_metrics, read_run
from pipeline.training.train import train

if TYPE_CHECKING:
    from pandas import DataFrame

_SHOWN = 10  # rows of a long table


@dataclass(frozen=True, repr=False)
class Cohort:
    """Slides with their labels.

    Attributes
    ----------
    entries
        One for each slide.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def open(cls, source: str | Path | DataFrame | Sequence[str | Path]) -> Cohort:
        """Open a manifest, a DataFrame with the columns of one, or slides by their places.

        Raises
        ------
        UsageError
            It cannot be read, or has problems, which are all named (`read_manifest`).
        """
        if isinstance(source, str | Path):
            return cls(tuple(name_slides([str(source)])))
        if isinstance(source, Sequence):
            return cls(tuple(name_slides([str(place) for place in source])))
        return cls(tuple(read_manifest(source)))

    def split(self, *, test: float = 0.2, validation: float = 0.0, seed: int = 0) -> Cohort:
        """Draw a split for every slide, by case and label, unless the manifest gives them.

        Parameters
        ----------
        test, validation
            Shares of the cases, from 0 to 1.
        seed
            Equal seeds give equal splits.
        """
        return Cohort(tuple(assign_splits(self.entries, validation=validation, test=test, seed=seed)))

    def fit(
        self,
        out: str | Path,
        config: str | Path | Config | Mapping[str, Any] | None = None,
        *settings: str,
        **options: Any,
    ) -> Model:
        """Train a model, or go on with a training that was interrupted; slides that cannot be used are left out.

        Parameters
        ----------
        out
            The folder of the run.
        config
            A YAML file, a configuration or its plain values; None is the built-in one.
        settings
            Overrides such as ``"train.epochs=10"``, of a file or of the built-in configuration.
        options
            As `pipeline.training.train.train` takes them: ``device``, ``address``, ``workers``, ``overwrite``, ...
        """
        if isinstance(config, Config | Mapping):
            if settings:
                raise UsageError(f"{settings[0]}: settings override a file; change the values that are given instead")
            chosen = config if isinstance(config, Config) else parse_config(dict(config), "config")
        else:
            chosen = load_config(None if config is None else Path(config), list(settings))
        train(self.entries, chosen, Path(out), **options)
        return Model(Path(out))

    def __len__(self) -> int:
        """Return the number of slides."""
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        """Go through the slides."""
        return iter(self.entries)

    def __getitem__(self, place: int) -> Entry:
        """Return one slide."""
        return self.entries[place]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of slides by label and split."""
        found: dict[str, dict[str, int]] = {}
        for entry in self.entries:
            own = found.setdefault(entry.label or "no label", {})
            own[entry.split or "no split"] = own.get(entry.split or "no split", 0) + 1
        return found

    def __repr__(self) -> str:
        """Say how many slides and cases there are, by label."""
        labels = ", ".join(f"{sum(own.values())} {label}" for label, own in self.counts.items())
        cases = len({entry.case_id or entry.slide_id for entry in self.entries})
        return f"Cohort({len(self)} slides of {cases} cases: {labels})"

    def _repr_html_(self) -> str:
        there = {split for own in self.counts.values() for split in own}
        splits = [split for split in (*SPLITS, "no split") if split in there]
        rows = [[label, *(own.get(split, 0) for split in splits)] for label, own in self.counts.items()]
        return _titled(repr(self), table(["", *splits], rows))


@dataclass(frozen=True, repr=False)
class Model:
    """The folder of a training run.

    Attributes
    ----------
    run
        The folder, also of a run by `nested-ats train`.
    """

    run: Path

    def predict(
        self, cohort: Cohort, out: str | Path | None = None, *, split: str | None = None, **options: Unpack[Options]
    ) -> Answers:
        """Classify slides; what was classified before is not again.

        Parameters
        ----------
        cohort
            The slides.
        out
            The folder to write to; by default one in the run, called like the split.
        split
            Slides of this split only: train, val or test; by the run where the slides have none.
        options
            As `pipeline.results.settings.Options`: ``draws``, ``exact``, ``last``, ...
        """
        about = read_run(self.run)
        entries = RunSplits.of_run(about).fill(cohort.entries)
        chosen = [entry for entry in entries if split in (None, entry.split)]
        if not chosen:
            raise UsageError(f"split {split}: no slide is in it")
        folder = Path(out) if out is not None else self.run / (split or "all")
        predict(chosen, self.run, folder, **options)
        return Answers(folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Figures of each epoch."""
        return read_metrics(self.run)

    def plot(self) -> Page:
        """Plot the training over its epochs."""
        about = read_run(self.run)
        best_by = about["config"]["train"]["best_by"]
        plots = curves(self.run.name, read_target(about["target"]), self.metrics, best_by) if self.metrics else []
        return Page(document(self.run.name, [report.grid(plots)], plots=True))

    def __repr__(self) -> str:
        """Say what it answers, and how long it was trained."""
        about = read_run(self.run)
        names = ", ".join(read_target(about["target"]).names)
        return f"Model({self.run}: {about['config']['model']['kind']} of {names}, {len(self.metrics)} epochs)"

    def _repr_html_(self) -> str:
        shown = {name: each for name, each in (self.metrics or [{}])[-1].items() if isinstance(each, float)}
        return _titled(
            repr(self), table(["last epoch", ""], [[name, f"{value:.4g}"] for name, value in shown.items()])
        )


@dataclass(frozen=True, repr=False)
class Answers:
    """The folder of predictions.

    Attributes
    ----------
    folder
        The folder, also of predictions by `nested-ats predict`.
    """

    folder: Path

    @property
    def rows(self) -> Rows:
        """The table, a row a slide."""
        return read_predictions(self.folder)

    def frame(self) -> DataFrame:
        """Return the table as a pandas DataFrame (extra ``tables``)."""
        import pandas as pd

        rows = self.rows
        return pd.DataFrame({name: rows.column(name) for name in rows.names})

    def evaluate(self, **options: Any) -> Figures:
        """Compare with the labels, on slides that the training has not seen.

        Parameters
        ----------
        options
            As `pipeline.results.evaluate.evaluate` takes them: ``split``, ``include_seen``, ``by_case``, ``by``.
        """
        return Figures(evaluate(self.folder, **options))

    def plot(self, **options: Any) -> Page:
        """Plot what is true against what was answered; the options are those of `evaluate`."""
        rows, metrics = self.rows, evaluate(self.folder, **options)
        target, config = answered(read_about(self.folder), rows)
        return Page(document(self.folder.name, [report.plots_of(target, config, rows, metrics)], plots=True))

    def __repr__(self) -> str:
        """Say how many slides were answered."""
        rows = self.rows
        failed = sum(row["status"] != "ok" for row in rows)
        return f"Answers({self.folder}: {len(rows)} slides, {failed} failed)"

    def _repr_html_(self) -> str:
        rows = self.rows
        names = [name for name in rows[0] if name in ("slide_id", "label", "split", "prediction", "error")]
        names += [name for name in rows[0] if name.startswith(("prob_", "se_"))]
        shown = [[_short(row.get(name)) for name in names] for row in rows[:_SHOWN]]
        return _titled(repr(self), table(names, shown) + (f"and {len(rows) - _SHOWN} more" * (len(rows) > _SHOWN)))


class Figures(dict[str, Any]):
    """What `evaluate` has found, by name."""

    def __repr__(self) -> str:
        """Write a line for each figure."""
        return "\n".join(f"{name:18} {value}" for name, value in report.describe_metrics(self))

    def _repr_html_(self) -> str:
        return _titled(self["verdict"], table(["", ""], report.describe_metrics(self)))


@dataclass(frozen=True, repr=False)
class Page:
    """Plots, as a page that asks nothing of any other host."""

    text: str

    def save(self, path: str | Path) -> Path:
        """Write the page to a file."""
        Path(path).write_text(self.text)
        return Path(path)

    def __repr__(self) -> str:
        """Say how large it is."""
        return f"Page({len(self.text) / 1e6:.1f} MB of HTML)"

    def _repr_html_(self) -> str:
        page = html.escape(self.text)
        return f'<iframe srcdoc="{page}" title="Plots" width="100%" height="520" style="border: 0"></iframe>'


def _titled(title: str, body: str) -> str:
    return f"<div><p><b>{html.escape(title)}</b></p>{body}</div>"


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
