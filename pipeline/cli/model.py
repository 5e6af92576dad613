"""``nested-ats model``: the options of its commands, and what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, Run, TrustEncoder
from pipeline.cli.output import print_place

model = typer.Typer(help="Give a trained model away, and say what it is.", no_args_is_help=True)

Predictions = Annotated[
    list[Path] | None,
    typer.Option("--predictions", help="Folder of evaluated predictions, whose figures the card has; repeatable."),
]
Name = Annotated[str, typer.Option(help="The model's name; default: that of the run's folder.")]


@model.command()
def card(
    run: Run,
    predictions: Predictions = None,
    name: Name = "",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: print it.")] = None,
    trust_encoder: TrustEncoder = False,
) -> None:
    """Write what a model is, counts of its data, its figures and its limits, as Markdown for people and the hub."""
    from pipeline.files import make_folder, write_atomic
    from pipeline.results.card import model_card

    text = model_card(run, predictions or (), name=name, trust_encoder=trust_encoder)
    if out is None:
        print(text, end="")
        return
    make_folder(out.parent)
    write_atomic(out, text)
    print(out)


@model.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="Folder to write: model.safetensors, config.json, README.md.")],
    predictions: Predictions = None,
    name: Name = "",
    trust_encoder: TrustEncoder = False,
    as_json: AsJson = False,
) -> None:
    """Write a model and its card into a folder that names no path, slide or case, ready for the Hugging Face hub."""
    from pipeline.results.card import export_model

    written = export_model(run, out, predictions or (), name=name, trust_encoder=trust_encoder)
    print_place("model", written, as_json=as_json)
