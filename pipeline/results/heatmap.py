"""``heatmap``: show where the model looked, and what each place said, beside the slide, in a picture, and for QuPath.

`explain` finds it, `map_files` writes it for other programs, and `look` for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from nested_ats import Target
from nested_ats.models.patches import PatchModel
from nested_ats.networks.builtin import GIVEN
from pipeline.data.cases import group_cases
from pipeline.data.crs import needed
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.errors import UsageError
from pipeline.files import file_name, make_folder
from pipeline.net import Net
from pipeline.progress import progress
from pipeline.results.classifier import Classifier
from pipeline.results.explain import explain
from pipeline.results.look import Look, write_look
from pipeline.results.map_files import USUAL_FORMATS, write_files
from pipeline.results.overlay import draw_picture
from pipeline.results.places import georeference_of
from pipeline.results.settings import Settings


@dataclass(frozen=True)
class Heatmap:
    """What was written for one slide, or why nothing was."""

    slide_id: str
    folder: Path
    prediction: str = ""
    peak: float = 0.0  # the highest attention, in multiples of the uniform one
    error: str = ""
    remark: str = ""  # why patches of a scene are not in WGS 84


def heatmaps(
    entries: Sequence[Entry],
    settings: Settings,
    folder: Path,
    *,
    formats: Sequence[str] = USUAL_FORMATS,
    dense: bool = False,
    answer: str = "",
) -> list[Heatmap]:
    """Write the heatmap of every slide into ``folder/SLIDE``; one that fails is reported and the others go on.

    Parameters
    ----------
    entries
        The slides.
    settings
        The settings of the predictions that the heatmaps explain: equal settings draw equal patches.
    folder
        The folder to write to, which is made where it is missing.
    formats
        Some of `pipeline.results.map_files.FORMATS`; a GeoTIFF needs a slide with a georeference.
    dense
        Whether to open every region and encode every patch, for maps of attention and contribution that nothing was
        drawn for. That costs what a model over all patches costs.
    answer
        The class, label or time that contributions are told of; by default the likeliest one of each slide.

    Raises
    ------
    nested_ats.ModelFileError
        The model cannot be loaded.
    UsageError
        `folder` cannot be written to, the model has no attention or no such answer, or a GeoTIFF is asked for
        without rasterio.
    """
    if "geotiff" in formats:
        needed("rasterio", "--format geotiff")
    classifier = Classifier(settings)
    if not isinstance(classifier.model, PatchModel):
        raise UsageError(
            f"{settings.model}: a model without patches looks everywhere alike, so there is nothing to draw"
        )
    if classifier.model.config.encoder_name == GIVEN:
        raise UsageError(f"{settings.model}: a model of features that were given; a heatmap is drawn on slides")
    number = _number_of(classifier.model.target, answer)
    make_folder(folder)
    if settings.unit == "case":
        entries = group_cases(entries, ())
    done: list[Heatmap] = []
    with progress("heatmap") as update:
        for count, entry in enumerate(entries):

            def tell(share: float, count: int = count, name: str = entry.slide_id) -> None:
                update(count + share, len(entries), name)

            with Net() as net:
                done += _heatmap(classifier, entry, folder, formats, dense=dense, answer=number, tell=tell)
            if net.error:
                done.append(Heatmap(entry.slide_id, folder / file_name(entry.slide_id), error=net.error))
            tell(1.0)
    return done


def _number_of(target: Target, answer: str) -> int | None:
    """Return the number of an answer; None where none is named."""
    if answer and answer not in target.names:
        raise UsageError(f"--answer {answer}: the model answers {', '.join(target.names)}; name one of them")
    return target.names.index(answer) if answer else None


def _heatmap(
    classifier: Classifier,
    entry: Entry,
    folder: Path,
    formats: Sequence[str],
    *,
    dense: bool,
    answer: int | None,
    tell: Callable[[float], object],
) -> list[Heatmap]:
    """Write the heatmaps of a sample: of a slide, or of each slide of a case."""
    with classifier.opened(entry) as image:
        opened = [each for each in image.slides if isinstance(each, SlideImage)]  # all: features were refused
        for each in opened if "geotiff" in formats else []:
            georeference_of(each.slide)  # what cannot be written is said before anything is computed
        looks = explain(classifier, entry, image, dense=dense, answer=answer, tell=tell)
        slides = zip(entry.slides or [entry], opened, looks, strict=True)
        return [_write(one, slide, look, folder, formats) for one, slide, look in slides]


def _write(entry: Entry, image: SlideImage, look: Look, folder: Path, formats: Sequence[str]) -> Heatmap:
    """Write the heatmap of a slide into its own folder."""
    slide, name = image.slide, entry.slide_id
    place = make_folder(folder / file_name(name))
    heat, fill, channels = look.maps["attention"], image.fill, image.numbers
    title = f"{name}: {look.about['words']}"
    remark = write_files(
        place,
        slide,
        look.maps,
        look.pitch,
        look.patches,
        look.regions,
        formats=formats,
        titles={
            "attention": f"attention of {name}, times uniform",
            "percentile": f"attention of {name}, percentile",
            "contribution": f"contribution to the {look.about['score']['name']} of {name}",
        },
        picture=partial(draw_picture, slide, heat, look.pitch, look.patches, title, fill=fill, channels=channels),
    )
    named = replace(look, about={"slide_id": name, **look.about})
    write_look(place, slide, named, fill=fill, channels=channels)
    return Heatmap(name, place, look.about["answer"], float(np.nanmax(heat)), remark=remark)
