"""``report``: write one self-contained HTML page on what was found, in which cohort, and how a run trained.

Of each slide with a heatmap there is a page on where the model looked.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from nested_ats.targets import Classes, Cox, DiscreteSurvival, MultiLabel, Regression, Target, read_target
from pipeline.data.manifest import SPLITS, read_entry
from pipeline.data.splits import seen_words
from pipeline.data.targets import columns, is_known, strata, truth
from pipeline.errors import UsageError
from pipeline.files import make_folder, read_inside, write_atomic
from pipeline.results.by_case import answer_cases
from pipeline.results.evaluate import METRICS, answered
from pipeline.results.intervals import case_numbers
from pipeline.results.localisation import Compared, compare, localisation
from pipeline.results.look import LOOK
from pipeline.results.measures import ranking, risks, words_of
from pipeline.results.page import document, table, text
from pipeline.results.plots import calibration, curves, precision_recall, roc, scatter, survival_by_risk
from pipeline.results.predictions import answer_columns, answers_of, read_about, read_predictions, table_digest
from pipeline.results.slide_page import read_look, slide_page
from pipeline.runs import MODEL, fold_runs, model_fingerprint, read_metrics, read_run
from pipeline.sections import AnyTarget

_SHOWN_SLIDES = 5000  # more make a page slow


def report(
    run: Path, predictions: Path, page: Path, *, heatmaps: Path | None = None, annotations: Path | None = None
) -> Path:
    """Write the page, and one page a slide where there are heatmaps, into a folder beside it.

    Parameters
    ----------
    run
        The folder of the training run, or that of the runs of all folds.
    predictions
        The folder of predictions that were evaluated.
    page
        The HTML file to write; pages of slides go to a folder of its name with ``_slides``.
    heatmaps
        The folder of heatmaps.
    annotations
        A folder with ``SLIDE.geojson`` for slides, in pixels, which attention is compared with.

    Raises
    ------
    UsageError
        A folder is not what it should be, the predictions were not evaluated or another model made them, or `page`
        cannot be written.
    DataError
        Outlines are not those of their slide.
    """
    if annotations and not heatmaps:
        raise UsageError("--annotations are compared with heatmaps: give --heatmaps too")
    runs = fold_runs(run) or [run]
    abouts = [read_run(each) for each in runs]
    rows = read_predictions(predictions)
    metrics = evaluated(runs, predictions)
    target = read_target(metrics["target"])
    config = answered(read_about(predictions), rows)[1]
    make_folder(page.parent)
    links, compared = _slide_pages(page, heatmaps, rows, annotations)
    title = run.absolute().name
    parts = [
        f"<h1>{text(title)}</h1>",
        _finding(metrics, target),
        "<h2>Cohort</h2>",
        _cohort({each.name: about for each, about in zip(runs, abouts, strict=True)}, config, metrics),
        "<h2>Results</h2>",
        _results(metrics),
        plots_of(target, config, rows, metrics),
        localisation(compared, {str(row["slide_id"]): str(row["case_id"]) for row in rows}) if annotations else "",
        "<h2>Training</h2>",
        *(_training(each, about, target) for each, about in zip(runs, abouts, strict=True)),
        "<h2>Slides</h2>",
        _slides(rows, target, config, links),
        "<h2>Run</h2>",
        _run(abouts[0]),
    ]
    write_atomic(page, document(title, parts, plots=True))
    return page


def describe_metrics(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of a table of metrics: each has a name, and a value with its interval."""
    seen, chosen = sum(metrics["seen"].values()), metrics.get("thresholds") or {}
    by = metrics.get("by") or {"column": "", "groups": {}}
    rows = [("slides", str(metrics["slides"])), ("failed", str(metrics["failed"]))]
    rows.append((f"seen, {'counted' if metrics['seen_included'] else 'left out'}", str(seen)))
    for name in metrics["measures"]:
        value, interval = metrics[name]["value"], metrics[name]["interval_95"]
        undefined = "undefined for one class" if "classes" in metrics else "undefined where nothing differs"
        text = undefined if value is None else f"{value:.3f}"
        text += f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        rows.append((name.replace("_", " "), text))
    rows += [("answered from", ", ".join(f"{name} {at:.3f}" for name, at in chosen.items()))] if chosen else []
    rows += [(f"{by['column']} {value}", _group(found, metrics["measures"])) for value, found in by["groups"].items()]
    rows += [(f"Brier score at {time:g}", text) for time, text in _brier(metrics)]
    if "cross_entropy" not in metrics:
        return rows
    guess = f"{metrics['guess_cross_entropy']:.3f} by guessing"
    rows.append(("cross-entropy", f"{metrics['cross_entropy']:.3f} ({guess})"))
    return [*rows, ("calibration error", f"{metrics['ece']:.3f}")] if "ece" in metrics else rows


