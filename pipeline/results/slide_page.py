"""The page of one slide: where the model looked, on what, and how sure the answer is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.files import read_inside
from pipeline.results.look import ATTENTION, LOOK, THUMBNAIL
from pipeline.results.page import document, image, table, text


def read_look(folder: Path) -> dict[str, Any] | None:
    """Read what `heatmap` wrote of a slide; None where it wrote none, as an earlier version did not.

    Raises
    ------
    UsageError
        The file is damaged.
    """
    try:
        look: dict[str, Any] = json.loads(read_inside(folder, LOOK))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{folder / LOOK}: not readable ({error}); run nested-ats heatmap again") from error
    return look


def slide_page(folder: Path, look: Mapping[str, Any], row: Mapping[str, Any] | None, back: str) -> str:
    """Write the page of a slide.

    Parameters
    ----------
    folder
        The slide's folder of heatmaps.
    look
        What `read_look` returns.
    row
        The slide's row of the table of predictions, or its case's; None where it has none.
    back
        The name of the report's file, beside the folder of this page.
    """
    name = str(look["slide_id"])
    body = [
        f'<p class=soft><a href="../{text(back)}">Report</a></p><h1>{text(name)}</h1>',
        f"<p class=soft>a slide of {text(look['sample'])}</p>" if look["sample"] != name else "",
        _finding(look, row),
        "<h2>Where the model looked</h2>",
        _picture(folder, look),
        "<h2>What it saw</h2>",
        _patches(folder, look["patches"], look["draws"]),
        "<h2>How it was answered</h2>",
        _answers(look),
        _facts(look, row),
    ]
    return document(name, body)


def _finding(look: Mapping[str, Any], row: Mapping[str, Any] | None) -> str:
    label = str(row["label"]) if row and row["label"] else ""
    judged = label and look["classes"]
    doubt = " doubt" if judged and label != look["answer"] else ""
    told = f" The label is <b>{text(label)}</b>." if label else ""
    return f"<p class='finding{doubt}'>The model answers <b>{text(look['words'])}</b>.{told}</p>"


def _picture(folder: Path, look: Mapping[str, Any]) -> str:
    """Write the slide under its attention, which a slider fades, with regions, patches and a scale bar."""
    width, height = look["thumbnail_xy"]  # in level-0 pixels, a little more than the slide has
    across, down = (100 * part / whole for part, whole in zip(look["attention_xy"], (width, height), strict=True))
    thumbnail = image(_read_picture(folder, THUMBNAIL), "jpeg", f"slide {look['slide_id']}")
    place = f'style="width:{across:.4f}%;height:{down:.4f}%" class=attention id=attention'
    attention = image(_read_picture(folder, ATTENTION), "png", "attention, brighter where it is higher", place)
    shapes = [_rectangle(region, "region") for region in look["regions"]]
    shapes += [_rectangle(patch, "patch") for patch in look["patches"]]
    outlines = (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio=none aria-hidden=true>{"".join(shapes)}</svg>'
    )
    length, words = look["bar"]
    bar = f'<div class=bar style="width:{100 * length / width:.4f}%">{text(words)}</div>'
    boxes = [("patch", "patches drawn")] + ([("region", "regions opened")] if look["regions"] else [])
    shown = "".join(
        f'<label><input type=checkbox checked data-shows=".slide .{kind}"> {words}</label>' for kind, words in boxes
    )
    return (
        '<div class=controls><label>attention <input type=range min=0 max=100 value=70 data-fades="#attention">'
        f"</label>{shown}</div><div class=slide>{thumbnail}{attention}{outlines}{bar}</div>"
        f"<p class=soft>Colour begins where attention is that of chance, up to {look['peak']:.3g} times that.</p>"
    )


def _rectangle(patch: Mapping[str, Any], kind: str) -> str:
    y, x, side = (patch[name] for name in ("y", "x", "side"))
    return f'<rect class={kind} x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"/>'


def _patches(folder: Path, patches: Sequence[Mapping[str, Any]], draws: int) -> str:
    shown = [patch for patch in patches if patch.get("file")]
    if not shown:
        return "<p>No patch was drawn on this slide.</p>"
    figures = []
    for number, patch in enumerate(shown, 1):
        place = f"at y {patch['y']:.0f}, x {patch['x']:.0f}"
        about = f"share {patch['weight']:.1%}, in {patch['draws']} of {draws} draws, {place}"
        picture = image(_read_picture(folder, patch["file"]), "jpeg", f"patch {number}: {about}")
        figures.append(f"<figure>{picture}<figcaption>{text(about)}</figcaption></figure>")
    more = (
        f"<p class=soft>{len(patches) - len(shown)} lighter ones are not shown.</p>" if patches[len(shown) :] else ""
    )
    return (
        "<p>The heaviest patches at full size. The share is that of the feature from which the answer is made.</p>"
        f"<div class=patches>{''.join(figures)}</div>{more}"
    )


def _answers(look: Mapping[str, Any]) -> str:
    rows = [
        [name, *("" if value is None else f"{value:.4g}" for value in numbers)]
        for name, numbers in look["answers"].items()
    ]
    return (
        table(["", "answer", "standard error", "from", "to"], rows)
        + "<p class=soft>Error and 95 % interval are those of drawing patches at random, not of the model.</p>"
    )


def _facts(look: Mapping[str, Any], row: Mapping[str, Any] | None) -> str:
    height, width = look["shape"]
    rows = [("size", f"{width} x {height} pixels"), ("draws", str(look["draws"]))]
    if look["mpp"]:
        rows.append(("pixel size", f"{look['mpp']:g} micrometres"))
        rows.append(("area", f"{height * width * (look['mpp'] / 1000) ** 2:.3g} square millimetres"))
    if row and row.get("bytes_read") is not None:
        rows.append(("read", f"{row['bytes_read'] / 1e6:.2f} MB in {row['requests']} requests"))
    return table(["", ""], rows)


def _read_picture(folder: Path, name: str) -> bytes:
    """Read a picture that `heatmap` wrote.

    Raises
    ------
    UsageError
        It is gone.
    """
    try:
        return read_inside(folder, name)
    except FileNotFoundError as error:
        raise UsageError(f"{folder / name}: is gone; run nested-ats heatmap again") from error
