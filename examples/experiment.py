"""The engine of the paper's experiments (section 4): train each method several times, test it, and print the table.

An experiment is data: what its methods share, how each differs, and what the paper's table says of it. Each run goes
through the pipeline's own `train`, `predict` and `evaluate`. Runs that have finished are not done again and one that
was stopped goes on, so one command carries an experiment through interruptions; `out/results.json` grows by each.

    out/METHOD/seed-0/run/            the training run (pipeline.runs)
    out/METHOD/seed-0/predictions/    of the last stage
    out/METHOD/seed-0/points.json     loss and test error after each stage
    out/METHOD/seed-0/attention/      maps of the slides whose attention is kept, SLIDE-EPOCH.npz
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import AttentionMap

from nested_ats import ImageModel, load_model
from nested_ats.maps import attention_map
from nested_ats.profiling import Cost, step_cost
from pipeline.config import Config, digest, parse_config, plain
from pipeline.data.manifest import Entry, read_manifest
from pipeline.data.slides import SlideImage, open_slide
from pipeline.errors import UsageError
from pipeline.files import file_name, make_folder, write_json
from pipeline.results.classifier import Classifier
from pipeline.results.evaluate import evaluate
from pipeline.results.predict import predict
from pipeline.results.settings import prediction_settings
from pipeline.runs import MODEL, choose_device, read_metrics, read_run
from pipeline.training.course import PAPERS_COURSE
from pipeline.training.train import train, versions

RESULTS, POINTS = "results.json", "points.json"
_COST_REPEATS = 20  # steps timed
_COLUMNS = (
    "Train loss: cross-entropy as trained (of augmented images, class weights in it, entropy term not), mean over the "
    "last epoch. Time and memory: forward and backward pass of one image, reading its patches included; memory is "
    "torch's, beyond that of the weights."
)


@dataclass(frozen=True)
class Paper:
    """A row of the paper's table as printed there; empty where it has none."""

    train_loss: str = ""
    test_error: str = ""
    time: str = ""  # per sample, forward and backward
    memory: str = ""  # per sample, peak


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str  # as the paper calls it: ATS-10, U-10, CNN, Deep MIL
    scale: str  # ours: 0.25/1 is the attention's and the patches'; the paper's may be another
    settings: dict[str, Any]  # plain configuration values (pipeline.config), merged over the experiment's base
    paper: Paper = Paper()

    @property
    def key(self) -> str:
        """What tells it from the other methods: some share a name and differ in scale."""
        return f"{self.name} {self.scale}".strip()


@dataclass(frozen=True)
class Experiment:
    """Methods to be compared on one data set."""

    name: str
    title: str  # what is run, in words that make the table honest: data, sizes, epochs
    base: dict[str, Any]  # plain configuration values that all methods share; lists are replaced whole
    methods: tuple[Method, ...]
    runs: int  # independent runs of each method, with seeds 0, 1, ...
    stages: tuple[int, ...] = ()  # epochs after which a model is tested too; after its last one it always is

    def config(self, method: Method, seed: int) -> Config:
        """Resolve the configuration of one run.

        Raises
        ------
        UsageError
            A key or value is wrong.
        """
        base = merge({"train": PAPERS_COURSE}, self.base)
        return parse_config(merge(merge(base, method.settings), {"seed": seed}), f"{self.name}, {method.key}")


@dataclass(frozen=True)
class Point:
    """A model after some epochs of its training."""

    epoch: int
    seconds: float  # of training, until then
    train_loss: float  # cross-entropy, mean over the last epoch
    test_error: float  # share of test images classified wrongly


@dataclass(frozen=True)
class Result:
    """One run of one method."""

    method: str  # Method.key
    seed: int
    title: str  # of the experiment
    fingerprint: str  # of its configuration, stages and data
    points: tuple[Point, ...]  # by epoch; the last is the result
    sample_seconds: float  # median time of a forward and backward pass at batch 1, patch extraction included
    peak_bytes: int  # peak memory of such a pass
    machine: str
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def last(self) -> Point:
        """The model as trained."""
        return self.points[-1]


