"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop at the first slide that fails.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[int, typer.Option(min=0, help="Equal seeds give equal results.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Cluster = Annotated[
    str, typer.Option("--cluster", help="none: this process; local: Ray workers on this machine; or a Ray address.")
]
Workers = Annotated[int, typer.Option(min=1, help="Ray workers.")]
Run = Annotated[Path, typer.Argument(help="Folder of a training run.")]
Slides = Annotated[list[str], typer.Argument(help="A manifest, or pyramids by path or URL.")]
Split = Annotated[str | None, typer.Option(help="Slides of this split only: train, val or test.")]
Draws = Annotated[int | None, typer.Option(min=1, help="Independent draws to average; default: as configured.")]
TargetError = Annotated[
    float | None,
    typer.Option(min=0, help="Stop drawing at this expected error of the probabilities; --draws is the most."),
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Encode every patch of the opened regions; slower, no draws there.")
]
TrustEncoder = Annotated[
    bool,
    typer.Option("--trust-encoder", help="Import the model's encoder where it is code of yours (model.encoder)."),
]
Samples = Annotated[str, typer.Option(help="Units to draw at each level, as in 16,32; default: as trained.")]
