"""The command line. Commands import what they need when they run, so that ``--help`` answers at once.

Exit codes: 0 all went well, 1 internal error, 2 usage or configuration, 3 some slides failed, 4 nothing usable,
130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pipeline.cli.job import job
from pipeline.cli.options import (
    AsJson,
    Cluster,
    Device,
    Draws,
    Exact,
    FailFast,
    Out,
    Overwrite,
    Run,
    Samples,
    Slides,
    Split,
    TargetError,
    TrustEncoder,
    Workers,
)
from pipeline.cli.synth import synth
from pipeline.interrupt import RESUMABLE, interruptible

if TYPE_CHECKING:
    from pipeline.data.manifest import Entry

USAGE, SOME_FAILED, NOTHING_USABLE = 2, 3, 4


class _Group(TyperGroup):
    """Turns the errors that a user can cause, and interrupts, into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with interruptible(RESUMABLE):
                return super().invoke(ctx)
        except Exception as error:  # noqa: BLE001 - told apart there, and raised again where it is not ours
            raise typer.Exit(_explain(error)) from None


app = typer.Typer(
    cls=_Group,
    help="Classify gigapixel images from one label per image, reading only where it matters.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(synth, name="synth")
app.add_typer(job, name="job")


@app.command()
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Images (TIFF, SVS, PNG, JPEG, BMP) by path or URL, folders, 'patterns/**/*.tif', or a manifest."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Folder or s3://, gs:// URL to write to.")],
    manifest: Annotated[
        Path | None,
        typer.Option(help="Manifest to write or add to; default: OUT/manifest.csv, for a URL ./manifest.csv."),
    ] = None,
    codec: Annotated[str, typer.Option(help="lz4 reads fastest, zstd is smaller.")] = "lz4",
    chunk: Annotated[int, typer.Option(help="Side in pixels of what is read at once.")] = 128,
    shard: Annotated[int, typer.Option(help="Side in pixels of a file, a multiple of --chunk.")] = 2048,
    name_by: Annotated[
        str,
        typer.Option(help="Slide ids: name, of the file; path, below the folder given, as in site/007.svs."),
    ] = "name",
    mpp: Annotated[float | None, typer.Option(min=0, help="Micrometres per pixel, over what files say.")] = None,
    min_level_size: Annotated[
        int, typer.Option(min=1, help="Levels go on down to this longer side, in pixels.")
    ] = 64,
    allow_sparse: Annotated[
        bool, typer.Option("--allow-sparse", help="Read TIFF tiles that are not stored as zeros.")
    ] = False,
    executor: Annotated[
        str, typer.Option(help="threads, processes, or the tcp://HOST:PORT of a Dask scheduler.")
    ] = "threads",
    cluster: Cluster = "none",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads, processes or Ray workers; default: one a processor, and one thread more."),
    ] = None,
    overwrite: Overwrite = False,
    fail_fast: FailFast = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at the images, say what would be made, stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn images into OME-Zarr pyramids and write a manifest of them; run again, it goes on where it was."""
    from pipeline.convert import convert_all, known_slides, manifest_path, plan_all, summary
    from pipeline.data.discovery import find_images
    from pipeline.errors import UsageError
    from storage import ConvertOptions

    if cluster != "none" and executor != "threads":
        raise UsageError(f"--cluster {cluster} and --executor {executor}: give one of them")
    if executor not in ("threads", "processes") and "://" not in executor:
        raise UsageError(f"--executor {executor}: choose threads, processes or tcp://HOST:PORT")
    try:
        options = ConvertOptions(
            codec=codec, chunk=chunk, shard=shard, min_level_size=min_level_size, mpp=mpp, allow_sparse=allow_sparse
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    entries = find_images(sources, name_by=name_by, known=known_slides(out, manifest))
    if dry_run:
        plans = plan_all(entries, out, options=options)
        _print_all([asdict(plan) for plan in plans] if as_json else [plan.text for plan in plans if not plan.error])
        _end([(plan.entry.slide_id, plan.error) for plan in plans if plan.error], len(plans))
        return
    conversions = convert_all(
        entries,
        out,
        options=options,
        manifest=manifest,
        executor=executor,
        address=cluster,
        workers=workers,
        overwrite=overwrite,
        fail_fast=fail_fast,
    )
    failures = [(one.entry.slide_id, one.error) for one in conversions if one.error]
    listed = [manifest or manifest_path(out)] if len(failures) < len(conversions) else []
    _print_all([asdict(one) for one in conversions] if as_json else [summary(conversions), *listed])
    _end(failures, len(conversions))


@app.command()
def validate(
    pyramids: Annotated[
        list[str], typer.Argument(help="Pyramids by path or URL, folders of them, 'patterns', or a manifest.")
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Decode every chunk, and compare each level with the next coarser one.")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="Image that the pyramid was made from, to compare with; implies --full.")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Folder or manifest of such images, found by slide name; implies --full.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a processor.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which pyramids are sound, and what is wrong with the others and where: checksums of all files, or more."""
    from pipeline.errors import UsageError
    from pipeline.validate import find_pyramids, find_sources, validate_all

    entries = find_pyramids(pyramids)
    if source is not None and (sources is not None or len(entries) > 1):
        raise UsageError("--source is for one pyramid; for several give --sources, a folder or manifest of images")
    images = None if sources is None else find_sources(sources)
    if source is not None:
        images = {entries[0].slide_id: source}
    found = validate_all(entries, sources=images, full=full, workers=workers)
    if as_json:
        _print_all([{"sound": one.sound, **asdict(one)} for one in found])
    else:
        _print_all([line for one in found for line in one.lines()])
    _end([(one.entry.slide_id, one.error or one.verdict) for one in found if not one.sound], len(found))


