"""A gigapixel that is learned, not only classified: trained on scenes of 32,768 x 32,768 pixels, one label each.

The scenes (`gigapixel_scenes`) are rendered where they are looked at and never stored. Their label is the number on
their signs, one of three; 201 to train on, 102 to test.

*villages*, groups of signs that show at every magnification, among groups of decoys: from scratch.

- *nested 3* and *nested 2*: attention at downsamples 64, 16 and 4, or 64 and 16;
- *flat*: one level at downsample 16, all of which it reads, with as many patches;
- *uniform*: as many patches, drawn anywhere; *CNN*: the whole at downsample 64.

*needles*, 24 lone signs among 8,000 decoys of the same mean colour: levels begin at downsample 16.

- *curriculum*: a model of 402 scenes of 512 x 512 pixels, with which one of 201 scenes of 4096 x 4096 begins
  (`--init`), with which one of 201 gigapixels begins; *small* and *medium* are the first two, tested on gigapixels;
- *scratch*: the last without the others; *uniform*; *CNN* at downsample 16.

Also measured is a training step of *nested 3* against one of 8192 x 8192 pixels by levels of its own size. Times are
those of a machine that may do other work; processor seconds stand beside them. A run is kept when it is done, one
that is stopped goes on, and a rerun does only what is missing.

    python benchmarks/gigapixel.py --work FOLDER [--tasks villages needles] [--arms ARM ...] [--seeds 0]
                                   [--steps] [--results FILE] [--show] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from gigapixel_scenes import LABELS, Scene
from made_with import made_with, print_versions

from nested_ats import levels_for
from pipeline.config import Config, parse_config
from pipeline.data import samples
from pipeline.data.manifest import Entry
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.results.intervals import wilson
from pipeline.results.predict import predict
from pipeline.runs import read_metrics
from pipeline.training.train import train

RESULTS = Path(__file__).parent / "results" / "gigapixel.json"
SIDE, MIDDLE, MEDIUM, SMALL = 32_768, 8_192, 4_096, 512
TRAINING, TESTS = 201, 102
PATCHES, BATCH = 32, 6
LEARNED = 0.9  # of the training scenes, within an epoch


class Arm(NamedTuple):
    """What is trained, and on what."""

    model: dict[str, Any]
    epochs: int
    side: int = SIDE
    scenes: int = TRAINING
    init: str = ""  # the arm whose model it begins with


def _levels(*downsamples: int) -> list[dict[str, Any]]:
    """Levels of attention: the whole, and then what is drawn above, down to cells of 32 pixels."""
    last = downsamples[-1]
    levels: list[dict[str, Any]] = []
    for number, each in enumerate(downsamples):
        level: dict[str, Any] = {"downsample": each, "samples": PATCHES if each == last else PATCHES // 2}
        level |= {"stride": 32 // each, "group": 1} if each == last else {"stride": 2, "group": 4}
        levels.append(level | ({"size": 32} if number else {}) | {"channels": [8, 8]})
    return levels


def _nested(*downsamples: int) -> dict[str, Any]:
    return {"levels": _levels(*downsamples)}


_UNIFORM: dict[str, Any] = {"kind": "uniform", "samples": PATCHES, "cell": 32}


def _cnn(downsample: int) -> dict[str, Any]:
    return {"kind": "cnn", "encoder": "resnet8", "features": 16, "downsample": downsample}


ARMS: dict[str, dict[str, Arm]] = {
    "villages": {
        "nested 3": Arm(_nested(64, 16, 4), 30),
        "nested 2": Arm(_nested(64, 16), 30),
        "flat": Arm(_nested(16), 10),
        "uniform": Arm(_UNIFORM, 30),
        "CNN": Arm(_cnn(64), 30),
    },
    "needles": {
        "small": Arm(_nested(16, 4), 8, side=SMALL, scenes=402),
        "medium": Arm(_nested(16, 4), 6, side=MEDIUM, init="small"),
        "curriculum": Arm(_nested(16, 4), 3, init="medium"),
        "scratch": Arm(_nested(16, 4), 3),
        "uniform": Arm(_UNIFORM, 40),
        "CNN": Arm(_cnn(16), 3),
    },
}


def scenes(task: str, side: int, numbers: range, split: str) -> list[Entry]:
    """Return scenes as entries of a manifest."""
    found = [Scene(task, number, side) for number in numbers]
    return [Entry(slide_id=f"{each.location}", path=each.location, label=each.label, split=split) for each in found]


def configure(arm: Arm, seed: int, epochs: int) -> Config:
    """Return the configuration of an arm."""
    course: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "sampling": "balanced"}
    course |= {"early_samples": 2 if arm.init else 4, "early_share": 0.6}
    values = {"seed": seed, "model": arm.model, "train": course, "data": {"background": 0.5}}
    return parse_config(values, "gigapixel")


def train_and_test(task: str, arm: Arm, seed: int, place: Path, first: Path | None, *, quick: bool) -> dict[str, Any]:
    """Train an arm, and test it on gigapixels; see `ARMS`."""
    count, tests, epochs = (12, 6, 1) if quick else (arm.scenes, TESTS, arm.epochs)
    run = place / "run"
    began, used = time.monotonic(), time.process_time()
    train(scenes(task, arm.side, range(count), "train"), configure(arm, seed, epochs), run, init=first)
    took, computed = time.monotonic() - began, time.process_time() - used
    held = scenes(task, SIDE, range(10_000, 10_000 + tests), "test")
    rows = predict(held, run, place / "answers")
    if failed := [row["error"] for row in rows if row["status"] != "ok"]:
        raise SystemExit(failed[0])
    return {
        "seconds": round(took),
        "cpu_seconds": round(computed),
        **_course(run, count),
        "right": sum(row["prediction"] == row["label"] for row in rows),
        "tests": tests,
        "read": statistics.fmean(row["bytes_read"] for row in rows) / (3 * SIDE**2),
        "seconds_a_scene": statistics.median(row["seconds"] for row in rows),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def _course(run: Path, count: int) -> dict[str, Any]:
    """How a training went: its updates, until which of them it had learned, and the seconds of one."""
    metrics = read_metrics(run)
    steps = math.ceil(count / BATCH)
    learned = next((line["epoch"] * steps for line in metrics if line["accuracy"] >= LEARNED), None)
    late = [line["seconds"] / steps for line in metrics[len(metrics) // 2 :]]
    return {
        "updates": len(metrics) * steps,
        "learned_after": learned,
        "seconds_a_step": statistics.median(late),
        "training_accuracy": [round(line["accuracy"], 3) for line in metrics],
    }


def step_ratio(place: Path) -> dict[str, Any]:
    """Measure the steps of villages of a gigapixel against those of 64 megapixels, in turn, five times."""
    seconds: dict[int, list[float]] = {SIDE: [], MIDDLE: []}
    for turn in range(5):
        for side, found in seconds.items():
            arm = Arm(_nested(*(int(level.downsample or 1) for level in levels_for((side, side)))), 2)
            run = place / f"{side}-{turn}"
            entries = scenes("villages", side, range(6 * BATCH), "train")
            train(entries, configure(arm, 0, arm.epochs), run, overwrite=True)
            found.append(read_metrics(run)[-1]["seconds"] / 6)
    ratios = [large / small for large, small in zip(seconds[SIDE], seconds[MIDDLE], strict=True)]
    return {"seconds_a_step": {str(side): each for side, each in seconds.items()}, "ratio": statistics.median(ratios)}


def interval(right: int, tests: int) -> str:
    """Accuracy with its 95 % interval."""
    low, high = wilson(right / tests, tests)
    return f"{right / tests:.3f} [{low:.3f}, {high:.3f}]"


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    for task, arms in ARMS.items():
        print(f"\n{task}: scenes of {SIDE} x {SIDE} pixels, {PATCHES} patches a draw, chance {1 / len(LABELS):.2f}")
        print(f"{'arm':14}{'seed':>5}{'test accuracy [95 %]':>24}{'pixels read':>13}{'s/scene':>9}", end="")
        print(f"{'updates':>9}{'to 90 %':>9}{'s/step':>8}{'CPU s':>8}{'peak MB':>9}")
        for name in arms:
            for each in [each for each in results["runs"] if (each["task"], each["arm"]) == (task, name)]:
                print(f"{name:14}{each['seed']:5}{interval(each['right'], each['tests']):>24}", end="")
                print(f"{each['read']:13.4%}{each['seconds_a_scene']:9.2f}", end="")
                print(f"{each['updates']:9}{each['learned_after'] or 'never':>9}", end="")
                print(f"{each['seconds_a_step']:8.2f}{each['cpu_seconds']:8}{each['peak_mb']:9}")
    print(
        f"\nDrawn anywhere, the patches of a scene show a lone sign in {hit_by_chance():.2%} of the scenes of needles"
    )
    if "step" in results:
        print(f"A step of a gigapixel takes {results['step']['ratio']:.2f} times one of 64 megapixels (wanted: 1.25)")
    print_versions(results["runs"])


def hit_by_chance() -> float:
    """Probability that one of the patches that are drawn anywhere in a scene of needles shows most of a sign."""
    cells = (SIDE // 32) ** 2
    return 1 - (1 - 24 * 4 / cells) ** PATCHES  # a sign of 41 pixels lies in 4 cells of 32, about


def main() -> None:
    """Do the runs that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for runs")
    parser.add_argument("--tasks", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--steps", action="store_true", help="measure the step alone, on a quiet machine")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: 12 scenes, one epoch")
    chosen = parser.parse_args()
    if chosen.show:
        show(json.loads(chosen.results.read_text()))
        return
    if not chosen.work:
        parser.error("--work is needed")
    samples._open_one = lambda entry, *_, **__: Scene.at(entry.path)  # type: ignore[assignment]
    chosen.work.mkdir(parents=True, exist_ok=True)
    path = chosen.work / "quick.json" if chosen.quick else chosen.results
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    if chosen.steps:
        results["step"] = step_ratio(chosen.work / "steps") | {"versions": made_with("auto")}
        write_json(path, results)
    else:
        run_missing(chosen, results, path)
    print(f"\npython {' '.join(sys.argv)}")
    show(results)


def run_missing(chosen: argparse.Namespace, results: dict[str, Any], path: Path) -> None:
    """Do the runs that are missing; an arm comes after the one that it begins with."""
    done = {(each["task"], each["arm"], each["seed"]) for each in results["runs"]}
    wanted = [(task, name, seed) for seed in chosen.seeds for task in chosen.tasks for name in ARMS[task]]
    for task, name, seed in wanted:
        arm = ARMS[task][name]
        if (task, name, seed) in done or (chosen.arms and name not in chosen.arms):
            continue
        place = _place(chosen.work, task, name, seed, quick=chosen.quick)
        first = _place(chosen.work, task, arm.init, seed, quick=chosen.quick) / "run" if arm.init else None
        found = train_and_test(task, arm, seed, place, first, quick=chosen.quick)
        print(f"{task}, {name}, seed {seed}: {found}", flush=True)
        results["runs"].append({"task": task, "arm": name, "seed": seed, **found, "versions": made_with("auto")})
        write_json(path, results)


def _place(work: Path, task: str, name: str, seed: int, *, quick: bool) -> Path:
    return work / f"{'quick-' if quick else ''}{task}-{name.replace(' ', '-')}-{seed}"


if __name__ == "__main__":
    run_main(main, RESUMABLE)
