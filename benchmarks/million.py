"""A million entries through `predict` on two local Ray workers, killed on the way and resumed, then evaluated.

Slides cost nothing: each is a function behind the Image protocol that answers 64 x 64 grey pixels, and the model, a
CNN of three layers that sees them whole, next to nothing. What is measured is all the rest: reading the manifest,
sending entries to workers and results back, parts, the table, and memory. Every command runs in a process of its own,
whose peak memory counts.

    python benchmarks/million.py --work FOLDER [--entries 1000000] [--workers 2] [--results FILE]

The last table is a PREDICTION, not a measurement: ten petabytes of slides on a thousand GPUs, from what the driver
takes for an entry here, what `make demo` reads of a slide of a gigapixel, and what the table itself says is assumed.

`predict` is killed (SIGKILL) when a third of the entries is done, and started again; that each entry is in the parts
and the table once is checked. "resumed" is the time from the start of the second process to its first new part, Ray's
start included; the sole process that writes parts is the driver.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pyarrow import csv, parquet
from torch import Tensor

import cluster
from nested_ats import Image
from pipeline.config import parse_config
from pipeline.data.manifest import Entry, read_manifest
from pipeline.files import write_json
from pipeline.interrupt import run_main
from pipeline.results import predict as predicting
from pipeline.results.classifier import Classifier
from pipeline.results.evaluate import evaluate
from pipeline.results.parts import RECEIPT, part_files
from pipeline.results.predictions import PARTS
from pipeline.results.report import report
from pipeline.results.table import TABLE
from pipeline.training.train import train, versions
from storage import write_pyramid
from storage.read.source import ReadStatistics

RESULTS = Path(__file__).parent / "results" / "million.json"
SIDE = 64
CALLS = 3000

# Of the prediction. By `make demo` (docs/measurements.md), four draws of a scene of 1.07 gigapixels:
REQUESTS, READ_MB = 135, 19.3
# Assumed:
SLIDES, SLIDE_GB = 10_000_000, 1.0  # ten petabytes
GPUS = 1000
PATCHES, PATCHES_A_SECOND = 128, 1000  # four draws of 32; a large vision transformer on a GPU of today
LATENCY_S, AT_ONCE = 0.05, 8  # of a request; how many a worker has under way (`pipeline.results.classifier`)
PREFIX_REQUESTS = 5500  # a second from each prefix of S3, as Amazon documents
GPU_GBIT = 25  # of network for each GPU


class Grey(Image):
    """An image that is nowhere."""

    shapes = ((SIDE, SIDE),)
    downsamples = (1.0,)
    identity = None
    statistics = ReadStatistics()
    slides = ()

    def read(self, level: int, boxes: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        """Return grey boxes, (N, 3, h, w)."""
        return torch.full((len(boxes), 3, *boxes[0, 2:].tolist()), 128, dtype=torch.uint8)


class Costless(Classifier):
    """Classifies without a slide."""

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[Any]:  # noqa: ARG002 - all are alike
        """Open nothing."""
        yield Grey()


def make_run(folder: Path) -> None:
    """Train the smallest model that there is."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(8):
        path = folder / f"{number}.ome.zarr"
        write_pyramid(path, rng.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8))
        entries.append(Entry(slide_id=str(number), path=str(path), label=("no", "yes")[number % 2], split="train"))
    model = {"kind": "cnn", "encoder": "lenet", "features": 4}
    values = {"model": model, "train": {"epochs": 1}, "predict": {"draws": 1}}
    train(entries, parse_config(values, "benchmark"), folder / "run", device="cpu")


def make_manifest(path: Path, count: int) -> None:
    """Write a manifest of slides in a bucket, two of a case, as CSV, and as Parquet in row groups."""
    with path.open("w") as file:
        file.write("slide_id,path,label,case_id\n")
        for number in range(count):
            label = ("no", "yes")[number % 2]
            place = f"s3://bucket/slides/{number % 1000:03}/slide-{number:07}.ome.zarr"
            file.write(f"slide-{number:07},{place},{label},case-{number // 2:06}\n")
    parquet.write_table(csv.read_csv(path), path.with_suffix(".parquet"), row_group_size=65_536)


