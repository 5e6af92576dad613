"""The page of one slide: where the model looked, on what, and how sure the answer is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.outlines import flat_rings
from pipeline.errors import UsageError
from pipeline.files import read_inside
from pipeline.results.localise import Annotation, Localised
from pipeline.results.look import ATTENTION, CONTRIBUTION, LOOK, THUMBNAIL
from pipeline.results.page import document, image, table, text


def read_look(folder: Path) -> dict[str, Any] | None:
    """Read what `heatmap` wrote of a slide; None where it wrote none, as an earlier version did not.

    Raises
    ------
    UsageError
        The file is damaged, or of an earlier version.
    """
    try:
        look: dict[str, Any] = json.loads(read_inside(folder, LOOK))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{folder / LOOK}: not readable ({error}); run nested-ats heatmap again") from error
    if "score" not in look:
        raise UsageError(f"{folder / LOOK}: of an earlier version; run nested-ats heatmap again")
    return look


def slide_page(
    folder: Path,
    look: Mapping[str, Any],
    row: Mapping[str, Any] | None,
    back: str,
    annotated: tuple[Annotation, Localised] | None = None,
) -> str:
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
    annotated
        What somebody has outlined on the slide, and how well attention finds it; None where nobody has.
    """
    name = str(look["slide_id"])
    body = [
        f'<p class=soft><a href="../{text(back)}">Report</a></p><h1>{text(name)}</h1>',
        f"<p class=soft>a slide of {text(look['sample'])}</p>" if look["sample"] != name else "",
        _finding(look, row),
        "<h2>Where the model looked</h2>",
        _picture(folder, look, annotated[0] if annotated else None),
        _localised(annotated[1]) if annotated else "",
        "<h2>What it saw</h2>",
        _patches(folder, look),
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


def _picture(folder: Path, look: Mapping[str, Any], annotation: Annotation | None) -> str:
    """Write the slide under its maps, which sliders fade, with outlines, regions, patches and a scale bar."""
    width, height = look["thumbnail_xy"]  # in level-0 pixels, a little more than the slide has
    across, down = (100 * part / whole for part, whole in zip(look["attention_xy"], (width, height), strict=True))
    pictures = [image(_read_picture(folder, THUMBNAIL), "jpeg", f"slide {look['slide_id']}")]
    size = f"width:{across:.4f}%;height:{down:.4f}%"
    maps = {"attention": (ATTENTION, 70, "attention, brighter where it is higher")}
    if "strongest" in look:
        maps["contribution"] = (CONTRIBUTION, 0, "contribution, red where it speaks for the answer, blue against it")
    sliders = []
    for name, (file, shown, words) in maps.items():
        place = f'style="{size}" class=map id={name}'
        pictures.append(image(_read_picture(folder, file), "png", words, place))
        slider = f'<input type=range min=0 max=100 value={shown} data-fades="#{name}">'
        sliders.append(f"<label>{name} {slider}</label>")
    shapes = {
        "tissue": ("tissue", _path(look["tissue"], "tissue")),
        "annotation": ("annotation", _path(flat_rings(annotation.lesions), "annotation") if annotation else ""),
        "region": ("regions opened", "".join(_rectangle(region, "region") for region in look["regions"])),
        "patch": ("patches drawn", "".join(_rectangle(patch, "patch") for patch in look["patches"])),
    }
    boxes = [
        f'<label><input type=checkbox checked data-shows=".slide .{kind}"><i class="key {kind}"></i> {words}</label>'
        for kind, (words, drawn) in shapes.items()
        if drawn
    ]
    drawn = "".join(each for _, each in shapes.values())
    outlines = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio=none aria-hidden=true>{drawn}</svg>'
    length, words = look["bar"]
    bar = f'<div class=bar style="width:{100 * length / width:.4f}%">{text(words)}</div>'
    return (
        f"<div class=controls>{''.join([*sliders, *boxes])}</div>"
        f"<div class=slide>{''.join(pictures)}{outlines}{bar}</div>{_legend(look)}"
    )


def _legend(look: Mapping[str, Any]) -> str:
    """Say what the colours mean."""
    words = f"Attention: colour begins where it is that of chance, up to {look['peak']:.3g} times that."
    if "strongest" in look:
        words += (
            f" Contribution to the {look['score']['name']}: red cells add to it, blue ones take from it, up to "
            f"{look['strongest']:.2g} each."
        )
    return f"<p class=soft>{text(words)}</p>"


def _path(rings: Sequence[Sequence[float]], kind: str) -> str:
    """Draw rings, flat lists x, y, x, y ..., as one path."""
    moves = ["M" + " ".join(f"{value:g}" for value in ring) + "Z" for ring in rings]
    return f'<path class={kind} d="{"".join(moves)}"/>' if moves else ""


def _localised(found: Localised) -> str:
    """Say how well attention finds what was outlined."""
    if found.area is not None:
        words = f"Localisation AUC of attention {found.area:.3f}: the chance that a cell of the annotation has more."
    elif len(found.found):
        words = "The annotation has no cell, or all cells, of what the model could draw."
    else:
        words = "The annotation says that there is nothing to be found."
    hit = int((found.found > found.false.max(initial=0)).sum())
    lesions = len(found.found)
    if lesions:
        words += (
            f" Local maxima of attention lie in {int((found.found > 0).sum())} of {lesions} outlined regions, and in "
            f"{hit} of them one is higher than any of the {len(found.false)} outside."
        )
    return f"<p class=localised>{text(words)}</p>"


def _rectangle(patch: Mapping[str, Any], kind: str) -> str:
    y, x, side = (patch[name] for name in ("y", "x", "side"))
    return f'<rect class={kind} x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}"/>'


def _patches(folder: Path, look: Mapping[str, Any]) -> str:
    patches, draws = look["patches"], look["draws"]
    shown = [patch for patch in patches if patch.get("file")]
    if not shown:
        return "<p>No patch was drawn on this slide.</p>"
    most = max(abs(patch["contribution"]) for patch in patches) or 1.0
    figures = []
    for number, patch in enumerate(shown, 1):
        place = f"at y {patch['y']:.0f}, x {patch['x']:.0f}"
        about = f"share {patch['weight']:.1%}, in {patch['draws']} of {draws} draws, {place}"
        picture = image(_read_picture(folder, patch["file"]), "jpeg", f"patch {number}: {about}")
        added = _added(patch["contribution"], most)
        figures.append(f"<figure>{picture}<figcaption>{added}{text(about)}</figcaption></figure>")
    more = (
        f"<p class=soft>{len(patches) - len(shown)} lighter ones are not shown.</p>" if patches[len(shown) :] else ""
    )
    return f"{_decision(look)}<div class=patches>{''.join(figures)}</div>{more}"


def _added(contribution: float, most: float) -> str:
    """Write a contribution with a bar from the middle: to the right where it adds, to the left where it takes."""
    digits = max(0, 2 - math.floor(math.log10(most)))
    side, share = ("for" if contribution >= 0 else "against"), 50 * abs(contribution) / most
    return (
        f"<b class=added>{contribution:+.{digits}f}</b>"
        f'<span class=scale aria-hidden=true><i class={side} style="width:{share:.1f}%"></i></span>'
    )


def _decision(look: Mapping[str, Any]) -> str:
    """Say what contributions are, and what they add up to."""
    score, on_slide = look["score"], sum(patch["contribution"] for patch in look["patches"])
    of_others = score["value"] - score["offset"] - on_slide
    of_case = look["sample"] != look["slide_id"]
    others = f", {of_others:+.3g} with those on other slides of the case" if of_case else ""
    exact = score["dense"]
    whole = "" if exact is None else f" Of all patches, none left out, it is {exact:.3g}."
    return (
        "<p>The heaviest patches at full size. The share is that of the feature from which the answer is made; the "
        f"number above it is what the patch adds to the {text(score['name'])}: what that would lose without it.</p>"
        f"<p>The {text(score['name'])} is {score['offset']:.3g} without any patch, {on_slide:+.3g} with the "
        f"{len(look['patches'])} patches drawn here{others}: {score['value']:.3g} in all.{whole}</p>"
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
