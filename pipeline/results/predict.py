"""``predict``: classify slides with a trained model, in this process or on a pool of workers.

Each slide's result is a file of its own, written whole as the slide finishes; the table is made of them at the end.
Running the command again classifies only what is missing.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cluster
from nested_ats import (
    Image,
    ImageModel,
    ImpossibleWeightsError,
    ModelConfig,
    Prediction,
    UniformConfig,
    UntrustedEncoderError,
    inspect_model,
    load_model,
)
from nested_ats import predict as estimate
from nested_ats.config import EncoderConfig
from pipeline.config import CacheConfig, FeaturesConfig, Precision, digest
from pipeline.data.features import use_features
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage, check_slide, draw_key, open_slide
from pipeline.data.splits import RunSplits
from pipeline.errors import DataError, UsageError
from pipeline.files import alone, file_name, make_folder, read_inside, write_atomic, write_json
from pipeline.net import Net
from pipeline.progress import progress
from pipeline.results.verdict import Observer, run_shares
from pipeline.runs import autocast, choose_device, model_folder, read_run, short
from storage import Slide

RESULTS, TABLE, ABOUT, LOCK = "slides", "predictions", "predict.json", "predict.lock"
SIGNS = ("entropy", "uniform_entropy", "background")
_LAST = ("model", "status", "error")
_COLUMNS = ("seen", "prediction", "draws", *SIGNS, "requests", "bytes_read", "seconds", *_LAST)  # and of _OF_CLASS
_OF_CLASS = ("prob_", "se_", "low_", "high_")  # of each class: probability, standard error, limits of its interval
_FORMAT = 2  # of a result: rows of before have no intervals
_ENCODED_AT_ONCE = 256  # patches of an exact evaluation


@dataclass(frozen=True)
class Settings:
    """What, besides the slide, decides a prediction."""

    model: str  # folder of the model
    device: str  # auto, cpu or cuda
    draws: int  # independent draws, averaged
    samples: tuple[int, ...]  # units drawn at each level; empty: as trained
    background: float  # of pixels off the slide
    seed: int
    target_error: float | None = None  # error to be expected at which drawing stops before that many draws
    exact: bool = False  # encode every patch of the opened regions instead of drawing among them
    precision: Precision = "float32"  # of the networks
    trust_encoder: bool = False  # import the model's encoder where it is code of the user's
    cache: CacheConfig | None = None  # of chunks fetched from URLs
    features: FeaturesConfig | None = None  # of patches, where the encoder is frozen
    model_sha256: str = ""  # which model that folder holds (`nested_ats.ModelInfo`)


def predict(
    entries: Sequence[Entry],
    run: Path,
    folder: Path,
    *,
    draws: int | None = None,
    samples: Sequence[int] = (),
    target_error: float | None = None,
    exact: bool = False,
    trust_encoder: bool = False,
    address: str = "none",
    workers: int = 1,
    device: str = "auto",
    timeout_s: float = 3600.0,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Classify slides.

    Parameters
    ----------
    entries
        Slides; labels are carried into the table where there are any.
    run
        Folder of a training run that has finished.
    folder
        Where predictions.csv, predictions.parquet and one JSON a slide go.
    draws
        Independent draws to average; by default as configured.
    samples
        Units to draw at each level instead of those trained with.
    target_error
        Error to be expected of a slide's probabilities at which it stops drawing before that.
    exact
        Encode every patch of the opened regions instead of drawing among them.
    trust_encoder
        Import the model's encoder where it is code of the user's.
    address, workers
        ``none`` for this process, else Ray workers.
    device
        ``cpu``; ``cuda``, with Ray the cluster's GPUs, shared evenly by the workers; or ``auto``: those if there are
        any.
    timeout_s
        Seconds for a slide, after which a Ray worker that hangs is replaced.
    overwrite
        Classify again what is there.

    Returns
    -------
    One row a slide, in the order of `entries`, as in the table; failed slides have an ``error``. ``split`` is the
    run's where the manifest has none, ``seen`` says whether the training has seen the slide (`RunSplits.seen`), and
    ``model`` tells which model answered.

    Raises
    ------
    UsageError
        `run` is no finished run, `samples` does not fit the model, or `folder` holds other predictions or is being
        written by another process.
    """
    settings = prediction_settings(
        run,
        draws=draws,
        samples=samples,
        target_error=target_error,
        exact=exact,
        trust_encoder=trust_encoder,
        device=device,
    )
    about = read_run(run)
    _check_columns(entries, about["classes"])
    splits, model = RunSplits(about["entries"]), short(settings.model_sha256)
    entries, fingerprint = splits.fill(entries), _fingerprint(settings)
    results = make_folder(folder / RESULTS)
    with alone(folder / LOCK, "another prediction is being written there"):
        _check_folder(folder, fingerprint, overwrite=overwrite)
        facts = {"model": model, "class_shares": run_shares(about)}  # what `evaluate` wants to know of the training
        write_json(folder / ABOUT, {"settings": _plain(settings), "fingerprint": fingerprint, **facts})
        rows = {entry.slide_id: _read_result(results, entry) for entry in entries}
        tasks = cluster.run_tasks(
            partial(Classifier, settings),
            [entry for entry in entries if rows[entry.slide_id] is None],
            key=lambda entry: entry.slide_id,
            address=address,
            workers=workers,
            device=device,
            timeout_s=timeout_s,
            cost=_pixels,
        )
        with closing(tasks):
            _collect(tasks, rows, results)
        table = [
            {**_identity(entry), "seen": splits.seen(entry), **(rows[entry.slide_id] or {}), "model": model}
            for entry in entries
        ]
        write_table(folder, table)
        return table