def run_experiment(
    experiment: Experiment,
    manifest: Path,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    attention_of: Sequence[str] = (),
    device: str = "auto",
    on_results: Callable[[list[Result]], None] = lambda _: None,
) -> list[Result]:
    """Train and test every method `runs` times, but for the runs whose results are there.

    Parameters
    ----------
    experiment
        What to run.
    manifest
        Slides with labels. Their splits are the manifest's or, where it has none, drawn anew for each seed.
    out
        Folder of the experiment, made where it is missing.
    only
        Names (or names and scales, `Method.key`) of the methods to run; all by default.
    attention_of
        Slides whose attention is kept after every stage of the runs of seed 0; see `attention_maps`.
    device
        ``auto``, ``cpu`` or ``cuda``.
    on_results
        Is called after every run, with what is returned at the end.

    Returns
    -------
    All results of this experiment's methods found in or added to ``out/results.json``.

    Raises
    ------
    pipeline.errors.PipelineError, storage.StorageError
        A slide cannot be used, a configuration is wrong, `only` names no method, or `out` holds other runs.
    """
    entries = read_manifest(manifest, labelled=True)
    methods = [m for m in experiment.methods if only is None or m.name in only or m.key in only]
    if not methods:
        names = ", ".join(method.key for method in experiment.methods)
        raise UsageError(f"{experiment.name}: no method {', '.join(only or ())}; there are {names}")
    path = make_folder(out) / RESULTS
    for seed in range(experiment.runs):
        for method in methods:
            mark = _fingerprint(experiment, method, seed, entries)
            if any(result.fingerprint == mark for result in _found(path)):
                continue
            print(f"\n{experiment.name}: {method.key}, seed {seed}", file=sys.stderr, flush=True)
            folder = run_folder(out, method.key, seed)
            kept = attention_of if seed == 0 else ()
            points = _train_in_stages(experiment, method, seed, entries, folder, kept, device)
            cost = _measure(folder, device)
            about = machine(device), versions()
            result = Result(method.key, seed, experiment.title, mark, points, cost.seconds, cost.peak_bytes, *about)
            # Read anew: another process may have added runs of other methods meanwhile.
            others = [other for other in _found(path) if (other.method, other.seed) != (method.key, seed)]
            _write_results(path, [*others, result])
            on_results(_of(experiment, path))
    return _of(experiment, path)


def take_results(out: Path, saved: Path) -> None:
    """Take over the results of a file that `out` lacks, as of runs on a machine that is gone.

    Raises
    ------
    UsageError
        The file is there and holds no results.
    """
    own = _found(make_folder(out) / RESULTS)
    known = {(result.method, result.seed) for result in own}
    more = [result for result in _found(saved) if (result.method, result.seed) not in known]
    _write_results(out / RESULTS, [*own, *more])


def measure_again(out: Path, device: str = "auto") -> list[Result]:
    """Measure time and memory of all finished runs of a folder anew, on the same machine when it is quiet.

    Raises
    ------
    UsageError
        The folder has no results.
    """
    results = []
    for result in read_results(out / RESULTS):
        cost = _measure(run_folder(out, result.method, result.seed), device)
        results.append(replace(result, sample_seconds=cost.seconds, peak_bytes=cost.peak_bytes))
    _write_results(out / RESULTS, results)
    return results


