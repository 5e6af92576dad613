"""Against those who look at everything: test error against bytes read, pixels and time per image; learning curves.

Tasks. *mnist-1500*, *mnist-3000*: Megapixel MNIST, which class have three of five digits, among 50 patches of noise.
*needles-256*, *needles-1024*, *needles-2048*: the class of the one whole digit among 15, 240 or 960 scraps of digits,
after Needles in Haystacks (Pawlowski et al., 2019). *idrid*: fundus photographs of half the size in the official
split, retinopathy of grade 0 against 2 and above. All images are pyramids on disk, the same for every method and
seed.

Methods. *ours*: attention sampling at two levels as the defaults have it, on photographs at one (as in `study.py`),
four draws of a test image, and one. *ours, prior*: the same where it draws among cells with something in them alone,
with wider attention networks, smaller batches, larger steps, and images and patches that move, chosen on digits of
384 x 384 pixels; not on photographs. *ours, warped*: that with patches that are turned, stretched and sheared, a
third convolution of attention, weight decay and an entropy weight that stays, likewise. *ours, curriculum*:
*ours, prior* begun on as many needles of smaller scenes, which take labels that the other methods do not have; its
time is that of all.
*the paper's*: one level, its sampling without replacement and its training, one draw (`PAPERS_COURSE`).
*Deep MIL*: attention over all patches.
*IPS*: iterative patch selection, see `rivals_ips.py`. *CNN*: the image at a half or a quarter of the scale. Those of
digits see patches of 50 pixels by the same LeNet, which is smaller than the network that IPS was published with;
those of photographs, tiles of 128 by a frozen MobileNetV2, but for the CNN, which trains all of it. IPS keeps M = 100
patches of digits and reads I = 100 at a time, 25 and 50 tiles of photographs.

A method trains for so many epochs that it sees the same number of images, whatever the set's size (`SEEN`), or for
--epochs. Nothing is chosen by test images. Blank patches are encoded once when IPS trains, which changes nothing but
time, and one by one in its test. A piece is one method of one seed on one number of images: it goes on where it was
interrupted, and is written to the result file when it is done. Peak memory is of the process since the piece began,
in which earlier pieces leave some: give one method a call to have it clean.

    OMP_NUM_THREADS=1 python benchmarks/rivals.py --data ../shared/data --work FOLDER --task mnist-1500
        [--images 250 500 1000 2000 5000] [--methods ours IPS ...] [--seeds 0 1 2] [--epochs N] [--jobs 1]
        [--results FILE] [--figure FILE] [--show] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from made_with import made_with
from rivals_data import TASKS, make_images
from rivals_run import BEFORE, CURRICULUM, METHODS, PRIOR, WARPED, folder_of, judge, run
from rivals_show import draw, show

from pipeline.allocator import keep_freed_memory
from pipeline.data.manifest import Entry
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main

RESULTS = Path(__file__).parent / "results" / "rivals_cpu.json"
SEEN = {"mnist": 60_000, "needles": 60_000, "idrid": 7_000}  # images that a training sees, repeated ones included
QUICK = (64, 16)  # images to train and to test on


def run_missing(chosen: argparse.Namespace) -> None:
    """Do the pieces of a task that the result file lacks, and add each to it."""
    keep_freed_memory()  # for IPS, as the product does for the others
    task = TASKS[chosen.task]
    chosen.work.mkdir(parents=True, exist_ok=True)
    most, tests = QUICK if chosen.quick else (max(chosen.images or [task.images]), task.tests)
    entries = make_images(chosen.task, most, tests, chosen.data, chosen.work, chosen.jobs)
    training, held = ([entry for entry in entries if entry.split == split] for split in ("train", "test"))
    methods = [each for each in chosen.methods if fits(each, chosen.task)]
    names = ("task", "images", "method", "seed", "epochs")
    sizes = sorted({min(each, len(training)) for each in chosen.images or [len(training)]})
    for seed, images, method in [(s, i, m) for s in chosen.seeds for i in sizes for m in methods]:
        epochs = 1 if chosen.quick else chosen.epochs or max(1, round(SEEN[task.kind] / images))
        key = (chosen.task, images, method, seed, epochs)
        if key not in {tuple(piece[name] for name in names) for piece in read(chosen.results)}:
            found = one_piece(*key, training[:images] + held, chosen.data, chosen.work / "runs")
            print(f"{key}: {found}", flush=True)
            piece = {**dict(zip(names, key, strict=True)), **found, "versions": made_with()}
            # Read anew: another process may have added pieces meanwhile.
            write_json(chosen.results, [*read(chosen.results), piece])


def fits(method: str, task: str) -> bool:
    """Whether there is such a method for a task."""
    digits = TASKS[task].kind != "idrid"
    return {PRIOR: digits, WARPED: digits, CURRICULUM: task in BEFORE}.get(method, True)


def one_piece(
    name: str, images: int, method: str, seed: int, epochs: int, entries: list[Entry], data: Path, runs: Path
) -> dict[str, Any]:
    """Train and test, and return the figures."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of memory begins anew
    folder = folder_of(runs, name, images, method, seed, epochs)
    seconds, tests = run(name, method, seed, epochs, entries, data, folder)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    cost = {"training_seconds": round(seconds, 1), "image_seconds": round(seconds / epochs / images, 4)}
    found, *others = [judge(TASKS[name], test) for test in tests]
    return {**found, "one_draw": others, **cost, "peak_bytes": peak}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the pieces of a result file, none where there is no file."""
    pieces: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return pieces


def main() -> None:
    """Do the pieces that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist, or with idrid-half and weights")
    parser.add_argument("--work", type=Path, help="folder for pyramids and runs: 1.5 GB a task, idrid 8 GB")
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--images", type=int, nargs="+", help="to train on; those of a smaller number come first")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="instead of those that make up the same number of images")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="draw what there is into this file")
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: 64 images and one epoch")
    chosen = parser.parse_args()
    if not chosen.show and not (chosen.data and chosen.work and chosen.task):
        parser.error("--data, --work and --task are needed")
    if chosen.quick and chosen.work:
        chosen.work, chosen.images = chosen.work / "quick", None
        chosen.results = chosen.work / "quick.json"
    if not chosen.show:
        chosen.data = chosen.data.absolute()
        run_missing(chosen)
        print(f"\npython {' '.join(sys.argv)}")
    show(read(chosen.results))
    if chosen.figure:
        draw(read(chosen.results), chosen.figure)


if __name__ == "__main__":
    run_main(main, RESUMABLE)
