"""Training and prediction on one and two Ray workers against this process alone, recovery, and a model of more.

Every worker is held to one processor core and one thread. A run's start is left out: training is timed by its steps
after the first epoch, prediction from the moment at which every worker has done a slide. Variants take turns.

    python benchmarks/cluster_throughput.py [--quick]

The last table is a PREDICTION from what was measured here and from the stated network, not a measurement.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import math
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import cluster
from nested_ats import Classes, build_model
from pipeline.config import Config, parse_config, plain
from pipeline.data.manifest import Entry, plain_entries
from pipeline.data.slides import SlideImage
from pipeline.interrupt import run_main
from pipeline.results.classifier import Classifier
from pipeline.results.settings import Settings, prediction_settings
from pipeline.runs import read_metrics
from pipeline.training.train import train
from pipeline.training.trainer import train_worker
from storage import processors, write_pyramid

CLASSES = ["bar", "box"]
BANDWIDTH = 100e9 / 8  # bytes a second between GPUs' nodes: one 100 Gbit/s adapter
LATENCY = 20e-6  # seconds of a message between nodes
GPU = 50.0  # assumed: how many times as fast as one core here a GPU computes
READERS = 8  # threads of a worker that read, as in `pipeline.training.trainer`


@dataclass(frozen=True)
class Measured:
    """Of training on one core: computing and reading for a slide, relative scatter of steps, size of the gradient."""

    compute_s: float
    fetch_s: float
    scatter: float
    gradient_bytes: int


def make_config(epochs: int, batch: int) -> Config:
    """Two levels, 64 patches of 50 x 50 for a slide."""
    levels = [
        {"downsample": 16, "samples": 8, "stride": 4, "channels": [8, 8]},
        {"downsample": 4, "samples": 8, "size": 64, "stride": 8, "channels": [8, 8]},
    ]
    model = {"levels": levels, "patch_size": 50, "features": 64}
    training = {"epochs": epochs, "batch_size": batch, "checkpoint_minutes": 60}
    return parse_config({"seed": 1, "model": model, "train": training}, "benchmark")


def make_slides(folder: Path, count: int) -> list[Entry]:
    """Pyramids of 1024 x 1024 pixels: noise, and a bright spot of one of two shapes."""
    rng = np.random.default_rng(0)
    entries = []
    for i in range(count):
        pixels = rng.integers(0, 60, (3, 1024, 1024), dtype=np.uint8)
        y, x = rng.integers(64, 900, 2)
        height, width = ((60, 20), (35, 35))[i % 2]
        pixels[:, y : y + height, x : x + width] = 230
        path = folder / f"{i}.ome.zarr"
        write_pyramid(path, pixels, mpp=0.5)
        entries.append(Entry(slide_id=str(i), path=str(path), label=CLASSES[i % 2], split="train"))
    return entries


@contextmanager
def one_core(number: int) -> Iterator[None]:
    """Hold this process, with all threads that it starts, to one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def train_on_one_core(context: cluster.Context, arguments: Mapping[str, Any]) -> list[float]:
    """Train, and return the seconds of all steps after the first epoch."""
    epochs, ends = arguments["config"]["train"]["epochs"], []
    with one_core(context.rank):
        train_worker(context, arguments, lambda done, total, _: ends.append((done, total, time.perf_counter())))
    first = ends[-1][1] // epochs
    times = [end for done, _, end in ends if done >= first]
    return [after - before for before, after in pairwise(times)]


