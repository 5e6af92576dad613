"""Diabetic retinopathy on the fundus photographs of IDRiD: how much of a photograph is to be looked at.

Questions. *referable*: is the retinopathy of grade 0, or of 2 and above (grade 1 is left out)? Area under the ROC
curve. *grades*: which of five? Quadratic kappa of an ordinal target. Photographs have half their size, 2144 x 1424
pixels, and are in the official split, without byte-identical pairs.

Methods. *ATS-5*, *ATS-10*, *ATS-25*: so many tiles of 128 x 128 pixels by attention on downsample 8. *nested*: 8
regions by downsample 16, then 25 tiles by downsample 4; *nested-100*: 16, then 100. All these are tested by four, two
and one draws. *Deep MIL*: gated attention over all tiles. *CNN*: the whole photograph at half the scale. All have the
same MobileNetV2 of ImageNet, *frozen*, or *trained* as a whole by steps a thirtieth as long, as that of the CNN is.

All train for the same number of epochs on all training images, and nothing is chosen by test images. Frozen features
are kept and shared in training; a test reads and encodes all that it looks at. A piece is written to the result file
when it is done, goes on where it was interrupted, and a rerun does only what is missing. Seconds of training are
those of a method that finds what earlier ones have encoded; those of a test image are whole.

    OMP_NUM_THREADS=1 python benchmarks/retinopathy.py --data ../shared/data --work FOLDER [--questions referable]
        [--methods ATS-25 ...] [--encoders frozen trained] [--seeds 0 1 2] [--results FILE] [--show] [--quick]
"""

from __future__ import annotations

import argparse
import os
import shutil
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from made_with import made_with, print_versions
from rivals import read
from rivals_run import counted_pixels
from study import BACKGROUND, TILE, WEIGHTS, make_slides, referable

from pipeline.config import Config, parse_config
from pipeline.data.manifest import Entry
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.results.evaluate import evaluate
from pipeline.results.predict import predict
from pipeline.runs import read_metrics
from pipeline.training.train import train

RESULTS = Path(__file__).parent / "results" / "retinopathy_cpu.json"
REFERABLE, GRADES = QUESTIONS = ("referable", "grades")
MEASURES = {REFERABLE: "auc", GRADES: "quadratic_kappa"}
SAMPLING = ("ATS-5", "ATS-10", "ATS-25", "nested", "nested-100")
METHODS = (*SAMPLING, "Deep MIL", "CNN")
DRAWS = (4, 2, 1)  # of a test image, by methods that sample
FROZEN, TRAINED = ENCODERS = ("frozen", "trained")
EPOCHS = 20
PIXELS = 2144 * 1424
NAMES = ("question", "method", "encoder", "seed")  # of a piece
_NESTED = {"nested": (8, 25), "nested-100": (16, 100)}  # regions and tiles


def configure(question: str, method: str, encoder: str, seed: int, weights: Path, epochs: int) -> Config:
    """Return the configuration of a piece."""
    model: dict[str, Any] = {"encoder": {"name": "mobilenet_v2", "weights": str(weights)}}
    course: dict[str, Any] = {"epochs": epochs, "batch_size": 4, "sampling": "balanced"}
    if method == "CNN":
        model |= {"kind": "cnn", "downsample": 2}
        course |= {"learning_rate": 1e-4, "augment": {"flip": True}, "parts": 4}
    else:
        frozen = encoder == FROZEN
        model |= {"patch_size": TILE, "trainable": "none" if frozen else "all", "standardise": frozen}
        course |= {"learning_rate": 3e-3 if frozen else 1e-4, "early_samples": 1}
        if method == "Deep MIL":
            model |= {"kind": "deepmil", "stride": TILE, "attention": "gated"}
            course |= {"parts": 4}
        else:
            model |= {"levels": levels_of(method)}
        if not frozen:
            course |= {"augment": {"flip": True}, "parts": 4}
    settings = {
        "seed": seed,
        "model": model,
        "train": course,
        "data": {"background": BACKGROUND["idrid"]},
        "target": {"kind": "ordinal" if question == GRADES else "classes"},
    }
    return parse_config(settings, f"{question}, {method}, {encoder}")