def _group(found: Mapping[str, Any], measures: Sequence[str]) -> str:
    """Write the measures of one value of a column."""
    words = [f"{name.replace('_', ' ')} {words_of(found[name])}" for name in measures if name in found]
    return f"{found['slides']} slides of {found['cases']} cases: {', '.join(words)}"


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


def evaluated(runs: Sequence[Path], predictions: Path) -> dict[str, Any]:
    """Return the metrics of predictions that the models of these runs, as they are now, have made together.

    Raises
    ------
    UsageError
        They were not evaluated as they are now, or are of another model.
    """
    try:
        metrics: dict[str, Any] = json.loads(read_inside(predictions, METRICS))
    except (FileNotFoundError, ValueError):
        raise UsageError(f"{predictions}: not evaluated yet; run nested-ats evaluate first") from None
    if metrics.get("predictions") != table_digest(predictions) or "measures" not in metrics:
        raise UsageError(
            f"{predictions}: the predictions were changed after they were evaluated; run nested-ats evaluate again"
        )
    made_by = set(read_about(predictions).get("models", {}).values()) or {metrics["model"]}
    models = {model_fingerprint(run): run for run in runs}
    if made_by != models.keys() and made_by != {model_fingerprint(run, last=True) for run in runs}:
        other = next((run for model, run in models.items() if model not in made_by), runs[0])
        raise UsageError(
            f"{predictions}: predictions of another model than {other / MODEL}: of another run, or from before it "
            "was trained further; give those of this run, or run nested-ats predict and evaluate again"
        )
    return metrics


def _run(about: Mapping[str, Any]) -> str:
    """Write how a run was configured, to be opened."""
    plain = json.dumps({name: about[name] for name in ("config", "versions")}, indent=2)
    return f"<details><summary>Configuration and versions</summary><pre>{text(plain)}</pre></details>"


def _training(run: Path, about: Mapping[str, Any], target: Target) -> str:
    """Write how a run was trained."""
    name, epochs = run.absolute().name, read_metrics(run)
    if not epochs:
        return f"<h3>{text(name)}</h3><p>No epoch has finished.</p>"
    best_by = about["config"]["train"]["best_by"]
    plots = grid(curves(name, target, epochs, best_by))
    return f"<h3>{text(name)}</h3>{_warning(epochs[-1].get('verdict', ''))}{plots}"


def _finding(metrics: Mapping[str, Any], target: Target) -> str:
    """Write the one sentence that says what was found."""
    by = ranking(target)
    measured = f"{by.name.upper() if by.name == 'auc' else by.name} {words_of(metrics[by.name])}"
    seen = "" if metrics["seen_included"] else " that the training has not seen"
    if metrics["verdict"]:
        return (
            f"<p class='finding doubt'>On {metrics['slides']} slides{seen} the model {text(metrics['verdict'])}.</p>"
        )
    if "confusion" in metrics:
        right = sum(row[i] for i, row in enumerate(metrics["confusion"]))
        found = f"right for {right} of {metrics['slides']} slides{seen}"
    else:
        found = f"better than chance on {metrics['slides']} slides{seen}"
    return f"<p class=finding>The model is {found}; {text(measured)}.</p>"