def predictor(settings: Settings, claims: str) -> Classifier:
    """A classifier on the next core that no other worker has claimed."""
    core = 0
    while True:
        try:
            os.close(os.open(f"{claims}/{core}", os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            core += 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)
    return Classifier(settings)


def step_seconds(folder: Path, entries: Sequence[Entry], config: Config, workers: int) -> list[float]:
    """Seconds of every step; 0 workers: in this process, without Ray."""
    folder.mkdir(parents=True)
    arguments = {
        "config": plain(config),
        "entries": plain_entries(entries),
        "target": Classes(tuple(CLASSES)).plain,
        "channels": 3,
    }
    seconds: list[float] = cluster.fit(
        train_on_one_core,
        {**arguments, "folder": str(folder)},
        address="local" if workers else "none",
        workers=max(1, workers),
        device="cpu",
    )
    return seconds


def slides_a_second(folder: Path, entries: Sequence[Entry], settings: Settings, workers: int) -> float:
    """Slides classified a second once every worker is at work."""
    folder.mkdir(parents=True)
    make = partial(predictor, settings, str(folder))
    ends = []
    for outcome in cluster.run_tasks(make, entries, address="local", workers=workers):
        if outcome.error:
            raise RuntimeError(outcome.error)
        ends.append(time.perf_counter())
    warm = 2 * workers
    return (len(ends) - warm) / (ends[-1] - ends[warm - 1])


def recovery_seconds(folder: Path, entries: Sequence[Entry], config: Config) -> float:
    """Seconds from a worker's death to the end of the next epoch, without those of the epoch itself."""
    times: list[float] = []

    def kill_and_watch() -> None:
        _wait_for_epochs(folder, 2)
        [worker, *_] = [p for p in psutil.Process().children(recursive=True) if "_TrainingWorker.run" in _command(p)]
        worker.kill()
        times.append(time.perf_counter())
        _wait_for_epochs(folder, 3)
        times.append(time.perf_counter())

    thread = threading.Thread(target=kill_and_watch)
    thread.start()
    train(entries, config, folder, address="local", workers=2, device="cpu")
    thread.join()
    return times[1] - times[0] - float(read_metrics(folder)[2]["seconds"])


def _command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):  # it has ended
        return str(process.cmdline())
    return ""


def _wait_for_epochs(folder: Path, number: int) -> None:
    while len(read_metrics(folder)) < number:
        time.sleep(0.01)


def measure_parts(folder: Path, entries: Sequence[Entry], config: Config) -> Measured:
    """Split the step of one process into computing and reading; reads count the processor time of their threads."""
    original, spent = SlideImage.read, []

    def timed(self: SlideImage, level: int, boxes: torch.Tensor) -> torch.Tensor:
        began = time.thread_time()
        pixels = original(self, level, boxes)
        spent.append(time.thread_time() - began)
        return pixels

    SlideImage.read = timed  # type: ignore[method-assign]
    try:
        seconds = step_seconds(folder, entries, config, 0)
    finally:
        SlideImage.read = original  # type: ignore[method-assign]
    fetch_s = sum(spent) / (config.train.epochs * len(entries))
    parameters = build_model(config.model, in_channels=3, classes=len(CLASSES)).parameters()
    return Measured(
        compute_s=statistics.median(seconds) / config.train.batch_size - fetch_s,
        fetch_s=fetch_s,
        scatter=statistics.pstdev(seconds) / statistics.mean(seconds),
        gradient_bytes=4 * sum(parameter.numel() for parameter in parameters),
    )


def predicted_step(parts: Measured, workers: int, batch: int) -> float:
    """Seconds of a step with `batch` slides on each of `workers` GPUs.

    The larger of computing and reading, which overlap; times what the slowest of the workers takes longer than the
    mean one (normal scatter); plus the all-reduce, which does not overlap.
    """
    own = batch * max(parts.compute_s / GPU, parts.fetch_s / READERS)
    slowest = 1 + parts.scatter * math.sqrt(2 * math.log(workers))
    return own * slowest + all_reduce(workers, parts.gradient_bytes)


def all_reduce(workers: int, size: int) -> float:
    """Seconds to sum `size` bytes over a ring of workers: 2 (n - 1) messages of size / n each."""
    return 2 * (workers - 1) * (size / workers / BANDWIDTH + LATENCY)