def _collect(
    outcomes: Iterable[cluster.Outcome[Entry, Any]], rows: dict[str, dict[str, Any] | None], results: Path
) -> None:
    """Enter results in the rows and commit each to its file, as they come."""
    with progress("predict") as update:
        for outcome in outcomes:
            entry = outcome.item
            row = outcome.result or _failed(outcome.error)  # the latter where its worker was lost
            if row["status"] == "ok":
                write_json(results / f"{file_name(entry.slide_id)}.json", {"path": entry.path, **row})
            rows[entry.slide_id] = row
            update(sum(row is not None for row in rows.values()), len(rows), entry.slide_id)


class Classifier:
    """A model loaded once, that classifies one slide at a time.

    Parameters
    ----------
    settings
        Which model, and how.

    Raises
    ------
    nested_ats.ModelFileError
        The model cannot be loaded.
    UsageError
        A GPU is insisted on, and PyTorch sees none here.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.device == "cuda" and choose_device(settings.device) == "cpu":
            raise UsageError(
                f"--device cuda: PyTorch sees no GPU on {platform.node()}; install its CUDA build, or choose auto"
            )
        model, self.classes = load_model(
            Path(settings.model), expect=ImageModel, trust_encoder=settings.trust_encoder
        )
        model.config = with_samples(model.config, settings.samples)  # its weights do not depend on it
        self.settings = settings
        self.model = model.to(choose_device(settings.device))
        use_features(self.model, settings.features)
        self.observer = Observer(self.model)

    def open(self, entry: Entry) -> Slide:
        """Open a slide that has what the model reads.

        Raises
        ------
        storage.StorageError, DataError
            It cannot be opened, or has not.
        """
        slide = open_slide(entry.path, self.settings.cache)
        check_slide(slide, self.model.config, self.model.in_channels)
        return slide

    def estimate(self, entry: Entry, image: Image) -> Prediction:
        """Classify an image; equal slides and settings draw equal patches.

        Raises
        ------
        DataError
            Attention or probabilities are not finite.
        """
        settings = self.settings
        keys = [draw_key(settings.seed, "predict", entry.slide_id, i) for i in range(settings.draws)]
        with suppress(ImpossibleWeightsError), autocast(choose_device(settings.device), settings.precision):
            prediction = estimate(
                self.model,
                [image],
                torch.tensor([keys]),
                target_error=settings.target_error,
                exact=_ENCODED_AT_ONCE if settings.exact else 0,
            )
            if prediction.probabilities.isfinite().all():
                return prediction
        raise DataError(f"{entry.path}: what the model computes is not finite; has the slide pixels that are not?")

    def __call__(self, entry: Entry) -> dict[str, Any]:
        """Classify a slide and return its row of the table, without the slide's identity; it may have failed."""
        with Net() as net:
            return self._row(entry)
        return _failed(net.error)

    def _row(self, entry: Entry) -> dict[str, Any]:
        began = time.monotonic()
        with self.open(entry) as slide:
            prediction = self.estimate(entry, SlideImage(slide, background=self.settings.background))
            read = slide.statistics
        limits = (prediction.low, prediction.high)
        columns = [each[0].tolist() for each in (prediction.probabilities, prediction.standard_error, *limits)]
        probabilities = columns[0]
        return {
            "prediction": self.classes[max(range(len(probabilities)), key=probabilities.__getitem__)],
            **{
                f"{prefix}{name}": None if math.isnan(value) else value
                for prefix, column in zip(_OF_CLASS, columns, strict=True)
                for name, value in zip(self.classes, column, strict=True)
            },
            "draws": int(prediction.draws[0]),
            **self._signs(prediction),
            "requests": read.requests,
            "bytes_read": read.bytes_read,
            "seconds": round(time.monotonic() - began, 4),
            "status": "ok",
            "error": "",
        }

    def _signs(self, prediction: Prediction) -> dict[str, float | None]:
        """What tells an attention that has learned nothing (`verdict`), over the draws of one slide."""
        background, patches = self.observer.take().tolist()
        drawn = patches and not self.settings.exact  # or else patches were encoded that nobody has chosen
        uniform = torch.cat([self.observer.uniform_entropy(output) for output in prediction.outputs])
        entropy = torch.cat([output.entropy for output in prediction.outputs]).mean()
        share = background / patches if drawn else None
        return dict(zip(SIGNS, (float(entropy), float(uniform.mean()), share), strict=True))