def _cohort(abouts: Mapping[str, Mapping[str, Any]], config: AnyTarget, metrics: Mapping[str, Any]) -> str:
    """Write how many slides of each stratum each split or fold has, and what does not count and why."""
    entries = [read_entry(row) for row in next(iter(abouts.values()))["entries"]]
    if len(abouts) > 1:
        fold_of = _folds(abouts)
        entries = [replace(entry, split=fold_of.get(entry.slide_id, entry.split)) for entry in entries]
    names = strata(config, entries)
    counts = Counter(zip(names, (entry.split for entry in entries), strict=True))
    there = {entry.split for entry in entries}
    splits = [*sorted(there - {*SPLITS}), *(split for split in SPLITS if split in there)]
    rows = [[name, *(counts[name, split] for split in splits)] for name in sorted(set(names))]
    rows.append(["all", *(sum(entry.split == split for entry in entries) for split in splits)])
    left_out = [
        _seen(metrics),
        f"{metrics['failed']} slides could not be read; the table below says why." if metrics["failed"] else "",
        f"{metrics['unlabelled']} slides have no label." if metrics["unlabelled"] else "",
    ]
    said = " ".join(words for words in left_out if words)
    return (
        f"<p>Slides of the run, by label and split. The results are on: {text(metrics['split'])}.</p>"
        + table(["", *splits], rows)
        + (f"<p>{text(said)}</p>" if said else "")
    )


