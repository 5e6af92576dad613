"""What a viewer answers: the page, the list of slides, their tiles, attention and outlines.

Slides are asked for by their number in the list, never by a path. Nothing is written, and of a slide's file only the
pixels of the image itself are read: neither label nor overview photograph, and no field about a patient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from nested_ats.config import EncoderConfig
from pipeline.data.crs import metres_per_pixel
from pipeline.data.manifest import Entry
from pipeline.data.outlines import objects_of, to_outlines
from pipeline.data.samples import SampleCache
from pipeline.data.slides import Opening, SlideImage
from pipeline.data.tissue import find_mask
from pipeline.errors import DataError, PipelineError
from pipeline.view import paint, tiles
from pipeline.view.cohort import LAYERS, Case
from pipeline.view.objects import objects_in, plain_objects
from pipeline.view.paint import Heat, Look
from pipeline.view.work import LONG, Answer, Task, Work
from storage import Slide

STATIC = Path(__file__).parent / "static"
_PEAK_PIXELS = 2**24  # of an attention map that are looked at for its largest value
_LEAST_PEAK = 1.1  # where attention is even, the scale of colours still needs two ends
_LEAST_CONTRIBUTION, _FAINT = 1e-9, 0.02  # likewise; and the part of the peak that is not shown at first
_MAPS = ("attention", "contribution")
_RIGHT = 2.0  # cells by which an attention map may be larger than its slide
_UNFOUND = 404
_FAILED = 422


class Viewer:
    """The slides of a viewer, and the answers about them.

    Parameters
    ----------
    cases
        The slides, in the order in which they are listed.
    work
        Does the work; see `Work`.
    opening
        How slides are opened; see `pipeline.data.slides.Opening`.
    """

    def __init__(self, cases: Sequence[Case], work: Work, opening: Opening) -> None:
        self.cases, self._work = list(cases), work
        self._open_slides = SampleCache(EncoderConfig(), **opening)
        self._ranges: dict[int, list[tuple[float, float]]] = {}
        self._heats: dict[tuple[int, str], Heat] = {}

    def routes(self) -> list[Route | Mount]:
        """All that is answered."""
        case, tile = "/slides/{number:int}", "{halvings:int}/{row:int}_{column:int}"
        return [
            Route("/", self._page),
            Route("/slides", self._list),
            Route(case, self._answer(self._about)),
            Route(f"{case}/thumbnail", self._answer(self._thumbnail)),
            Route(f"{case}/tiles/{tile}", self._answer(self._tile)),
            Route(f"{case}/maps/{{name}}", self._answer(self._about_map)),
            Route(f"{case}/maps/{{name}}/{tile}", self._answer(self._map_tile)),
            Route(f"{case}/outlines/{{layer}}", self._answer(self._outlines)),
            Route("/colours/{name}", self._legend),
            Mount("/static", StaticFiles(directory=STATIC, packages=[("pipeline.results", "static")])),  # its colours
        ]

    async def _page(self, _: Request) -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type="text/html")

    async def _list(self, _: Request) -> Response:
        return JSONResponse([_listed(case) for case in self.cases])

    async def _legend(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in (*paint.COLOUR_MAPS, paint.DIVERGING):
            raise HTTPException(_UNFOUND)
        return Response(paint.legend(name), media_type="image/png")

    def _answer(self, make: Callable[[Task, Case, int, Request], Answer]) -> Callable[[Request], Any]:
        """Make the handler of requests that need work on a slide."""

        async def handle(request: Request) -> Response:
            number = request.path_params["number"]
            if number >= len(self.cases):
                return _refused(f"no slide {number}; reload the page", _UNFOUND)
            case = self.cases[number]
            answer = await self._work.answer(request, lambda task: make(task, case, number, request))
            if answer.error:
                return _refused(answer.error, _FAILED)
            # Pixels of patients are not to lie in the cache of a browser, which may be on a disk.
            return Response(answer.content, media_type=answer.media_type, headers={"Cache-Control": "no-store"})

        return handle

    def _about(self, _task: Task, case: Case, number: int, request: Request) -> Answer:
        del request
        slide = self._open(case.entry)
        look = self._look(number, slide)
        largest = None if slide.dtype.kind == "f" else slide.largest_value
        return _json(
            {
                **_listed(case),
                "probabilities": case.probabilities,
                "height": slide.shape_yx[0],
                "width": slide.shape_yx[1],
                "tile": tiles.TILE,
                "halvings": tiles.coarsest(slide.shape_yx),
                "pixel_um": _pixel_um(case.entry, slide),
                "scanned": bool(case.entry.mpp or slide.mpp),
                "type": str(slide.dtype),
                "range": [0 if slide.dtype.kind == "u" else None, largest],
                "channels": list(slide.channels),
                "look": paint.plain_look(look),
                "ranges": self._ranges[number],
                "colours": paint.is_photograph(slide),
                "gaps": slide.has_gaps,
                "maps": [name for name in _MAPS if getattr(case, name)],
                "outlines": [layer for layer in LAYERS if _has(case, layer, slide)],
                "remark": _remark(slide),
            }
        )

    def _thumbnail(self, task: Task, case: Case, number: int, request: Request) -> Answer:
        del request
        slide = self._open(case.entry)
        if remark := _remark(slide):  # those of many such slides would keep the tiles of one waiting
            raise DataError(remark)
        return self._draw(task, slide, tiles.whole(slide.shape_yx), paint.painter(slide, self._look(number, slide)))

    def _tile(self, task: Task, case: Case, number: int, request: Request) -> Answer:
        slide = self._open(case.entry)
        look = paint.read_look(request.query_params, slide, self._look(number, slide))
        return self._draw(task, slide, _asked(request), paint.painter(slide, look))

    def _map_tile(self, task: Task, case: Case, number: int, request: Request) -> Answer:
        heat = self._map(case, name := request.path_params["name"])
        how = paint.read_heat(request.query_params, self._heat(number, name, heat))
        return self._draw(task, heat, _asked(request), paint.heat_painter(how))

    def _draw(self, task: Task, slide: Slide, tile: tiles.Tile, how: tiles.Paint) -> Answer:
        if not tiles.is_there(tile, slide.shape_yx):
            raise DataError(f"{slide.name}: no tile {tile.halvings}/{tile.row}_{tile.column}; reload the page")
        task.costs(tiles.cost(slide, tile))
        media_type, content = paint.encode(tiles.draw_tile(slide, tile, how, task.check))
        return Answer(content, media_type)

    def _about_map(self, _task: Task, case: Case, number: int, request: Request) -> Answer:
        name = request.path_params["name"]
        heat, slide = self._map(case, name), self._open(case.entry)
        pitch = [own / of for own, of in zip(heat.levels[0].scale_yx, slide.levels[0].scale_yx, strict=True)]
        spans = [cells * side for cells, side in zip(heat.shape_yx, pitch, strict=True)]
        pairs = zip(spans, slide.shape_yx, pitch, strict=True)
        if any(abs(span - side) > _RIGHT * cell for span, side, cell in pairs):
            raise DataError(
                f"{getattr(case, name)}: lies over {spans[0]:.0f} x {spans[1]:.0f} pixels, and the slide has "
                f"{slide.shape_yx[0]} x {slide.shape_yx[1]}; draw the heatmap of this slide"
            )
        how = self._heat(number, name, heat)
        return _json(
            {
                "height": heat.shape_yx[0],
                "width": heat.shape_yx[1],
                "halvings": tiles.coarsest(heat.shape_yx),
                "pitch": pitch[1],
                "low": how.low,
                "high": how.high,
                "colours": how.colours,
                "colour_maps": [how.colours] if name == "contribution" else list(paint.COLOUR_MAPS),
            }
        )

    def _outlines(self, _task: Task, case: Case, number: int, request: Request) -> Answer:
        del number
        layer = request.path_params["layer"]
        slide = self._open(case.entry)
        if not _has(case, layer, slide):
            raise DataError(f"{case.entry.slide_id}: has no {layer}; reload the page")
        if layer != "tissue":
            return _json(objects_in(case.outlines[layer], slide.shape_yx))
        found = find_mask(slide, case.entry, "column" if case.entry.mask else "tissue")
        outlines = objects_of(to_outlines(found.pixels, found.pitch_yx, "tissue"))
        return _json(plain_objects(outlines, case.entry.path, slide.shape_yx))

    def _open(self, entry: Entry) -> Slide:
        image = self._open_slides.open(entry).slides[0]
        assert isinstance(image, SlideImage)  # noqa: S101  files of features were refused
        return image.slide

    def _map(self, case: Case, name: str) -> Slide:
        path = getattr(case, name) if name in _MAPS else ""
        if not path:
            raise DataError(f"{case.entry.slide_id}: has no {name} map; draw one by nested-ats heatmap")
        heat = self._open(Entry(slide_id=case.entry.slide_id, path=path))
        if len(heat.channels) != 1:
            raise DataError(f"{path}: has {len(heat.channels)} channels, and {name} is one; give a map")
        return heat

    def _look(self, number: int, slide: Slide) -> Look:
        """How a slide is shown at first."""
        if number not in self._ranges:
            self._ranges[number] = paint.find_ranges(slide)
        return paint.default_look(slide, self._ranges[number])

    def _heat(self, number: int, name: str, heat: Slide) -> Heat:
        """How a map is shown at first: from the uniform attention, or a little contribution, to its peak."""
        if (number, name) not in self._heats:
            sizes = [math.prod(level.shape_yx) for level in heat.levels]
            level = next((i for i, size in enumerate(sizes) if size <= _PEAK_PIXELS), len(sizes) - 1)
            values = np.nan_to_num(heat.read(level, (0, 0, *heat.levels[level].shape_yx)), posinf=0, neginf=0)
            peak = float(np.abs(values).max())
            if name == "contribution":
                how = Heat(paint.DIVERGING, max(peak, _LEAST_CONTRIBUTION) * _FAINT, max(peak, _LEAST_CONTRIBUTION))
            else:
                how = Heat(paint.COLOUR_MAPS[0], 1.0, max(peak, _LEAST_PEAK))
            self._heats[number, name] = how
        return self._heats[number, name]


def application(viewer: Viewer) -> Starlette:
    """Make the application, which answers in JSON what goes wrong."""

    def refuse(_: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 500
        return _refused("there is nothing of this kind here" if code == _UNFOUND else "not possible", code)

    made = Starlette(routes=viewer.routes(), exception_handlers={HTTPException: refuse})
    made.router.redirect_slashes = False  # an address is there, or it is not
    return made


def _refused(error: str, code: int) -> Response:
    return JSONResponse({"error": error}, code, headers={"Cache-Control": "no-store"})


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value, allow_nan=False).encode())


def _asked(request: Request) -> tiles.Tile:
    return tiles.Tile(*(request.path_params[name] for name in ("halvings", "row", "column")))


def _listed(case: Case) -> dict[str, Any]:
    """What the list says of a slide."""
    return {
        "id": case.entry.slide_id,
        "label": case.label,
        "prediction": case.prediction,
        "probability": case.probabilities.get(case.prediction),
        "error": str(case.row.get("error") or ""),
    }


def _has(case: Case, layer: str, slide: Slide) -> bool:
    """Tell whether a slide has a layer; tissue is found where it is told by its colour."""
    can_be_found = case.find_tissue and paint.is_photograph(slide)
    return layer in case.outlines or (layer == "tissue" and can_be_found)


def _pixel_um(entry: Entry, slide: Slide) -> float | None:
    """Micrometres per pixel of the finest level; of a scene on the Earth, too, where its CRS is known."""
    if entry.mpp or slide.mpp or slide.georeference is None:
        return entry.mpp or slide.mpp
    with suppress(PipelineError):
        metres = metres_per_pixel(slide.georeference, slide.location)
        return metres and metres[1] * 1e6
    return None


def _remark(slide: Slide) -> str:
    """Say so where views of the whole slide are slow to make."""
    stored = max(level.downsample for level in slide.levels if level.made_of is None)
    if tiles.cost(slide, tiles.whole(slide.shape_yx)) <= LONG:
        return ""
    return (
        f"Its file stores no level coarser than 1:{stored:g}: views of the whole are made of all its pixels, and "
        "take a while. nested-ats convert makes a pyramid of it, once."
    )
