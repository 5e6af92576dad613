"""Slides in Jupyter: the page of ``nested-ats view``, in a cell."""

from __future__ import annotations

import html
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.crs import needed
from pipeline.data.manifest import Entry, slide_name
from pipeline.errors import DataError, UsageError
from pipeline.results.map_files import MAP
from storage import Slide, write_pyramid
from storage.place.urls import is_remote

Place = str | os.PathLike[str]


class View:
    """A slide that is shown until it is closed, or this process ends; `view` makes it.

    Attributes
    ----------
    url : address of the page, on this machine alone
    height : of the cell, pixels
    """

    def __init__(self, case: Any, height: int, made: tempfile.TemporaryDirectory[str] | None) -> None:
        from pipeline.view.serving import Serving

        self._made, self._serving = made, Serving([case], framed=True)
        self.url, self.height = self._serving.url, height

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{html.escape(self.url)}" title="Viewer of a slide" width="100%" height="{self.height}" '
            'style="border: 0" allow="fullscreen"></iframe>'
        )

    def close(self) -> None:
        """End the server, and remove what was made for it."""
        self._serving.close()
        if self._made:
            self._made.cleanup()


def view(
    slide: Place | Slide,
    *,
    attention: Place | NDArray[Any] | None = None,
    annotations: Place | None = None,
    mask: Place | None = None,
    tissue: bool = False,
    height: int = 640,
) -> View:
    """Show a slide in a cell, at any zoom.

    Parameters
    ----------
    slide
        A slide, or its path or URL.
    attention
        The folder of a slide that `nested-ats heatmap` wrote, with its patches and regions; the path of an attention
        map alone; or an array (H, W) of weights, not negative, that lies over the whole slide, and is shown in
        multiples of its mean.
    annotations
        Path or URL of outlines as GeoJSON, in pixels of the slide, as QuPath exports them.
    mask
        Path or URL of a mask of the slide, GeoJSON or an image, which is outlined.
    tissue
        Whether to find tissue and outline it, where there is no mask.
    height
        Of the cell, in pixels.

    Returns
    -------
    An object that Jupyter shows as the page. The browser must run on the machine of the kernel, or reach its port
    (``ssh -L PORT:127.0.0.1:PORT``).

    Raises
    ------
    UsageError
        The packages of the extra ``view`` are not installed, or there is no attention at the place that was named.
    DataError
        The array is no attention over this slide.
    """
    for package in ("starlette", "uvicorn"):
        needed(package, "a viewer", extra="view")
    from pipeline.view.cohort import Case, drawn_in

    place = slide.location if isinstance(slide, Slide) else os.fspath(slide)
    path = place if is_remote(place) else os.path.abspath(place)
    entry = Entry(slide_id=slide_name(path), path=path, mask=_text(mask))
    outlines = {name: _text(where) for name, where in (("annotations", annotations), ("tissue", mask)) if where}
    made: tempfile.TemporaryDirectory[str] | None = None
    found = added = ""
    if isinstance(attention, np.ndarray):
        weights = _checked(attention)
        made = tempfile.TemporaryDirectory(prefix="nested-ats-")
        found = str(Path(made.name, MAP))
        _write_map(found, weights, path)
    elif attention is not None:
        drawn = drawn_in(Path(attention))
        found, added = drawn.pop("attention", os.fspath(attention)), drawn.pop("contribution", "")
        outlines |= drawn
        if not Path(found).exists():
            raise UsageError(f"{found}: does not exist; give a folder SLIDE below the --out of nested-ats heatmap")
    case = Case(entry=entry, attention=found, contribution=added, outlines=outlines, find_tissue=tissue)
    return View(case, height, made)


def _text(place: Place | None) -> str:
    return os.fspath(place) if place else ""


def _checked(attention: NDArray[Any]) -> NDArray[np.float32]:
    weights = np.asarray(attention, np.float32)
    if weights.ndim != 2 or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise DataError(
            f"attention of shape {weights.shape}: give an array (H, W) of weights that are finite, not negative, and "
            "not all zero"
        )
    return weights


def _write_map(place: str, weights: NDArray[np.float32], path: str) -> None:
    """Write (H, W) weights as a map over a slide, as `heatmap` does."""
    with Slide(path) as slide:
        pitch = max(side / cells for side, cells in zip(slide.shape_yx, weights.shape, strict=True))
        write_pyramid(place, weights[None] / weights.mean(), mpp=slide.mpp, downsample=pitch)