@app.command()
def info(
    sources: Annotated[list[str], typer.Argument(help="Images or pyramids, by path or URL; encoders by name.")],
    as_json: AsJson = False,
) -> None:
    """Show the size, levels, channels and pixel size of images; what an encoder such as uni wants."""
    from pipeline.info import describe
    from pipeline.net import Net

    found, failures = [], []
    for source in sources:
        with Net() as net:
            found.append(describe(source))
        if net.error:
            failures.append((source, net.error))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for about in found:
            _print_info(about)
    _end(failures, len(sources))


@app.command()
def train(
    manifest: Annotated[Path, typer.Option(help="CSV or Parquet: slide_id, path, label, ...")],
    out: Out,
    config: Annotated[Path | None, typer.Option(help="YAML; default: the built-in configuration.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, as in train.epochs=10.")] = None,
    cluster: Cluster = "none",
    workers: Annotated[
        str, typer.Option(help="Ray workers; a range, as in 1-4, uses as many as there is room for.")
    ] = "1",
    device: Device = "auto",
    mirror: Annotated[
        str | None, typer.Option(help="s3://, gs:// URL to copy the run to at every checkpoint, and to go on from.")
    ] = None,
    overwrite: Overwrite = False,
    fail_fast: FailFast = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print configuration and costs, write nothing.")
    ] = False,
) -> None:
    """Train a model from one label per slide; the same command goes on with an interrupted run."""
    from pipeline.config import dump_config, load_config
    from pipeline.data.manifest import read_manifest

    chosen = load_config(config, settings)
    entries = read_manifest(manifest, labelled=True)
    group = _range(workers)
    _check_cluster(cluster, group[1], device)
    if dry_run:
        from pipeline.training.dry_run import dry_run as look

        print(dump_config(chosen), end="", flush=True)
        lines, failures = look(
            entries, chosen, out, device=device, mirror=mirror, overwrite=overwrite, fail_fast=fail_fast
        )
        _print_all([f"# {line}" for line in lines])  # comments: what is printed remains a configuration
        _end([(failure.slide_id, failure.error) for failure in failures], len(entries))
        return
    from pipeline.training.train import train as run

    metrics, failures = run(
        entries,
        chosen,
        out,
        address=cluster,
        workers=group,
        device=device,
        mirror=mirror,
        overwrite=overwrite,
        fail_fast=fail_fast,
    )
    print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not isinstance(value, str)))
    if metrics.get("verdict"):
        print(metrics["verdict"])
    print(mirror or out)
    _end([(failure.slide_id, failure.error) for failure in failures], len(entries))


