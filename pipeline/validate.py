"""``validate``: tell which pyramids are sound, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pipeline.data.discovery import expand, find_images, find_slides, is_pyramid, is_pyramid_name
from pipeline.data.manifest import Entry, is_image_file, is_manifest, read_manifest, slide_name
from pipeline.data.naming import NAME_BY
from pipeline.errors import UsageError
from pipeline.files import file_name
from pipeline.net import Net
from pipeline.progress import SlideProgress, progress
from storage import Problem, Slide, validate
from storage.read.slide import dicom_file

_SHOWN = 20  # problems of one pyramid
_NO_SOURCE = "no source image has its name, or several have"
_DECODED = 4096  # pixels, side of what is decoded of an image file at once
_NO_PYRAMID = "an image file, which is decoded and not compared with a source"


@dataclass(frozen=True)
class Validation:
    """What was found in one pyramid; ``error`` says why it cannot be looked at."""

    entry: Entry
    problems: tuple[Problem, ...]
    error: str = ""

    @property
    def sound(self) -> bool:
        """Whether the pyramid can be used, as far as could be seen."""
        return not self.error and all(problem.warning for problem in self.problems)

    @property
    def verdict(self) -> str:
        """Whether the pyramid is sound, in one line."""
        wrong = sum(not problem.warning for problem in self.problems)
        return f"{self.entry.path}: " + (f"{wrong} problem{'s' if wrong > 1 else ''}" if wrong else "sound")

    def lines(self) -> Iterator[str]:
        """Yield the verdict, and the first problems in columns: level, what and where, message."""
        if not self.error:
            yield self.verdict
        for problem in self.problems[:_SHOWN]:
            level = "" if problem.level is None else f"level {problem.level}"
            where = "" if problem.place is None else f" {problem.place[0]}, {problem.place[1]}"
            yield f"  {level:8}  {problem.what + where:14}  {problem.message}"
        if len(self.problems) > _SHOWN:
            yield f"  and {len(self.problems) - _SHOWN} more; --json shows all"


def find_pyramids(places: Sequence[str]) -> list[Entry]:
    """Find pyramids by path or URL, in folders of them, by patterns, or in one manifest; else slides where they lie.

    Raises
    ------
    UsageError
        Nothing is there, or a manifest is wrong or not alone.
    """
    if len(places) == 1 and is_manifest(places[0]):
        return read_manifest(Path(places[0]))
    found: list[str] = []
    for place in places:
        if is_manifest(place):
            raise UsageError(f"{place}: give a manifest alone, without other pyramids")
        found += expand(place, is_pyramid, is_pyramid_name) or [entry.path for entry in find_slides([place])]
    return [Entry(slide_id=slide_name(place), path=place) for place in dict.fromkeys(found)]


def find_sources(place: str) -> dict[str, str]:
    """Find the images of a folder, pattern or manifest, by slide id and by the name of the slide's pyramid.

    Images of a folder have an id by file and one by path, see `pipeline.data.naming`; an id of several is left out.

    Raises
    ------
    UsageError
        `find_images` raises it.
    """
    found: dict[str, set[str]] = {}
    for name_by in ("name",) if is_manifest(place) else NAME_BY:
        for image in find_images([place], name_by=name_by):
            for name in (file_name(image.slide_id), image.slide_id):
                found.setdefault(name, set()).add(image.path)
    return {name: paths.pop() for name, paths in found.items() if len(paths) == 1}


def validate_all(
    entries: Sequence[Entry], *, sources: dict[str, str] | None = None, full: bool = False, workers: int | None = None
) -> list[Validation]:
    """Look at slides one after another. Image files are opened, and TIFFs are decoded if `full`, others always.

    Parameters
    ----------
    entries
        The pyramids and image files.
    sources
        The images by slide id to compare level 0 with, see `find_sources`; with them, `full` is meant.
    full
        Whether to decode every chunk, see `storage.validate`.
    workers
        The number of threads, by default one for each processor.

    Returns
    -------
    One Validation for each entry, in their order.
    """
    results = []
    with progress("validate") as update:
        shown = SlideProgress(update, len(entries))
        for entry in entries:
            shown.begin(entry.slide_id)
            source = None if sources is None else sources.get(entry.slide_id)
            lacking = [] if sources is None or source else [Problem(0, None, "unchecked", _NO_SOURCE)]
            with Net() as net:
                if is_image_file(entry.path) or dicom_file(entry.path):
                    with Slide(entry.path) as slide:
                        if full:
                            _decode(slide, shown.on_bytes)
                    found = [Problem(0, None, "unchecked", _NO_PYRAMID)] if source else []
                else:
                    found = validate(
                        entry.path,
                        source=source,
                        full=full or sources is not None,
                        progress=shown.on_bytes,
                        workers=workers,
                    )
                results.append(Validation(entry, (*lacking, *found)))
            if net.error:
                results.append(Validation(entry, (), net.error))
            shown.end()
    return results


def _decode(slide: Slide, progress: Callable[[int, int], None]) -> None:
    """Decode all levels that an image file has; raises `storage.StorageError` for what is damaged."""
    stored = [(number, level) for number, level in enumerate(slide.levels) if level.made_of is None]
    pixel = len(slide.channels) * slide.dtype.itemsize
    total, done = sum(level.shape_yx[0] * level.shape_yx[1] for _, level in stored) * pixel, 0
    progress(done, total)
    for number, level in stored:
        height, width = level.shape_yx
        step = min(level.chunk or _DECODED, _DECODED)  # OpenSlide does not tell its tiles
        for y, x in product(range(0, height, step), range(0, width, step)):
            done += slide.read(number, (y, x, min(step, height - y), min(step, width - x))).nbytes
            progress(done, total)
