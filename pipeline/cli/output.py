"""What commands print, and the exit codes that say how it went (see `pipeline.cli.app`)."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

USAGE, SOME_FAILED, NOTHING_USABLE = 2, 3, 4


def exit_if_failed(failures: Sequence[tuple[str, str]], total: int) -> None:
    """Name the slides that failed and exit with the code that says so."""
    if not failures:
        return
    if total == 1:
        say(f"error: {failures[0][1]}")
        raise typer.Exit(NOTHING_USABLE)
    say(f"{len(failures)} of {total} failed:")
    width = max(len(name) for name, _ in failures)
    for name, error in failures:
        say(f"  {name:{width}}  {error}")
    raise typer.Exit(SOME_FAILED if len(failures) < total else NOTHING_USABLE)


def print_outcome(failures: Sequence[tuple[str, str]], total: int, **more: Any) -> None:
    """Print what became of a command as one JSON object; numbers that are not finite are null, as JSON has none."""
    named = [{"name": name, "error": error} for name, error in failures]
    print(json.dumps(_finite({"total": total, "failed": len(failures), "failures": named, **more}), indent=2))


def print_place(name: str, place: Path, *, as_json: bool) -> None:
    """Print where something was written, as a line or as a JSON object in which it has a name."""
    print(json.dumps({name: str(place)}) if as_json else place)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_all(values: Sequence[Any]) -> None:
    """Print texts line by line, or objects as one JSON array."""
    if values and isinstance(values[0], dict):
        print(json.dumps(values, indent=2))
    else:
        for line in values:
            print(line)


def say_next(*command: object) -> None:
    """Say which command comes next, to be typed as it stands."""
    say("next: nested-ats " + shlex.join(map(str, command)))


def say(text: str) -> None:
    """Print on standard error, so that programs can read standard output."""
    print(text, file=sys.stderr)