def _folds(abouts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the name of the run whose fold a slide is, by slide id; a test that all runs have is no fold."""
    held: dict[str, dict[str, set[str]]] = {}
    for name, about in abouts.items():
        held[name] = {"test": set(), "val": set(), "train": set(), "": set()}
        for row in about["entries"]:
            held[name][row["split"]].add(row["slide_id"])
    common = set.intersection(*(each["test"] for each in held.values()))
    folds = {name: each["test"] - common or each["val"] for name, each in held.items()}
    return {slide_id: name for name, ids in folds.items() for slide_id in ids}


def _results(metrics: Mapping[str, Any]) -> str:
    methods = dict.fromkeys(metrics[name]["method"] for name in metrics["measures"])
    how = "; ".join(method for method in methods if method)
    return (
        table(["", "value"], describe_metrics(metrics))
        + (f"<p class=soft>In brackets 95 % intervals over cases: {text(how)}.</p>" if how else "")
        + _confusion(metrics)
    )


def _confusion(metrics: Mapping[str, Any]) -> str:
    if "classes" not in metrics:
        return ""
    counts = zip(metrics["classes"], metrics["confusion"], strict=True)
    rows = [[f"label {name}", *row] for name, row in counts]
    return table(["", *(f"predicted {name}" for name in metrics["classes"])], rows)


def _seen(metrics: Mapping[str, Any]) -> str:
    """Write a sentence on slides that the training has seen; it is empty where there are none."""
    labelled = metrics["slides"] + (0 if metrics["seen_included"] else sum(metrics["seen"].values()))
    words = seen_words(metrics["seen"], labelled)
    return words and f"{words} and are {'counted' if metrics['seen_included'] else 'left out of the results'}."


def _warning(verdict: str) -> str:
    """Write a paragraph on what speaks against anything having been learned."""
    return f"<p class=wrong>The model {text(verdict)}.</p>" if verdict else ""


def grid(plots: Sequence[str]) -> str:
    """Lay plots out side by side."""
    return f"<div class=plots>{''.join(plots)}</div>"


def plots_of(target: Target, config: AnyTarget, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    """Plot what is true against what was answered, of the slides that count."""
    included = metrics["seen_included"]
    known = [row for row in rows if row["status"] == "ok" and is_known(config, row)]
    counted: Sequence[Mapping[str, Any]] = [row for row in known if included or not row.get("seen")]
    if not counted:
        return ""
    if by_case := metrics.get("by_case"):
        counted = answer_cases(counted, target, config, by_case["how"], by_case["positive"])
    outcomes = truth(target, config, counted, raw=True).double().numpy()
    answers = answers_of(target, counted)
    cases = case_numbers((row["case_id"], row["slide_id"]) for row in counted)
    if isinstance(target, Classes):
        labels = outcomes.astype(np.int64)
        chosen = (labels, answers, target.classes)
        return grid([roc(*chosen), precision_recall(*chosen), calibration(labels, answers, cases)]) + (
            "<p class=soft>Bands and bars are 95 % intervals by Wilson's score, slide by slide in the curves.</p>"
        )
    if isinstance(target, Regression):
        return grid([scatter(outcomes, answers[:, 0], [str(row["slide_id"]) for row in counted])])
    if isinstance(target, Cox | DiscreteSurvival):
        return grid([survival_by_risk(outcomes, risks(target, answers))])
    return ""


def _slide_pages(
    page: Path, heatmaps: Path | None, rows: Sequence[Mapping[str, Any]], annotations: Path | None
) -> tuple[dict[str, list[str]], list[Compared]]:
    """Write the page of every slide with a heatmap.

    Returns
    -------
    links, compared
        Places of the pages, from the report's folder, by sample; and how well attention finds what was outlined.
    """
    if heatmaps is None:
        return {}, []
    folders = sorted(path.parent for path in heatmaps.glob(f"*/{LOOK}"))
    if not folders:
        raise UsageError(f"{heatmaps}: no heatmaps here; give the --out of nested-ats heatmap")
    by_id = {row["slide_id"]: row for row in rows}
    place = make_folder(page.with_name(f"{page.stem}_slides"))
    links: dict[str, list[str]] = {}
    compared = []
    for folder in folders:
        look = read_look(folder)
        if look is not None:
            name, annotated = f"{folder.name}.html", compare(folder, look, annotations)
            row = by_id.get(look["sample"])
            write_atomic(place / name, slide_page(folder, look, row, page.name, annotated))
            links.setdefault(look["sample"], []).append(f"{place.name}/{name}")
            if annotated:
                compared.append(Compared(look["slide_id"], look["sample"], annotated[1], f"{place.name}/{name}"))
    if annotations and not compared:
        raise UsageError(
            f"{annotations}: no outlines of a slide with a heatmap; name them as in {folders[0].name}.geojson"
        )
    return links, compared


def _slides(
    rows: Sequence[Mapping[str, Any]], target: Target, config: AnyTarget, links: Mapping[str, Sequence[str]]
) -> str:
    """Write the table of slides, which sorts and filters: the failed ones first, then the most wrong ones."""
    names = [name for name in answer_columns(target) if rows and name in rows[0]]
    told = columns(config)
    lines = []
    for row in heapq.nlargest(_SHOWN_SLIDES, rows, key=lambda row: _doubt(row, target, config)):
        cells = [_linked(str(row["slide_id"]), links.get(row["slide_id"], ()))]
        cells += [text(row.get(name) or "") for name in (*told, "split")]
        cells.append(text(row.get("prediction") or row["error"]))
        cells += [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in names]
        mark = " class=wrong" if _is_wrong(row, target, config) else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = ("slide", *told, "split", "prediction", *names)
    heads = "".join(f"<th scope=col><button type=button>{text(name)}</button></th>" for name in head)
    return (
        "<div class=filters><label>find <input type=search id=wanted></label>"
        "<label><input type=checkbox id=wrong-only> wrong ones only</label>"
        "<span class=soft id=shown aria-live=polite></span></div>"
        "<div class=scroll tabindex=0 role=region aria-label=Slides><table class=sortable>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        + (f"<p>{len(rows) - _SHOWN_SLIDES} more in the table.</p>" if len(rows) > _SHOWN_SLIDES else "")
    )


def _linked(name: str, pages: Sequence[str]) -> str:
    """Link a sample's name to its page, or to those of its slides."""
    if len(pages) == 1:
        return f'<a href="{quote(pages[0])}">{text(name)}</a>'
    more = " ".join(f'<a href="{quote(page)}">{number}</a>' for number, page in enumerate(pages, 1))
    return f"{text(name)} {more}".strip()


def _is_wrong(row: Mapping[str, Any], target: Target, config: AnyTarget) -> bool:
    """Tell whether a slide failed, or has a label and another class was predicted."""
    if row["status"] != "ok":
        return True
    label = row.get(columns(config)[0])
    return isinstance(target, Classes) and bool(label) and row["prediction"] != label


def _doubt(row: Mapping[str, Any], target: Target, config: AnyTarget) -> tuple[bool, float]:
    """Order slides: failed ones come first, then by how far the answer is from what is true."""
    if row["status"] != "ok" or not is_known(config, row):
        return row["status"] != "ok", -math.inf
    if isinstance(target, Classes):
        label = row.get(columns(config)[0])
        return False, 1 - row.get(f"prob_{label}", 0.0)
    if isinstance(target, Regression):
        return False, abs(row["value"] - float(truth(target, config, [row])[0]))
    if isinstance(target, MultiLabel):
        answers = np.array([row[name] for name in answer_columns(target)])
        return False, float(np.nanmax(np.abs(answers - truth(target, config, [row])[0].numpy())))
    return False, 0.0
