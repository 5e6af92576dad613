"""``report``: write one self-contained HTML page on how a run trained, how good it is, and where it looked."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_ats.targets import Cox, DiscreteSurvival, Regression, Target, read_target
from pipeline.config import AnyTarget
from pipeline.data.splits import seen_words
from pipeline.data.targets import is_known, truth
from pipeline.errors import UsageError
from pipeline.files import make_folder, read_inside, write_atomic
from pipeline.results.evaluate import METRICS, answered
from pipeline.results.heatmap import PICTURE
from pipeline.results.measures import ranking, risks
from pipeline.results.pictures import to_png
from pipeline.results.plots import scatter, survival_by_risk
from pipeline.results.predictions import answer_columns, read_about, read_predictions, table_digest
from pipeline.results.verdict import in_words
from pipeline.runs import MODEL, model_fingerprint, read_metrics, read_run

_SHOWN_SLIDES = 50
_SHOWN_HEATMAPS = 12

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}.wrong{background:#fbe3df}img{max-width:100%}
pre{background:#f5f5f5;padding:.6rem;overflow:auto}
"""


def report(run: Path, predictions: Path, page: Path, *, heatmaps: Path | None = None) -> Path:
    """Write the page.

    Parameters
    ----------
    run
        The folder of the training run.
    predictions
        The folder of predictions that were evaluated.
    page
        The HTML file to write.
    heatmaps
        The folder of heatmaps, of which the first few are shown.

    Raises
    ------
    UsageError
        A folder is not what it should be, the predictions were not evaluated or another model made them, or `page`
        cannot be written.
    """
    about = read_run(run)
    rows = read_predictions(predictions)
    metrics = _read_metrics(predictions)
    _check_model(run, predictions, metrics)
    epochs, target = read_metrics(run), read_target(metrics["target"])
    title = html.escape(run.absolute().name)
    parts = [
        f"<h1>{title}</h1>",
        "<h2>Results</h2>",
        _results(metrics),
        _outcomes(target, answered(read_about(predictions), rows)[1], rows, metrics),
        "<h2>Training</h2>",
        _warning(epochs[-1].get("verdict", "") if epochs else ""),
        _curves(target, epochs),
        "<h2>Slides</h2>",
        _slides(rows),
        _heatmaps(heatmaps),
        "<h2>Run</h2>",
        f"<pre>{html.escape(json.dumps({k: about[k] for k in ('config', 'versions')}, indent=2))}</pre>",
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
    make_folder(page.parent)
    write_atomic(page, f"{head}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n")
    return page


def describe_metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of a table of metrics: each has a name, and a value with its interval."""
    seen = sum(metrics["seen"].values())
    rows = [("slides", str(metrics["slides"])), ("failed", str(metrics["failed"]))]
    rows.append((f"seen, {'counted' if metrics['seen_included'] else 'left out'}", str(seen)))
    for name in metrics["measures"]:
        value, interval = metrics[name]["value"], metrics[name]["interval_95"]
        undefined = "undefined for one class" if "classes" in metrics else "undefined where nothing differs"
        text = undefined if value is None else f"{value:.3f}"
        text += f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        rows.append((name.replace("_", " "), text))
    rows += [(f"Brier score at {time:g}", text) for time, text in _brier(metrics)]
    if "cross_entropy" not in metrics:
        return rows
    guess = f"{metrics['guess_cross_entropy']:.3f} by guessing"
    return [*rows, ("cross-entropy", f"{metrics['cross_entropy']:.3f} ({guess})")]


def _brier(metrics: Mapping[str, Any]) -> list[tuple[float, str]]:
    if "brier" not in metrics:
        return []
    times = metrics["target"]["times"]
    scores = metrics["brier"] or [None] * len(times)
    missing = "needs scikit-survival: pip install 'nested-ats[survival]'"
    unknown = missing if metrics["brier"] is None else "undefined: no slide is seen until then"
    return [
        (time, unknown if score is None or math.isnan(score) else f"{score:.3f}")
        for time, score in zip(times, scores, strict=True)
    ]


def _read_metrics(predictions: Path) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = json.loads(read_inside(predictions, METRICS))
    except (FileNotFoundError, ValueError):
        raise UsageError(f"{predictions}: not evaluated yet; run nested-ats evaluate first") from None
    if metrics.get("predictions") != table_digest(predictions) or "measures" not in metrics:
        raise UsageError(
            f"{predictions}: the predictions were changed after they were evaluated; run nested-ats evaluate again"
        )
    return metrics


def _check_model(run: Path, predictions: Path, metrics: dict[str, Any]) -> None:
    """See that the run's model, as it is now, made the predictions."""
    if metrics["model"] != model_fingerprint(run):
        raise UsageError(
            f"{predictions}: predictions of another model than {run / MODEL}: of another run, or from before it was "
            "trained further; give those of this run, or run nested-ats predict and evaluate again"
        )


def _results(metrics: dict[str, Any]) -> str:
    rows = describe_metrics(metrics)
    methods = dict.fromkeys(metrics[name]["method"] for name in metrics["measures"])
    how = "; ".join(method for method in methods if method)
    return (
        f"<p>Split: {html.escape(metrics['split'])}. {html.escape(_seen(metrics))}</p>"
        + _warning(metrics["verdict"])
        + _table(["", "value"], rows)
        + (f"<p>In brackets 95 % intervals over cases: {html.escape(how)}.</p>" if how else "")
        + _confusion(metrics)
    )


def _confusion(metrics: Mapping[str, Any]) -> str:
    if "classes" not in metrics:
        return ""
    counts = zip(metrics["classes"], metrics["confusion"], strict=True)
    rows = [[f"label {name}", *map(str, row)] for name, row in counts]
    return _table(["", *(f"predicted {name}" for name in metrics["classes"])], rows)


def _seen(metrics: dict[str, Any]) -> str:
    """Write a sentence on slides that the training has seen; it is empty where there are none."""
    labelled = metrics["slides"] + (0 if metrics["seen_included"] else sum(metrics["seen"].values()))
    words = seen_words(metrics["seen"], labelled)
    return words and f"{words} and are {'counted' if metrics['seen_included'] else 'left out of the results'}."


def _warning(verdict: str) -> str:
    """Write a paragraph on what speaks against anything having been learned."""
    return f"<p class=wrong>The model {html.escape(verdict)}.</p>" if verdict else ""


def _curves(target: Target, metrics: Sequence[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    if not metrics:
        return "<p>No epoch has finished.</p>"
    figure = Figure(figsize=(10, 3), layout="constrained")
    epochs = [line["epoch"] for line in metrics]
    loss, by = target.loss_name, ranking(target).name
    panels = [(loss, in_words(loss)), ("accuracy", "accuracy"), (by, by), ("entropy", "entropy of attention, nats")]
    there = [panel for panel in panels if {panel[0], f"val_{panel[0]}"} & metrics[0].keys()]
    for axes, (name, title) in zip(figure.subplots(1, len(there)), there, strict=True):
        for prefix, label in (("", "training"), ("val_", "validation")):
            if prefix + name in metrics[0]:
                axes.plot(epochs, [line.get(prefix + name, math.nan) for line in metrics], label=label)
        if f"val_{name}" in metrics[0]:
            axes.legend()
        axes.set(title=title, xlabel="epoch")
    return _image(to_png(figure))


def _outcomes(
    target: Target, config: AnyTarget, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]
) -> str:
    """Draw what is true against what was answered, of the slides that count: numbers, or survival by risk."""
    counted = [
        row
        for row in rows
        if row["status"] == "ok" and is_known(config, row) and (metrics["seen_included"] or not row.get("seen"))
    ]
    if not counted or not isinstance(target, Regression | Cox | DiscreteSurvival):
        return ""
    outcomes = truth(target, config, counted, raw=True).double().numpy()
    answers = np.array([[row[name] for name in answer_columns(target)] for row in counted], dtype=np.float64)
    if isinstance(target, Regression):
        return _image(scatter(outcomes, answers[:, 0]))
    return _image(survival_by_risk(outcomes, risks(target, answers)))


def _slides(rows: Sequence[dict[str, Any]]) -> str:
    """Write a table of slides: the failed ones first, then the wrong ones, then the rest."""
    order = sorted(rows, key=lambda row: (row["status"] == "ok", not _is_wrong(row)))
    classes = [name for name in rows[0] if name.startswith("prob_")] if rows else []
    lines = []
    for row in order[:_SHOWN_SLIDES]:
        numbers = [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in classes]
        cells = [row["slide_id"], row["label"], row.get("prediction") or row["error"], *numbers]
        body = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f"<tr{' class=wrong' if _is_wrong(row) else ''}>{body}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("slide", "label", "prediction", *classes))
    more = f"<p>{len(rows) - _SHOWN_SLIDES} more in the table.</p>" if len(rows) > _SHOWN_SLIDES else ""
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>{more}"


def _is_wrong(row: dict[str, Any]) -> bool:
    """Tell whether a slide failed, or has a label and another prediction."""
    return bool(row["status"] != "ok" or (row["label"] and row["prediction"] != row["label"]))


def _heatmaps(folder: Path | None) -> str:
    if folder is None:
        return ""
    pictures = sorted(folder.glob(f"*/{PICTURE}"))
    if not pictures:
        raise UsageError(f"{folder}: no heatmaps here; give the --out of nested-ats heatmap")
    return "<h2>Where the model looked</h2>" + "".join(_image(p.read_bytes()) for p in pictures[:_SHOWN_HEATMAPS])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(png: bytes) -> str:
    return f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'
