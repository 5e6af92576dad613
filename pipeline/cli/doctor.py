"""``nested-ats doctor``: its options, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, Cluster
from pipeline.cli.output import SOME_FAILED


def doctor(
    slide: Annotated[str | None, typer.Argument(help="A slide to read from and to time, by path or URL.")] = None,
    cluster: Cluster = "none",
    as_json: AsJson = False,
) -> None:
    """Look at this machine, its packages, and a slide: what is there, and what to do about what is not.

    --cluster runs one small task on Ray. The exit code is 3 where there is a problem.
    """
    from pipeline.doctor import examine

    found = []
    for finding in examine(slide, address=cluster):
        found.append(finding)
        if not as_json:
            print(f"{finding.status:8} {finding.check}: {finding.found}")
            if finding.advice:
                print(f"{'':8} -> {finding.advice}", flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    if any(finding.status == "problem" for finding in found):
        raise typer.Exit(SOME_FAILED)
