"""What each choice does to learning: test error at equal patches and epochs, and epochs to 90 % accuracy.

Tasks. *mnist*: Megapixel MNIST at 384 x 384 with 8 noise patches; one level, 10 patches of 50 pixels out of 2304
cells; in MNIST's own split where there are both pairs of files, else 8,000 of the test digits, and the other 2,000.
*signs*: the scenes of ``make demo``, 1024 x 1024; 8 regions, then 8 patches of 64 pixels out of 4096 leaves.
*needles*: one digit of a class among 15 scraps of digits, 256 x 256, two levels. *colon*: the 100 published images of
500 x 500 pixels, enlarged twice, in ten folds, by a frozen MobileNetV2; 25 of 64 tiles of 128 pixels. *slides*: sixty
slides with planted nests (`examples/sixty_slides.py`) in three folds, by the same network, as examples/histology.yaml
has it.
Arms differ from ``default`` in what their name says and in nothing else: within a seed they start from the same
weights (but ``uniform``, which has no attention) and see the same images in the same order, by the course of training
of `pipeline.training.course`. Images are the same for all seeds, and held in memory.

"epochs to 90 %" is the first epoch in which the training accuracy, over the draws that trained, is 90 % or more, in
the median fold. The test draws once per image, as the paper does, and four times, as `predict` does; folds are
pooled. The authors' gradient is for one level, so only *mnist* has such an arm.

A run is written to the result file when it ends, and a rerun does only what is missing. Each takes one thread.

    python benchmarks/learning.py [--digits ../shared/data/mnist] [--colon .../Classification] [--slides FOLDER]
                                  [--weights mobilenet_v2-b0353104.pth] [--tasks mnist signs] [--arms default ...]
                                  [--seeds 0 1 2] [--device cuda] [--jobs 2] [--results FILE] [--show] [--quick]
    python benchmarks/learning.py --compare FILE FILE
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from learning_arms import ARMS, FROZEN, TASKS, TRAINED
from learning_data import Data, Places, Task, make_data
from learning_run import Place, run
from learning_show import compare, show
from made_with import made_with
from megapixel_mnist import digit_files, name_digits

from pipeline.allocator import keep_freed_memory
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.sections import TrainConfig

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "learning_cpu.json"


def grid(names: Sequence[str], arms: Sequence[str], seeds: tuple[int, ...]) -> list[tuple[int, str, str]]:
    """Every (seed, task, arm) in the order in which they are run."""
    return [(seed, name, arm) for arm in arms for seed in seeds for name in names if name in ARMS[arm].tasks]


def run_missing(
    tasks: dict[str, Task],
    names: Sequence[str],
    arms: Sequence[str],
    seeds: tuple[int, ...],
    place: Place,
    path: Path,
    jobs: int,
) -> None:
    """Do the runs that the result file lacks, so many at once, and add each to it."""
    settings: dict[str, Any] = {name: asdict(task) for name, task in tasks.items()}
    settings |= {
        "digits": name_digits(digit_files(place.data.digits)),
        "course": TrainConfig().model_dump(mode="json"),
    }
    settings = json.loads(json.dumps(settings))
    results = read(path) or {"settings": settings, "runs": []}
    if other := differing(results["settings"], settings, names):
        raise SystemExit(f"{path}: {', '.join(other)} of other settings; give another --results")
    done = {(each["seed"], each["task"], each["arm"]) for each in results["runs"]}
    missing = [each for each in grid(names, arms, seeds) if each not in done]
    made = {
        name: make_data(name, tasks[name], place.data, jobs) for name in dict.fromkeys(each[1] for each in missing)
    }
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), set_up, (tasks, made, place)) as pool:
        running = [pool.submit(run_one, *each) for each in missing]
        for ended in as_completed(running):
            results = read(path) or results  # another process may have added runs meanwhile
            results["runs"].append(ended.result())
            write_json(path, results)


def differing(kept: dict[str, Any], settings: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return which settings that matter to these tasks are not those of the result file."""
    # A key that came later is at its default, which changes nothing.
    kept = {**kept, "course": TrainConfig(**kept["course"]).model_dump(mode="json")}
    compared = [*names, "course", *(["digits"] if not {"mnist", "needles"}.isdisjoint(names) else [])]
    return [each for each in compared if kept[each] != settings[each]]


_given: dict[str, Any] = {}  # of a process that runs arms; what was there before it was forked is shared


def set_up(tasks: dict[str, Task], made: dict[str, Data], place: Place) -> None:
    """Begin a process that runs arms."""
    torch.set_num_threads(1)
    keep_freed_memory()
    _given.update(tasks=tasks, made=made, place=place)


def run_one(seed: int, name: str, arm: str) -> dict[str, Any]:
    """One run, as it is kept in the result file."""
    place = _given["place"]
    title = f"{name}, {arm}, seed {seed}"
    found = run(arm, _given["tasks"][name], _given["made"][name], seed, place, title)
    print(f"{title}: test error {found['test_error_1']:.1%}, {found['seconds']:.0f} s", flush=True)
    return {"seed": seed, "task": name, "arm": arm, **found, "versions": made_with(place.device)}


def read(path: Path) -> dict[str, Any] | None:
    """Return what the result file holds."""
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    """Do the runs that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="folder of MNIST's files; scikit-learn's digits without")
    parser.add_argument("--colon", type=Path, help="the published Classification folder")
    parser.add_argument("--slides", type=Path, help="what examples/sixty_slides.py wrote")
    parser.add_argument("--weights", type=Path, help="of torchvision's MobileNetV2, for colon and slides")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TRAINED))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--compare", type=Path, nargs="+", help="print one table of these result files, run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: few images, two epochs, one seed")
    chosen = parser.parse_args()
    if chosen.compare:
        compare([json.loads(path.read_text()) for path in chosen.compare])
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tasks, seeds, path = TASKS, tuple(chosen.seeds), chosen.results
        if chosen.quick:
            tasks = {
                name: replace(task, epochs=2) if task.folds else replace(task, epochs=2, train=64, test=32)
                for name, task in TASKS.items()
            }
            seeds, path = (0,), Path(folder) / "quick.json"
        if not chosen.show:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = Places(chosen.digits, chosen.colon, chosen.slides)
            if chosen.weights is None and not {*FROZEN}.isdisjoint(chosen.tasks):
                parser.error("--weights is needed for colon and slides")
            place = Place(data, chosen.weights, chosen.device, Path(folder) / "features")
            run_missing(tasks, chosen.tasks, chosen.arms, seeds, place, path, chosen.jobs)
        print(f"\npython {' '.join(sys.argv)}")
        show(read(path) or {"settings": {name: asdict(task) for name, task in tasks.items()}, "runs": []})


if __name__ == "__main__":
    run_main(main, RESUMABLE)