def prediction_settings(
    run: Path,
    *,
    draws: int | None = None,
    samples: Sequence[int] = (),
    target_error: float | None = None,
    exact: bool = False,
    trust_encoder: bool = False,
    device: str = "auto",
) -> Settings:
    """Settings for a finished run, as it was configured but for what is given.

    Raises
    ------
    nested_ats.ModelFileError
        The model is damaged.
    UsageError
        `run` is no finished run, `samples` does not fit its model, or its encoder is code and not to be trusted.
    """
    about, folder = read_run(run), model_folder(run)
    try:
        model = inspect_model(folder, trust_encoder=trust_encoder)
    except UntrustedEncoderError as error:
        raise UsageError(
            f"{error.path}: its encoder is code to import, {error.encoder}; if you trust it, give --trust-encoder"
        ) from error
    with_samples(model.config, samples)
    config = about["config"]
    cache, features = (config["data"].get(name) for name in ("cache", "features"))
    return Settings(
        model=str(folder.absolute()),
        model_sha256=model.sha256,
        device=device,
        draws=draws or config["predict"]["draws"],
        samples=tuple(samples),
        background=config["data"]["background"],
        seed=config["seed"],
        target_error=target_error or config["predict"].get("target_error"),
        exact=exact or config["predict"].get("exact", False),
        precision=config["predict"].get("precision", "float32"),
        trust_encoder=trust_encoder,
        cache=cache and CacheConfig(**cache),
        features=features and FeaturesConfig(**features),
    )


