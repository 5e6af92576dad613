"""Options that several commands take, and what is made of their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.output import say

if TYPE_CHECKING:
    from pipeline.data.manifest import Entry

Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop at the first slide that fails.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[int, typer.Option(min=0, help="Equal seeds give equal results.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Cluster = Annotated[
    str, typer.Option("--cluster", help="none: this process; local: Ray workers on this machine; or a Ray address.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a training run.")]
Slides = Annotated[list[str], typer.Argument(help="A manifest, or pyramids by path or URL.")]
Split = Annotated[str | None, typer.Option(help="Slides of this split only: train, val or test.")]
Last = Annotated[bool, typer.Option("--last", help="Take the model of the last epoch instead of the best one.")]
Draws = Annotated[int | None, typer.Option(min=1, help="Independent draws to average; default: as configured.")]
TrustEncoder = Annotated[
    bool,
    typer.Option("--trust-encoder", help="Import the model's encoder where it is code of yours (model.encoder)."),
]
SlideTimeout = Annotated[
    float, typer.Option(min=0.1, help="Seconds for a slide; a Ray worker that takes longer is replaced.")
]
Samples = Annotated[str, typer.Option(help="Units to draw at each level, as in 16,32; default: as trained.")]


def named_channels(text: str) -> list[int | str]:
    """Channels by name or number from 0, with commas between; none are an empty list."""
    return [int(name) if name.isdecimal() else name for name in text.split(",") if name]


def several_runs(run: Path, places: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Tell runs and slides apart: folders of runs are runs, and a folder of folds stands for all of them."""
    from pipeline.errors import UsageError
    from pipeline.runs import RUN, fold_runs

    runs, slides = [run], []
    for place in places:
        if (Path(place) / RUN).is_file():
            runs.append(Path(place))
        else:
            slides.append(place)
    runs[:1] = fold_runs(run) or [run]
    if not slides:
        raise UsageError(f"{places[-1]}: a run; give the slides behind the runs: a manifest, or pyramids")
    return runs, slides


def chosen_slides(slides: Sequence[str], split: str | None, run: Path) -> list[Entry]:
    """Choose the slides of a split, which is the run's where they have none of their own."""
    from pipeline.data.discovery import name_slides
    from pipeline.data.splits import RunSplits
    from pipeline.errors import UsageError
    from pipeline.runs import read_run

    entries = name_slides(slides)
    if split is None:
        return entries
    about = read_run(run)
    filled = RunSplits.of_run(about).fill(entries)
    chosen = [entry for entry in filled if entry.split == split]
    counts = Counter(entry.split or "none" for entry in filled)
    if not chosen:
        there = ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
        raise UsageError(f"{slides[0]}: no slide in split {split!r} ({there})")
    if counts["none"]:
        say(f"{counts['none']} of {len(filled)} slides are in no split of {run}: left out")
    return chosen


def sample_counts(text: str) -> list[int]:
    """Read the value of `Samples`."""
    from pipeline.errors import UsageError

    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UsageError(f"--samples {text}: give whole numbers with commas between, as in 16,32") from None


def check_cluster(address: str, workers: int, device: str) -> None:
    """Refuse a cluster, a number of workers and a device that do not fit each other or this machine."""
    from pipeline.errors import UsageError

    if address == "none" and workers > 1:
        raise UsageError(f"--workers {workers}: several workers need --cluster local or the address of a cluster")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and address in ("none", "local"):
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: this machine has no GPU that PyTorch sees; choose auto or cpu")