def levels_of(method: str) -> list[dict[str, Any]]:
    """Return the levels of a method that samples."""
    networks = {"channels": [16, 16]}
    if method not in _NESTED:
        return [{"downsample": 8, "stride": TILE // 8, "samples": int(method.removeprefix("ATS-")), **networks}]
    regions, tiles = _NESTED[method]
    return [
        {"downsample": 16, "stride": 4, "group": 4, "samples": regions, **networks},
        {"downsample": 4, "size": 64, "stride": 16, "samples": tiles, **networks},
    ]


def photographs(question: str, data: Path, folder: Path) -> list[Entry]:
    """Photographs as pyramids, made where they are missing, with the labels of a question."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = make_slides("idrid grades", data, folder)
    return entries if question == GRADES else referable(entries)


def one_piece(
    question: str, method: str, encoder: str, seed: int, data: Path, work: Path, *, quick: bool
) -> dict[str, Any]:
    """Train and test, and return the figures."""
    entries, epochs = photographs(question, data, work / "idrid"), EPOCHS
    if quick:
        entries, epochs = entries[::25], 1
    config = configure(question, method, encoder, seed, (data / WEIGHTS).absolute(), epochs)
    folder = work / "runs" / f"{question}-{method.replace(' ', '-')}-{encoder}-{seed}"
    os.environ["XDG_CACHE_HOME"] = str(work / "kept")  # features that trainings share
    train(entries, config, folder / "run", device="cpu", fail_fast=True)
    held = [entry for entry in entries if entry.split == "test"]
    tests = [one_test(question, held, folder, draws) for draws in (DRAWS if method in SAMPLING else (1,))]
    seconds = sum(line["seconds"] for line in read_metrics(folder / "run"))
    return {"training_seconds": round(seconds, 1), "tests": tests}


def one_test(question: str, held: list[Entry], folder: Path, draws: int) -> dict[str, Any]:
    """Test a finished run by so many draws of each photograph."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "kept")  # a test reads and encodes what it looks at, once
    shutil.rmtree(folder / "kept", ignore_errors=True)
    with counted_pixels() as pixels:
        rows = predict(held, folder / "run", folder / "test", device="cpu", draws=draws, overwrite=True)
    shutil.rmtree(folder / "kept", ignore_errors=True)
    if failed := [row["error"] for row in rows if row["status"] != "ok"]:
        raise SystemExit(failed[0])
    told = evaluate(folder / "test")
    measure = MEASURES[question]
    return {
        "draws": draws,
        "measure": measure,
        "value": round(told[measure]["value"], 4),
        "interval_95": [round(end, 4) for end in told[measure]["interval_95"] or ()],
        "accuracy": round(told["accuracy"]["value"], 4),
        "photographs": len(rows),
        "bytes": round(mean(row["bytes_read"] for row in rows)),
        "pixels": round(sum(pixels) / len(rows) / PIXELS, 4),
        "test_seconds": round(median(row["seconds"] for row in rows), 4),
    }


def show(pieces: list[dict[str, Any]]) -> None:
    """Print a table a question: medians over seeds, and the interval that so many photographs leave to the first."""
    every = [piece | test for piece in pieces for test in piece["tests"]]
    for question in QUESTIONS:
        own = [test for test in every if test["question"] == question]
        if not own:
            continue
        print(f"\n{question}: {own[0]['photographs']} photographs to test on, {MEASURES[question]}")
        print(
            f"{'method':10}{'encoder':>9}{'draws':>6}{'seeds':>6}{'[95 %, first seed]':>32}{'accuracy':>10}", end=""
        )
        print(f"{'MB read':>9}{'pixels':>8}{'s/test image':>14}{'training s':>12}")
        for key in product(METHODS, ENCODERS, DRAWS):
            if group := [test for test in own if (test["method"], test["encoder"], test["draws"]) == key]:
                print(line(group))
    print_versions(pieces)


def line(group: list[dict[str, Any]]) -> str:
    """One line of the table."""
    middle = {name: median(piece[name] for piece in group) for name in group[0] if isinstance(group[0][name], float)}
    interval = ", ".join(f"{end:.3f}" for end in group[0]["interval_95"])
    words = f"{group[0]['method']:10}{group[0]['encoder']:>9}{group[0]['draws']:6}{len(group):6}"
    words = f"{words}{middle['value']:12.3f} [{interval}]"
    words = f"{words:63}{middle['accuracy']:10.3f}{median(piece['bytes'] for piece in group) / 1e6:9.2f}"
    return words + f"{middle['pixels']:8.1%}{middle['test_seconds']:14.3f}{middle['training_seconds']:12.0f}"


def main() -> None:
    """Do the pieces that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with idrid-half and weights")
    parser.add_argument("--work", type=Path, help="folder for pyramids, features and runs: 9 GB")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: twenty photographs and one epoch")
    chosen = parser.parse_args()
    if not chosen.show and not (chosen.data and chosen.work):
        parser.error("--data and --work are needed")
    if chosen.quick and chosen.work:
        chosen.work = chosen.work / "quick"
        chosen.results = chosen.work / "retinopathy.json"
    wanted = [
        key
        for key in product(chosen.questions, chosen.methods, chosen.encoders, chosen.seeds)
        if key[1:3] != ("CNN", FROZEN)
    ]
    for key in wanted if not chosen.show else ():
        if key not in {tuple(piece[name] for name in NAMES) for piece in read(chosen.results)}:
            found = one_piece(*key, chosen.data, chosen.work, quick=chosen.quick)
            print(f"{key}: {found}", flush=True)
            piece = {**dict(zip(NAMES, key, strict=True)), **found, "versions": made_with()}
            write_json(chosen.results, [*read(chosen.results), piece])
    show(read(chosen.results))


if __name__ == "__main__":
    run_main(main, RESUMABLE)