def with_samples(config: EncoderConfig, samples: Sequence[int]) -> EncoderConfig:
    """Return the configuration of a model with another budget.

    Raises
    ------
    UsageError
        There is not one positive number for each level.
    """
    if not samples:
        return config
    match config:
        case ModelConfig() as old if len(samples) == len(old.levels) and min(samples) > 0:
            drawn = zip(old.levels, samples, strict=True)
            return replace(old, levels=tuple(replace(level, samples=n) for level, n in drawn))
        case UniformConfig() as old if len(samples) == 1 and samples[0] > 0:
            return replace(old, samples=samples[0])
        case old:
            levels = len(old.levels) if isinstance(old, ModelConfig) else int(isinstance(old, UniformConfig))
            raise UsageError(f"--samples: the model draws at {levels} levels; give that many positive numbers")


def _failed(error: str | None) -> dict[str, Any]:
    """Row of a slide that failed."""
    return {"status": "failed", "error": error}


def _pixels(entry: Entry) -> int:
    """Pixels of a slide in a folder, for the largest to start first; 0 of others, whose size takes a request."""
    with Net():
        if os.path.isdir(entry.path):
            with Slide(entry.path) as slide:
                return math.prod(slide.shape_yx)
    return 0


def write_table(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write predictions.csv and predictions.parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    # The identity comes first and the status last, whatever the first row has.
    names.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / f"{TABLE}.csv", text.getvalue())
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), buffer)
    write_atomic(folder / f"{TABLE}.parquet", buffer.getvalue().to_pybytes())


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Rows of the table that `predict` wrote.

    Raises
    ------
    UsageError
        There is none, or it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / f"{TABLE}.parquet"
    try:
        rows: list[dict[str, Any]] = parquet.read_table(pa.BufferReader(read_inside(folder, path.name))).to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {path.name} here; give the --out of nested-ats predict") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not a Parquet file ({reason}); run nested-ats predict again") from error
    return rows


def table_digest(folder: Path) -> str:
    """Short hash of the table that `read_predictions` reads: tells whether it is the one that was evaluated."""
    return digest(read_inside(folder, f"{TABLE}.parquet").hex())


def _fingerprint(settings: Settings) -> str:
    return digest({**_plain(settings), "model": "", "device": "", "format": _FORMAT})


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON values, but for what is kept where, which decides nothing but time."""
    values = asdict(replace(settings, cache=None, features=None))
    del values["features"]  # which predictions of before do not have
    return values


def _check_folder(folder: Path, fingerprint: str, *, overwrite: bool) -> None:
    about = read_about(folder)
    same = about.get("fingerprint") == fingerprint
    there = list((folder / RESULTS).glob("*.json"))
    if there and not same and not overwrite:
        raise UsageError(
            f"{folder}: holds predictions of another model or other settings; give another --out, or --overwrite"
        )
    if overwrite:
        # The table too: stopped from here on, a run must not leave one that is not of these settings.
        for path in (*there, folder / f"{TABLE}.csv", folder / f"{TABLE}.parquet"):
            path.unlink(missing_ok=True)


def _read_result(results: Path, entry: Entry) -> dict[str, Any] | None:
    """Return an earlier result of this slide; none where there is none, a damaged one, or one of another file."""
    result = _read_object(results, f"{file_name(entry.slide_id)}.json")
    return result if result is not None and result.pop("path", None) == entry.path else None


def _read_object(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads(read_inside(folder, name))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_about(folder: Path) -> dict[str, Any]:
    """What `predict` says of the predictions in a folder; empty where there is nothing."""
    return _read_object(folder, ABOUT) or {}


def _identity(entry: Entry) -> dict[str, str]:
    own = {"slide_id": entry.slide_id, "case_id": entry.case_id, "label": entry.label, "split": entry.split}
    return own | dict(entry.extra)


def _check_columns(entries: Sequence[Entry], classes: Sequence[str]) -> None:
    """See that no column that a manifest brings along has the name of one of the table's own.

    What begins with prob_ would be taken for a class, too; columns such as low_grade are the user's own.
    """
    own = {*_COLUMNS, *(prefix + name for prefix in _OF_CLASS for name in classes)}
    for name in dict.fromkeys(name for entry in entries for name in entry.extra):
        if name in own or name.startswith("prob_"):
            raise UsageError(f"manifest: column {name} would be lost, as predictions have one too; rename it")
