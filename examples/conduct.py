"""The command line of the paper's experiments: its options, the images that it prepares, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from commands import run
from experiment import (
    Experiment,
    Method,
    Result,
    measure_again,
    read_results,
    run_experiment,
    run_folder,
    table,
    take_results,
)

from pipeline.data.manifest import Entry, read_manifest, write_manifest
from pipeline.errors import PipelineError, UsageError
from pipeline.files import make_folder, write_atomic, write_json
from storage import StorageError


def command_line(description: str, out: str, *, data: str = "") -> argparse.ArgumentParser:
    """Options that every experiment has; those on published data say by `data` which folder --data is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of data, runs and results")
    parser.add_argument("--quick", action="store_true", help="small, in minutes on a CPU")
    parser.add_argument("--runs", type=int, help="independent runs of each method, instead of the paper's")
    parser.add_argument("--only", action="append", help="a method to run, by name; may be repeated")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--measure", action="store_true", help="measure time and memory of finished runs anew")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of a results.json and end")
    parser.add_argument(
        "--save", type=Path, help="folder for results, table and figures to be committed; runs that it has are done"
    )
    if data:
        parser.add_argument("--data", type=Path, help=data)
    return parser


def conduct(
    experiment: Experiment,
    chosen: argparse.Namespace,
    prepare: Callable[[], Path],
    watch: Callable[[Sequence[Entry]], Sequence[Entry]],
    draw: Callable[[Sequence[Result], Sequence[Entry], Path], None],
) -> None:
    """Do what the command line asks for: run the experiment, save and print its table and draw its figures.

    Parameters
    ----------
    experiment
        What to run.
    chosen
        Options of `command_line`.
    prepare
        Makes the images ready and returns their manifest.
    watch
        Chooses, of the manifest's entries, test slides whose attention is kept.
    draw
        Draws figures of results and of the slides watched into a folder.

    Raises
    ------
    SystemExit
        Something that the user can mend, in words.
    """
    experiment = replace(experiment, runs=chosen.runs or experiment.runs)
    try:
        if chosen.table:
            print(table(experiment, read_results(chosen.table)))
            return
        manifest = prepare()
        watched = watch(read_manifest(manifest))
        if chosen.measure:
            measure_again(chosen.out, chosen.device)
        folder = chosen.save or chosen.out
        if chosen.save:
            take_results(chosen.out, folder / f"{experiment.name}.json")
        results = run_experiment(
            experiment,
            manifest,
            chosen.out,
            only=chosen.only,
            attention_of=[entry.slide_id for entry in watched],
            device=chosen.device,
            on_results=partial(save, experiment, folder=folder),
        )
        save(experiment, results, folder)
        draw(results, watched, folder)
        print(table(experiment, results))
    except (PipelineError, StorageError) as error:
        raise SystemExit(f"error: {error}") from error


def convert_published(
    chosen: argparse.Namespace, make: Callable[[Path], Path], read: Callable[[Path], list[Entry]]
) -> Path:
    """Convert the images of `data_folder`, which --quick makes where none are given; return the pyramids' manifest.

    Raises
    ------
    UsageError
        Neither --data nor --quick is given.
    """
    if not (chosen.quick or chosen.data):
        raise UsageError("--data FOLDER: the published images; or --quick, which makes some of its own")
    make_folder(chosen.out)
    folder = chosen.data or make(data_folder(chosen))
    write_manifest(chosen.out / "published.csv", read(folder))
    run("convert", chosen.out / "published.csv", "--out", chosen.out / "pyramids")
    return Path(chosen.out / "pyramids" / "manifest.csv")


def data_folder(chosen: argparse.Namespace) -> Path:
    """Folder of images in the published layout: --data, or what is made instead."""
    return Path(chosen.data or chosen.out / "made")


def with_attention(experiment: Experiment, out: Path) -> list[Method]:
    """Methods whose run of seed 0 has kept its attention here."""
    return [m for m in experiment.methods if any((run_folder(out, m.key, 0) / "attention").glob("*.npz"))]


def save(experiment: Experiment, results: Sequence[Result], folder: Path) -> None:
    """Write results and their table, to be committed: ``NAME.json`` and ``NAME.md``."""
    write_json(make_folder(folder) / f"{experiment.name}.json", [asdict(result) for result in results])
    write_atomic(folder / f"{experiment.name}.md", table(experiment, results) + "\n")
