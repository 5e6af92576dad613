"""The command line: its commands, and how errors end it.

Commands import what they need when they run, so that ``--help`` answers at once. Exit codes: 0 all went well,
1 internal error, 2 usage or configuration, 3 some slides failed, 4 nothing usable, 130 interrupted.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pipeline.cli.calibrate import calibrate
from pipeline.cli.convert import convert
from pipeline.cli.doctor import doctor
from pipeline.cli.evaluate import evaluate
from pipeline.cli.features import features
from pipeline.cli.heatmap import heatmap
from pipeline.cli.info import info
from pipeline.cli.init import init
from pipeline.cli.job import job
from pipeline.cli.model import model
from pipeline.cli.output import NOTHING_USABLE, USAGE, say
from pipeline.cli.predict import predict
from pipeline.cli.report import report
from pipeline.cli.runs import runs
from pipeline.cli.split import split
from pipeline.cli.stats import stats
from pipeline.cli.synth import synth
from pipeline.cli.tissue import tissue
from pipeline.cli.train import train
from pipeline.cli.validate import validate
from pipeline.cli.view import view
from pipeline.interrupt import RESUMABLE, interruptible


class _Group(TyperGroup):
    """Turns the errors that a user can cause, and interrupts, into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with interruptible(RESUMABLE):
                return super().invoke(ctx)
        except Exception as error:  # noqa: BLE001 - told apart there, and raised again where it is not ours
            raise typer.Exit(_explain(error)) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nested-ats {version('nested-ats')}")
        raise typer.Exit


app = typer.Typer(
    cls=_Group,
    help="Classify gigapixel images from one label per image, reading only where it matters.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


_DATA = (init, convert, validate, info, tissue, stats, split, features)
_MODELS = (train, calibrate, predict, evaluate, heatmap, report, runs, view)
for _command in (*_DATA, *_MODELS, doctor):
    app.command()(_command)
app.add_typer(synth, name="synth")
app.add_typer(model, name="model")
app.add_typer(job, name="job")


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    app()
    raise SystemExit(0)


def _explain(error: Exception) -> int:
    """Say what went wrong in one line where a user can mend it; let anything else show itself whole."""
    from pipeline.errors import PipelineError, is_ours

    if not is_ours(error):
        raise error
    say(f"error: {error}")
    if isinstance(error, PipelineError):
        return error.exit_code
    # A bad model folder or cluster is a wrong argument; what storage refuses is data that cannot be used.
    return NOTHING_USABLE if type(error).__module__ == "storage.errors" else USAGE