@app.command()
def predict(
    run: Run,
    slides: Slides,
    out: Out,
    split: Split = None,
    draws: Draws = None,
    samples: Samples = "",
    target_error: TargetError = None,
    exact: Exact = False,
    trust_encoder: TrustEncoder = False,
    cluster: Cluster = "none",
    workers: Workers = 1,
    device: Device = "auto",
    slide_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a slide; a Ray worker that takes longer is replaced.")
    ] = 3600.0,
    overwrite: Overwrite = False,
) -> None:
    """Classify slides; run again, it classifies only what is missing."""
    from pipeline.data.splits import count_seen, seen_words
    from pipeline.results.predict import predict as classify
    from pipeline.results.predictions import TABLE

    _check_cluster(cluster, workers, device)
    rows = classify(
        _entries(slides, split, run),
        run,
        out,
        draws=draws,
        samples=_numbers(samples),
        target_error=target_error,
        exact=exact,
        trust_encoder=trust_encoder,
        address=cluster,
        workers=workers,
        device=device,
        timeout_s=slide_timeout,
        overwrite=overwrite,
    )
    print(out / f"{TABLE}.csv")
    seen = seen_words(count_seen(rows), len(rows))
    if seen:
        _say(f"{seen}: so it says in the column seen, and evaluate leaves them out")
    _end([(row["slide_id"], row["error"]) for row in rows if row["status"] != "ok"], len(rows))


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder that predict wrote.")],
    split: Split = None,
    include_seen: Annotated[
        bool, typer.Option("--include-seen", help="Count slides too that the model was trained or validated on.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with the labels of the manifest, on slides that the training has not seen."""
    from pipeline.results.evaluate import evaluate as measure
    from pipeline.results.report import describe_metrics

    metrics = measure(predictions, split=split, include_seen=include_seen)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    for name, value in describe_metrics(metrics):
        print(f"{name:18} {value}")
    if metrics["verdict"]:
        print(metrics["verdict"])


@app.command()
def heatmap(
    run: Run,
    slides: Slides,
    out: Out,
    split: Split = None,
    draws: Draws = None,
    samples: Samples = "",
    trust_encoder: TrustEncoder = False,
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many slides only.")] = None,
) -> None:
    """Show where the model looks: OME-Zarr attention map, picture, and patches as GeoJSON."""
    from pipeline.results.heatmap import PICTURE, heatmaps
    from pipeline.results.settings import prediction_settings

    _check_cluster("none", 1, device)
    settings = prediction_settings(
        run, draws=draws, samples=_numbers(samples), trust_encoder=trust_encoder, device=device
    )
    done = heatmaps(_entries(slides, split, run)[:limit], settings, out)
    for one in done:
        if not one.error:
            print(f"{one.folder / PICTURE}  {one.prediction}, attention up to {one.peak:.4g} times uniform")
    _end([(one.slide_id, one.error) for one in done if one.error], len(done))


@app.command()
def report(
    run: Run,
    predictions: Annotated[Path, typer.Argument(help="Folder of predictions that were evaluated.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    heatmaps: Annotated[Path | None, typer.Option(help="Folder that heatmap wrote.")] = None,
) -> None:
    """Write one self-contained HTML page: training, results, slides and heatmaps."""
    from pipeline.results.report import report as write

    print(write(run, predictions, out, heatmaps=heatmaps))


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    app()
    raise SystemExit(0)


def _explain(error: Exception) -> int:
    """Say what went wrong in one line where a user can mend it; let anything else show itself whole."""
    from pipeline.errors import PipelineError, is_ours

    if not is_ours(error):
        raise error
    _say(f"error: {error}")
    if isinstance(error, PipelineError):
        return error.exit_code
    # A bad model folder or cluster is a wrong argument; what storage refuses is data that cannot be used.
    return NOTHING_USABLE if type(error).__module__ == "storage.errors" else USAGE


def _end(failures: Sequence[tuple[str, str]], total: int) -> None:
    """Name the slides that failed and exit with the code that says so."""
    if not failures:
        return
    if total == 1:
        _say(f"error: {failures[0][1]}")
        raise typer.Exit(NOTHING_USABLE)
    _say(f"{len(failures)} of {total} failed:")
    width = max(len(name) for name, _ in failures)
    for name, error in failures:
        _say(f"  {name:{width}}  {error}")
    raise typer.Exit(SOME_FAILED if len(failures) < total else NOTHING_USABLE)


def _entries(slides: Sequence[str], split: str | None, run: Path) -> list[Entry]:
    """Slides of a split, which is the run's where they have none of their own."""
    from pipeline.data.discovery import name_slides
    from pipeline.data.splits import RunSplits
    from pipeline.errors import UsageError
    from pipeline.runs import read_run

    entries = name_slides(slides)
    if split is None:
        return entries
    filled = RunSplits(read_run(run)["entries"]).fill(entries)
    chosen = [entry for entry in filled if entry.split == split]
    counts = Counter(entry.split or "none" for entry in filled)
    if not chosen:
        there = ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
        raise UsageError(f"{slides[0]}: no slide in split {split!r} ({there})")
    if counts["none"]:
        _say(f"{counts['none']} of {len(filled)} slides are in no split of {run}: left out")
    return chosen


def _numbers(text: str) -> list[int]:
    from pipeline.errors import UsageError

    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UsageError(f"--samples {text}: give whole numbers with commas between, as in 16,32") from None


def _range(workers: str) -> tuple[int, int]:
    from pipeline.errors import UsageError

    least, dash, most = workers.partition("-")
    with suppress(ValueError):
        if 1 <= int(least) <= int(most if dash else least):
            return int(least), int(most if dash else least)
    raise UsageError(f"--workers {workers}: give a number or a range of numbers from 1 on, as in 1-4")


def _check_cluster(address: str, workers: int, device: str) -> None:
    from pipeline.errors import UsageError

    if address == "none" and workers > 1:
        raise UsageError(f"--workers {workers}: several workers need --cluster local or the address of a cluster")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and address in ("none", "local"):
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: this machine has no GPU that PyTorch sees; choose auto or cpu")


def _print_info(about: dict[str, Any]) -> None:
    if about["kind"] == "encoder":
        mpp = ", ".join(f"{each:g}" for each in about["mpp"])
        print(f"{about['path']}: encoder, {about['features']} features ({about['pooling']}), needs {about['needs']}")
        print(f"  patches of {about['patch_size']} pixels at {mpp} micrometres per pixel")
        print(f"  mean {about['mean']}, std {about['std']}; licence and weights: {about['page']}")
        return
    height, width = about["size"]
    size = f"{height} x {width} pixels, {len(about['channels'])} channels of {about['dtype']}"
    mpp = f"{about['mpp']:g} micrometres per pixel" if about["mpp"] else "pixel size unknown"
    print(f"{about['path']}: {about['kind']}, {size}, {mpp}")
    for number, level in enumerate(about.get("levels", [])):
        height, width = level["size"]
        print(f"  level {number}: {height} x {width}, downsample {level['downsample']:g}")


def _print_all(values: Sequence[Any]) -> None:
    """Print lines; or objects as one JSON array."""
    if values and isinstance(values[0], dict):
        print(json.dumps(values, indent=2))
    else:
        for line in values:
            print(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