def predict(work: Path, workers: int) -> None:
    """Classify all entries."""
    predicting.Classifier = Costless  # type: ignore[attr-defined]
    entries = read_manifest(work / "manifest.parquet")
    predicting.predict(entries, work / "run", work / "test", address="local", workers=workers, device="cpu")


def send_each(_: Path, workers: int) -> None:
    """Send items that are done at once to workers, one by one, as slides that take a second are sent."""
    for _outcome in cluster.run_tasks(lambda: abs, range(CALLS), address="local", workers=workers):
        pass


STEPS: dict[str, Callable[[Path, int], object]] = {
    "csv": lambda work, _: read_manifest(work / "manifest.csv"),
    "parquet": lambda work, _: read_manifest(work / "manifest.parquet"),
    "calls": send_each,
    "predict": predict,
    "evaluate": lambda work, _: evaluate(work / "test"),
    "report": lambda work, _: report(work / "run", work / "test", work / "report.html"),
}


class Step:
    """A step in a process of its own, which tells seconds, those of its processor, and its peak memory at the end."""

    def __init__(self, name: str, work: Path, workers: int) -> None:
        self.began = time.monotonic()
        words = [sys.executable, __file__, "--step", name, "--work", str(work), "--workers", str(workers)]
        self.process = psutil.Popen(words, stdout=subprocess.PIPE, text=True)

    def end(self) -> dict[str, float]:
        """Wait for it."""
        out, _ = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(self.process.returncode)
        told: dict[str, float] = json.loads(out.splitlines()[-1])
        return told


def run_step(name: str, work: Path, workers: int) -> None:
    """Do a step and tell what it took, imports left out."""
    began, used = time.monotonic(), time.process_time()
    STEPS[name](work, workers)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    told = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - used}
    print(json.dumps({**told, "peak_mb": int(peak.split()[1]) / 1e3}))


def rows_in(folder: Path) -> int:
    """Count the rows of the parts that are there."""
    return sum(parquet.read_metadata(path).num_rows for path in part_files(folder))


def wait_for(step: Step, parts: Path, count: int) -> float:
    """Wait until the parts have so many rows; the seconds since the step began."""
    while step.process.poll() is None and rows_in(parts) < count:
        time.sleep(0.2)
    return time.monotonic() - step.began