def read_results(path: Path) -> list[Result]:
    """Results of a ``results.json``.

    Raises
    ------
    UsageError
        It cannot be read or is none.
    """
    try:
        rows = json.loads(path.read_text())
        return [Result(**{**row, "points": tuple(Point(**point) for point in row["points"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: not the results of an experiment: {error}") from error


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Folder of one run of the method with this `Method.key`."""
    return out / file_name(method.replace("/", "-")) / f"seed-{seed}"


def attention_maps(out: Path, method: str, slide_id: str, *, seed: int = 0) -> dict[int, AttentionMap]:
    """Kept attention maps of a slide, by epoch; `method` is a `Method.key`.

    Raises
    ------
    UsageError
        None were kept.
    """
    folder = run_folder(out, method, seed) / "attention"
    parts = {path: path.stem.rpartition("-") for path in folder.glob("*.npz")}
    paths = {int(epoch): path for path, (slide, _, epoch) in parts.items() if slide == file_name(slide_id)}
    if not paths:
        raise UsageError(f"{folder}: no attention of {slide_id}; run the experiment with it in attention_of")
    maps = {}
    for epoch in sorted(paths):
        with np.load(paths[epoch]) as arrays:
            maps[epoch] = AttentionMap(arrays["weights"], float(arrays["pitch"]))
    return maps


def table(experiment: Experiment, results: Sequence[Result]) -> str:
    """Lay the paper's table beside ours, as Markdown, with what was measured and run, on which machines and versions.

    Losses and errors are means over runs with the standard error of the mean; time and memory are medians over runs.
    """
    lines = [
        "| Method | Scale | Train loss | *paper* | Test error | *paper* | Time/sample | *paper* | Memory/sample | *paper* | Epochs | Runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in experiment.methods:
        mine = [result for result in results if result.method == method.key]
        loss, error, seconds, memory, epochs, runs = _row(mine) if mine else [""] * 6
        paper = method.paper
        cells = [method.name, method.scale, loss, paper.train_loss, error, paper.test_error]
        cells += [seconds, paper.time, memory, paper.memory, epochs, runs]
        lines.append(f"| {' | '.join(cells)} |")
    shown = {method.key for method in experiment.methods}
    notes = [
        f"{result.title}; {result.machine}; {', '.join(f'{k} {v}' for k, v in result.versions.items())}"
        for result in results
        if result.method in shown
    ]
    return "\n".join([*lines, "", _COLUMNS, *(f"Run: {note}" for note in dict.fromkeys(notes))])


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and standard error of the mean, as in the paper's tables; a single value has no error."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def machine(device: str = "auto") -> str:
    """Name the processor that computes: the GPU, or the CPU with the number of threads used."""
    if choose_device(device) == "cuda":
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; anything else in `over`, lists included, replaces what `base` has."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _of(experiment: Experiment, path: Path) -> list[Result]:
    keys = {method.key for method in experiment.methods}
    return [result for result in _found(path) if result.method in keys]


def _found(path: Path) -> list[Result]:
    return read_results(path) if path.exists() else []


def _write_results(path: Path, results: Sequence[Result]) -> None:
    write_json(path, [asdict(result) for result in results])


def _fingerprint(experiment: Experiment, method: Method, seed: int, entries: Sequence[Entry]) -> str:
    data = [(entry.slide_id, entry.label, entry.split) for entry in entries]
    return digest([method.key, plain(experiment.config(method, seed)), experiment.stages, data])


def _train_in_stages(
    experiment: Experiment,
    method: Method,
    seed: int,
    entries: Sequence[Entry],
    folder: Path,
    attention_of: Sequence[str],
    device: str,
) -> tuple[Point, ...]:
    """Train up to each stage in turn, as one run that is extended, and test the model after each."""
    config = experiment.config(method, seed)
    mark = _fingerprint(experiment, method, seed, entries)
    points = _read_points(folder, mark)
    stages = sorted({epoch for epoch in experiment.stages if epoch < config.train.epochs} | {config.train.epochs})
    for epoch in stages[len(points) :]:
        stage = config.model_copy(update={"train": config.train.model_copy(update={"epochs": epoch})})
        train(entries, stage, folder / "run", device=device, fail_fast=True)
        points.append(_test(folder, epoch, device))
        _keep_attention(folder, entries, attention_of, epoch, device)
        _write_points(folder, mark, points)
    return tuple(points)


def _read_points(folder: Path, mark: str) -> list[Point]:
    """Points of a run that was begun; a folder of another configuration, other stages or other data is refused."""
    if not (folder / POINTS).exists():
        _write_points(make_folder(folder), mark, [])
    found = json.loads((folder / POINTS).read_text())
    if found["fingerprint"] != mark:
        raise UsageError(
            f"{folder}: holds a run of another configuration, other stages or other data; remove it or choose --out"
        )
    return [Point(**point) for point in found["points"]]


def _write_points(folder: Path, mark: str, points: Sequence[Point]) -> None:
    write_json(folder / POINTS, {"fingerprint": mark, "points": [asdict(point) for point in points]})


def _test_entries(folder: Path) -> list[Entry]:
    """Test slides of a run; the run knows its splits."""
    return [Entry(**row) for row in read_run(folder / "run")["entries"] if row["split"] == "test"]


def _test(folder: Path, epoch: int, device: str) -> Point:
    rows = predict(_test_entries(folder), folder / "run", folder / "predictions", device=device, overwrite=True)
    failed = [row["error"] for row in rows if row["status"] != "ok"]
    if failed:
        raise UsageError(f"{folder}: {len(failed)} test images could not be classified; the first: {failed[0]}")
    accuracy = evaluate(folder / "predictions")["accuracy"]["value"]
    metrics = read_metrics(folder / "run")
    return Point(epoch, sum(line["seconds"] for line in metrics), metrics[-1]["cross_entropy"], 1 - accuracy)


def _keep_attention(folder: Path, entries: Sequence[Entry], slides: Sequence[str], epoch: int, device: str) -> None:
    """Write the attention of some slides, one draw; models that have none keep none."""
    if not slides:
        return
    classifier = Classifier(prediction_settings(folder / "run", draws=1, device=device))
    by_id = {entry.slide_id: entry for entry in entries}
    for slide_id in slides:
        with classifier.opened(by_id[slide_id]) as image:
            outputs = classifier.estimate(by_id[slide_id], image).outputs
            if outputs[0].phases:
                density, pitch = attention_map(outputs, image.shapes[0])
                place = make_folder(folder / "attention") / f"{file_name(slide_id)}-{epoch}.npz"
                np.savez(place, weights=density.numpy(), pitch=pitch)


def _measure(folder: Path, device: str) -> Cost:
    """Time and peak memory of a training step on one test image, reading included."""
    model, _ = load_model(folder / "run" / MODEL, expect=ImageModel)
    background = read_run(folder / "run")["config"]["data"]["background"]
    with open_slide(_test_entries(folder)[0].path) as slide:
        image = SlideImage(slide, background=background)
        return step_cost(model.to(choose_device(device)), [image], repeats=_COST_REPEATS)


def _row(results: Sequence[Result]) -> list[str]:
    last = [result.last for result in results]
    return [
        mean_and_error([point.train_loss for point in last]),
        mean_and_error([point.test_error for point in last]),
        f"{1000 * statistics.median(result.sample_seconds for result in results):.1f} ms",
        f"{statistics.median(result.peak_bytes for result in results) / 1e6:,.0f} MB",
        ", ".join(str(epoch) for epoch in sorted({point.epoch for point in last})),
        str(len(results)),
    ]