def print_prediction(parts: Measured, batch: int) -> None:
    """Print the model of a step with more workers than there are here."""
    print(f"\nPREDICTION, not measured: a step of data-parallel training on GPUs, {batch} slides on each")
    print(f"  measured on one core: {1e3 * parts.compute_s:.1f} ms of computing and {1e3 * parts.fetch_s:.1f} ms of")
    print(
        f"  reading for a slide, steps scatter by {parts.scatter:.1%}, gradient {parts.gradient_bytes / 1e6:.2f} MB"
    )
    print(f"  assumed: a GPU computes {GPU:g} times as fast, {READERS} reading threads on cores of their own,")
    print(f"  {8 * BANDWIDTH / 1e9:g} Gbit/s and {1e6 * LATENCY:g} us between nodes")
    print(f"  {'GPUs':>4} {'step':>10} {'slides/s':>9} {'efficiency':>11} {'all-reduce of 102 MB (ResNet-50)':>34}")
    alone = predicted_step(parts, 1, batch)
    for workers in (1, 8, 64):
        step, large = predicted_step(parts, workers, batch), all_reduce(workers, 102_000_000)
        kept = f"{alone / step:.0%}"
        print(f"  {workers:4} {1e3 * step:7.1f} ms {workers * batch / step:9.0f} {kept:>11} {1e3 * large:31.1f} ms")


def main() -> None:
    """Measure all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Small and once: to see that it works.")
    args = parser.parse_args()
    slides, batch, epochs, turns = (4, 4, 2, 1) if args.quick else (32, 16, 6, 3)
    config = make_config(epochs, batch)
    print(f"{platform.machine()}, {processors()} processors, one to a worker")
    print(", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "numcodecs", "numpy")))
    with tempfile.TemporaryDirectory() as name, cluster.session("local", num_cpus=2):
        folder = Path(name)
        entries = make_slides(folder, slides)
        steps: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for turn in range(turns):
            for workers, own in steps.items():
                own += step_seconds(folder / f"train-{turn}-{workers}", entries, config, workers)
        medians = {workers: statistics.median(own) for workers, own in steps.items()}
        print(f"\ntraining, {batch} slides a step, medians of {len(steps[0])} steps in {turns} turns")
        for workers, title in ((0, "this process"), (1, "1 Ray worker"), (2, "2 Ray workers")):
            print(f"  {title:14}{medians[workers]:8.3f} s a step, {batch / medians[workers]:7.1f} slides/s")
        print(f"  2 workers / 1 worker: {medians[1] / medians[2]:.2f} (wanted: at least 1.7)")
        print(f"  --cluster local over none: {medians[1] / medians[0] - 1:+.1%} a step (wanted: at most 10 %)")

        run = folder / "run"
        train(entries, make_config(1, batch), run, device="cpu")
        settings = prediction_settings(run, draws=4 if args.quick else 6, device="cpu")
        rates: dict[int, list[float]] = {1: [], 2: []}
        many = [replace(entry, slide_id=f"{entry.slide_id}-{i}") for i in range(2) for entry in entries]
        for turn in range(turns):
            for workers, found in rates.items():
                found.append(slides_a_second(folder / f"predict-{turn}-{workers}", many, settings, workers))
        one, two = statistics.median(rates[1]), statistics.median(rates[2])
        print(f"\nprediction, {settings.draws} draws a slide, medians of {turns} turns")
        print(f"  1 worker {one:.2f}, 2 workers {two:.2f} slides/s: {two / one:.2f} (wanted: at least 1.7)")

        longer = make_config(4, batch)
        seconds = [recovery_seconds(folder / f"recover-{turn}", entries, longer) for turn in range(turns)]
        print(f"\nrecovery of two workers from a killed one: {statistics.median(seconds):.1f} s ", end="")
        print(f"(median of {turns}; from {min(seconds):.1f} to {max(seconds):.1f} s)")
        print_prediction(measure_parts(folder / "parts", entries, config), batch)


if __name__ == "__main__":
    run_main(main)
