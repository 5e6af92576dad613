"""``nested-ats runs``: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import AsJson


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with training runs in it or below.")],
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two folders of predictions of the same slides, by their paths or from FOLDER on."),
    ] = None,
    include_seen: Annotated[
        bool, typer.Option("--include-seen", help="Compare on slides too that a model was trained or validated on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List training runs: settings that differ, epochs, figures with intervals; --compare two models on slides."""
    from pipeline.results.compare import compare as measure
    from pipeline.results.listing import list_runs

    if compare:
        one, other = (path if path.is_dir() else folder / path for path in compare)
        found = measure(one, other, include_seen=include_seen)
        print(json.dumps(found, indent=2)) if as_json else _print_comparison(one, other, found)
        return
    listed = list_runs(folder)
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    for run in listed["runs"]:
        print(_headline(run))
        if run["settings"]:
            print("  " + ", ".join(f"{name} {json.dumps(value)}" for name, value in run["settings"].items()))
        for test in run["tests"]:
            print(f"  {_line(test)}")
    for test in listed["others"]:
        print(f"of several models, or of others: {_line(test)}")


def _headline(run: Mapping[str, Any]) -> str:
    state = "finished" if run["finished"] else "not finished"
    slides = ", ".join(f"{count} {split}" for split, count in run["slides"].items())
    line = f"{run['run']}: {state}, {run['epochs']} of {run['planned']} epochs; {slides}"
    best = run["validation"]
    if not best:
        return line
    shown = [f"{name.removeprefix('val_').replace('_', ' ')} {best[name]:.3f}" for name in _shown(best)]
    return f"{line}; best epoch {best['epoch']}: validation {', '.join(shown)}"


def _shown(best: Mapping[str, Any]) -> list[str]:
    return [name for name in best if name.startswith("val_") and not name.endswith(("_low", "_high"))]


def _line(test: Mapping[str, Any]) -> str:
    """Say how good evaluated predictions are."""
    from pipeline.results.measures import words_of

    words = [f"{name.replace('_', ' ')} {words_of(found)}" for name, found in test["figures"].items()]
    return f"{test['predictions']}: {test['slides']} slides, split {test['split']}: {', '.join(words)}"


def _print_comparison(one: Path, other: Path, found: Mapping[str, Any]) -> None:
    print(f"{found['slides']} slides of {found['cases']} cases: {one}, {other}, and their difference")
    for name in found["figures"]:
        if found[name] is None:
            print(f"{name:18} undefined where nothing differs")
            continue
        (before, after), (low, high), p = found[name]["values"], found[name]["interval_95"], found[name]["p"]
        chance = "" if p is None else f", p {p:.3g}"
        words = f"{before:.3f} {after:.3f}  {after - before:+.3f} [{low:+.3f}, {high:+.3f}]{chance}"
        print(f"{name.replace('_', ' '):18} {words} ({found[name]['method']})")
