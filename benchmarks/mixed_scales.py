"""What slides of two scanners teach: test accuracy on *signs*, trained at one scale and at two.

The scenes are those of `make demo`, 512 x 512 pixels, each scanned twice: at 0.5 micrometres per pixel as it is
drawn, and at 0.25, enlarged twice by cubic convolution. Each has noise of its own, so that a mean of the fine one
is not the coarse one again. Models train on the same scenes from the same weights, in the order that the seed says:

- *one scale*: all at 0.5;
- *two scales*: every other scene of a label at 0.25, with `model.mpp: 0.5`, by which the model sees both at 0.5;
- *two scales, not told*: the same slides without `model.mpp`, so that a level is so many pixels of whatever size.

Each model answers all test scenes twice, from their scans at 0.5 and from those at 0.25. An arm of a seed is written
to the result file when it is done, and a rerun does only what is missing.

    python benchmarks/mixed_scales.py --work FOLDER [--seeds 0 1 2] [--scenes 700 160] [--results FILE] [--show]
                                      [--quick]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from made_with import made_with, print_versions
from torch.nn import functional

from pipeline.config import Config, load_config
from pipeline.data.manifest import Entry
from pipeline.data.signs import LABELS, sign_scene
from pipeline.files import write_json
from pipeline.interrupt import RESUMABLE, run_main
from pipeline.results.predict import predict
from pipeline.training.train import train
from storage import ConvertOptions, write_pyramid

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "mixed_scales_cpu.json"
CONFIG = HERE.parent / "examples" / "signs.yaml"
COURSE = ["train.epochs=8", "train.batch_size=8", "train.early_samples=2", "train.early_share=0.625"]
SIDE, NOISE = 512, 4.0  # pixels of the coarse scan, and the noise's standard deviation in steps of 256
COARSE, FINE = 0.5, 0.25  # micrometres per pixel
SCANS = (COARSE, FINE)


class Arm(NamedTuple):
    """What a model is trained with."""

    scans: tuple[float, ...]  # of the scenes of a label, in turn
    mpp: float | None  # `model.mpp`


ARMS = {
    "one scale": Arm((COARSE,), COARSE),
    "two scales": Arm((COARSE, FINE), COARSE),
    "two scales, not told": Arm((COARSE, FINE), None),
}


def scan(path: Path, index: int, mpp: float) -> None:
    """Make one scan of a scene."""
    label = LABELS[index % len(LABELS)]
    pixels = sign_scene(index, seed=0, size_yx=(SIDE, SIDE), label=label).render(0, 0, SIDE, SIDE)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()[None]
    if mpp == FINE:
        image = functional.interpolate(image, scale_factor=2, mode="bicubic")
    noise = torch.from_numpy(np.random.default_rng([index, SCANS.index(mpp)]).normal(0, NOISE, image.shape))
    scanned = (image + noise).round().clamp(0, 255).to(torch.uint8)[0].numpy()
    # The coarse view is a level of small scenes too.
    write_pyramid(path, scanned, mpp=mpp, options=ConvertOptions(min_level_size=SIDE // 16))


def scans(folder: Path, indices: range, split: str, turns: Sequence[float]) -> list[Entry]:
    """Scans of scenes, those of a label in turn at these micrometres per pixel.

    Processes of their own make them, because glibc does not give the memory of so many arrays back.
    """
    mpps = [turns[index // len(LABELS) % len(turns)] for index in indices]
    wanted = [(folder / f"{index:04d}-{mpp}.ome.zarr", index, mpp) for index, mpp in zip(indices, mpps, strict=True)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        pool.starmap(scan, [each for each in wanted if not each[0].exists()], chunksize=100)
    return [
        Entry(slide_id=f"{index:04d}", path=str(path), label=LABELS[index % len(LABELS)], split=split)
        for path, index, _ in wanted
    ]


def one_run(arm: Arm, seed: int, numbers: tuple[int, int], work: Path, settings: list[str]) -> dict[str, Any]:
    """Train a model, and return the accuracy on the test scenes by the micrometres per pixel of their scans."""
    count, tests = numbers
    config = configuration(arm, seed, settings)
    slides = scans(work / "scans", range(count), "train", arm.scans)
    run = work / "runs" / f"{'-'.join(map(str, arm.scans))}-{arm.mpp}-{seed}"
    began = time.monotonic()
    metrics, _ = train(slides, config, run)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began), "training accuracy": metrics["accuracy"]}
    for mpp in SCANS:
        entries = scans(work / "scans", range(count, count + tests), "test", (mpp,))
        rows = predict(entries, run, run / f"of {mpp}")
        found[f"right of {mpp}"] = sum(row["prediction"] == row["label"] for row in rows)
    return found


def configuration(arm: Arm, seed: int, settings: list[str]) -> Config:
    """That of the demo, at the arm's scale."""
    scale = "null" if arm.mpp is None else arm.mpp
    return load_config(CONFIG, [*COURSE, f"model.mpp={scale}", f"seed={seed}", *settings])


def show(results: dict[str, Any]) -> None:
    """Print the table: test accuracy by the scans of the test scenes, over seeds."""
    tests = results["scenes"][1]
    print(f"\n{results['scenes'][0]} scenes to train on, {tests} to test; mean [range] over seeds")
    print(f"{'arm':24}{'seeds':>6}" + "".join(f"{f'accuracy at {mpp} um/px':>28}" for mpp in SCANS))
    for name in ARMS:
        runs = [each for each in results["runs"] if each["arm"] == name]
        if not runs:
            continue
        line = f"{name:24}{len(runs):6}"
        for mpp in SCANS:
            rates = [each[f"right of {mpp}"] / tests for each in runs]
            line += f"{f'{statistics.mean(rates):.3f} [{min(rates):.3f}, {max(rates):.3f}]':>28}"
        print(line)
    print_versions(results["runs"])


def main() -> None:
    """Do the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for slides and runs: 4 GB")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--scenes", type=int, nargs=2, default=(700, 160), help="to train on, and to test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true", help="see that it works: few scenes, one epoch")
    chosen = parser.parse_args()
    if chosen.show:
        show(json.loads(chosen.results.read_text()))
        return
    if not chosen.work:
        parser.error("--work is needed")
    (chosen.work / "scans").mkdir(parents=True, exist_ok=True)
    path = chosen.work / "quick.json" if chosen.quick else chosen.results
    numbers = (32, 8) if chosen.quick else tuple(chosen.scenes)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"scenes": list(numbers), "runs": []}
    if results["scenes"] != list(numbers):
        raise SystemExit(f"{path}: of other scenes; give another --results")
    done = {(each["arm"], each["seed"]) for each in results["runs"]}
    for seed, name in [(seed, name) for seed in chosen.seeds for name in ARMS if (name, seed) not in done]:
        found = one_run(ARMS[name], seed, numbers, chosen.work, ["train.epochs=1"] if chosen.quick else [])
        print(f"{name}, seed {seed}: {found}", flush=True)
        results["runs"].append({"arm": name, "seed": seed, **found, "versions": made_with("auto")})
        write_json(path, results)
    print(f"\npython {' '.join(sys.argv)}")
    show(results)


if __name__ == "__main__":
    run_main(main, RESUMABLE)