def predict_twice(work: Path, count: int, workers: int) -> dict[str, Any]:
    """Predict, kill it, and go on; see that nothing is lost or done twice."""
    parts = work / "test" / PARTS
    first = Step("predict", work, workers)
    started = wait_for(first, parts, 1)
    killed = wait_for(first, parts, count // 3)
    first.process.kill()
    first.process.wait()
    kept = rows_in(parts)
    second = Step("predict", work, workers)
    resumed = wait_for(second, parts, kept + 1)
    told = second.end()
    receipts = np.concatenate([parquet.read_table(path, columns=[RECEIPT])[RECEIPT] for path in part_files(parts)])
    ids = parquet.read_table(work / "test" / f"{TABLE}.parquet", columns=["slide_id", "status"])
    wanted = parquet.read_table(work / "manifest.parquet", columns=["slide_id"])
    sound = len(receipts) == len(set(receipts.tolist())) == count and ids["slide_id"] == wanted["slide_id"]
    if not sound or set(ids["status"].to_pylist()) != {"ok"}:
        raise SystemExit("entries were lost or done twice")
    return {
        "entries_a_second": kept / (killed - started),
        "killed_with": kept,
        "resumed_after_s": resumed,
        "parts": len(part_files(parts)),
        "mb_of_parts": sum(path.stat().st_size for path in part_files(parts)) / 1e6,
        "second_process": told,
    }


def worker_cost(work: Path) -> dict[str, float]:
    """Milliseconds of one processor that a worker takes for an entry: all, and the model's part of it."""
    from pipeline.results.settings import prediction_settings

    classifier = Costless(prediction_settings(work / "run", device="cpu"))
    entries = [Entry(slide_id=str(number), path="") for number in range(500)]
    spent = []
    for entry in entries:
        began = time.thread_time()
        classifier(entry)
        spent.append(time.thread_time() - began)
    return {"worker_ms": 1e3 * float(np.median(spent))}


def measure(work: Path, count: int, workers: int) -> dict[str, Any]:
    """Do all steps; what they took."""
    make_run(work)
    make_manifest(work / "manifest.csv", count)
    found: dict[str, Any] = {"entries": count, "workers": workers, **worker_cost(work)}
    for name in ("csv", "parquet", "calls"):
        found[name] = Step(name, work, workers).end()
    found["predict"] = predict_twice(work, count, workers)
    for name in ("evaluate", "report"):
        found[name] = Step(name, work, workers).end()
    found["report"]["mb_of_page"] = (work / "report.html").stat().st_size / 1e6
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    return found | {"versions": versions() | about}


def show(found: dict[str, Any]) -> None:
    """Print what was measured against what was wanted."""
    predicted, after = found["predict"], found["predict"]["second_process"]
    print(f"\n{found['entries']} entries, {found['workers']} Ray workers, load {found['versions']['load']:.1f}")
    print(f"  a worker takes {found['worker_ms']:.2f} ms of a processor for an entry")
    for name in ("csv", "parquet"):
        step = found[name]
        print(f"  manifest, {name:8}{step['seconds']:7.1f} s, {step['cpu_seconds']:.1f} of them computing", end="")
        print(f", peak {step['peak_mb']:.0f} MB" + (" (wanted: 5 s for a million)" if name == "csv" else ""))
    print(f"  predict          {predicted['entries_a_second']:7.0f} entries/s (wanted: 500)")
    print(f"  resumed after    {predicted['resumed_after_s']:7.1f} s (wanted: 30), {predicted['killed_with']} done")
    print(f"  driver           {after['peak_mb']:7.0f} MB (wanted: 1000), {after['cpu_seconds']:.0f} s computing")
    print(f"  parts            {predicted['parts']:7} files, {predicted['mb_of_parts']:.0f} MB")
    for name in ("evaluate", "report"):
        step = found[name]
        print(f"  {name:17}{step['seconds']:7.1f} s, peak {step['peak_mb']:.0f} MB (wanted: 1000)")


def print_model(found: dict[str, Any]) -> None:
    """Print what a large run would take, and which part of it would be the first that is busy all the time."""
    call_ms = 1e3 * found["calls"]["cpu_seconds"] / CALLS
    gpu_s = PATCHES / PATCHES_A_SECOND
    slide_s = gpu_s + REQUESTS * LATENCY_S / AT_ONCE
    each = math.ceil(slide_s / gpu_s)
    rates = {
        f"the GPUs, {each} workers on each": GPUS / gpu_s,
        "the driver, one call a slide": 1e3 / call_ms,
        f"the network, {GPU_GBIT} Gbit/s for each GPU": GPUS * GPU_GBIT * 1e9 / 8 / (READ_MB * 1e6),
        "a bucket whose slides have one prefix": PREFIX_REQUESTS / REQUESTS,
        "the same with 1000 prefixes": 1000 * PREFIX_REQUESTS / REQUESTS,
    }
    print(f"\nPREDICTION, not measured: {SLIDES} slides of {SLIDE_GB:g} GB on {GPUS} GPUs")
    print(f"  measured: {REQUESTS} requests and {READ_MB} MB a slide, {call_ms:.2f} ms of the driver a call")
    print(f"  assumed: {PATCHES} patches, {PATCHES_A_SECOND}/s, {1e3 * LATENCY_S:g} ms a request, {AT_ONCE} at once")
    print(f"  so a slide takes {gpu_s:.2f} s of a GPU and {slide_s:.2f} s in all, and of the slides", end="")
    print(f" {SLIDES * READ_MB / 1e6:.0f} TB are read")
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        print(f"  {name:44}{rate:10.0f} slides/s {SLIDES / rate / 3600:10.1f} h")


def main() -> None:
    """Measure, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for all files: 1 GB for a million")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, help=f"to keep what was measured, as {RESULTS.name} is")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        run_step(chosen.step, chosen.work, chosen.workers)
        return
    chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        found = measure(Path(folder), chosen.entries, chosen.workers)
    show(found)
    print_model(found)
    if chosen.results:
        write_json(chosen.results, found)


if __name__ == "__main__":
    run_main(main)
