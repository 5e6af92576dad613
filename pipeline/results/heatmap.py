"""``heatmap``: show where the model looked, as an image beside the slide, a picture, and objects for QuPath.

All are aligned by level-0 coordinates: the map is a multiscale OME-Zarr with the slide's own scale, the
picture lays slide and map out in level-0 pixels, and the GeoJSON's polygons are in level-0 pixels. Of a scene that
lies on the Earth, polygons come in WGS 84 too, and the map as a GeoTIFF where it is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nested_ats import Classes, Image, Prediction
from nested_ats.cells import box_starts
from nested_ats.config import ModelConfig, PatchConfig
from nested_ats.maps import attention_map
from nested_ats.models.patches import PatchModel
from nested_ats.networks.builtin import GIVEN
from pipeline.data.cases import group_cases
from pipeline.data.crs import needed
from pipeline.data.manifest import Entry
from pipeline.data.samples import Sample
from pipeline.data.slides import SlideImage
from pipeline.errors import PipelineError, UsageError
from pipeline.files import file_name, make_folder, write_atomic
from pipeline.net import Net
from pipeline.progress import progress
from pipeline.results.classifier import Classifier
from pipeline.results.look import Patch, answered, bar_of, read_patch, write_look
from pipeline.results.pictures import thumbnail, to_png, to_rgb
from pipeline.results.places import attention_geotiff, georeference_of, in_wgs84
from pipeline.results.predictions import in_short
from pipeline.results.settings import Settings
from storage import Slide, write_pyramid

MAP, PICTURE, OBJECTS = "attention.ome.zarr", "overlay.png", "patches.geojson"
PIXEL_OBJECTS = "patches-pixels.geojson"  # where `OBJECTS` is in WGS 84
REGIONS = "regions.geojson"  # in pixels: what the model opened on its way to the patches, where it has several levels
GEOTIFF = "attention.tif"
_PICTURE_PIXELS = 1600  # the longer side of the slide in the picture has no more
_SHOWN_PATCHES = 8
_PATCH, _REGION = (230, 60, 30), (20, 120, 220)  # colours in QuPath


@dataclass(frozen=True)
class Heatmap:
    """What was written for one slide, or why nothing was."""

    slide_id: str
    folder: Path
    prediction: str = ""
    peak: float = 0.0  # the highest attention, in multiples of the uniform one
    error: str = ""
    remark: str = ""  # why patches of a scene are not in WGS 84


def heatmaps(entries: Sequence[Entry], settings: Settings, folder: Path, *, geotiff: bool = False) -> list[Heatmap]:
    """Write the heatmap of every slide into ``folder/SLIDE``; one that fails is reported and the others go on.

    Parameters
    ----------
    entries
        The slides.
    settings
        The settings of the predictions that the heatmaps explain: equal settings draw equal patches.
    folder
        The folder to write to, which is made where it is missing.
    geotiff
        Whether to write the attention of each slide as a GeoTIFF too, for which a slide needs a georeference.

    Raises
    ------
    nested_ats.ModelFileError
        The model cannot be loaded.
    UsageError
        `folder` cannot be written to, the model has no attention, or `geotiff` is asked for without rasterio.
    """
    if geotiff:
        needed("rasterio", "--geotiff")
    classifier = Classifier(settings)
    if not isinstance(classifier.model, PatchModel):
        raise UsageError(
            f"{settings.model}: a model without patches looks everywhere alike, so there is nothing to draw"
        )
    if classifier.model.config.encoder_name == GIVEN:
        raise UsageError(f"{settings.model}: a model of features that were given; a heatmap is drawn on slides")
    make_folder(folder)
    if settings.unit == "case":
        entries = group_cases(entries, ())
    done: list[Heatmap] = []
    with progress("heatmap") as update:
        for number, entry in enumerate(entries):
            with Net() as net:
                done += _heatmap(classifier, entry, folder, geotiff=geotiff)
            if net.error:
                done.append(Heatmap(entry.slide_id, folder / file_name(entry.slide_id), error=net.error))
            update(number + 1, len(entries), entry.slide_id)
    return done


class _Look(NamedTuple):
    """Where a model looked in one slide: what is drawn and written of it."""

    about: dict[str, Any]  # what was answered (`pipeline.results.look.answered`)
    answer: str  # in short
    words: str  # the answer, with its probability if it has one
    heat: NDArray[np.float32]  # (H, W), the attention as multiples of the uniform one
    pitch: float  # pixels of the model's finest level to one of `heat`
    patches: list[Patch]
    regions: list[Patch]


def _heatmap(classifier: Classifier, entry: Entry, folder: Path, *, geotiff: bool) -> list[Heatmap]:
    """Write the heatmaps of a sample: of a slide, or of each slide of a case."""
    with classifier.opened(entry) as image:
        opened = [each for each in image.slides if isinstance(each, SlideImage)]  # all: features were refused
        for each in opened if geotiff else []:
            georeference_of(each.slide)  # what cannot be written is said before anything is computed
        looks = _look(classifier, entry, image)
        slides = zip(entry.slides or [entry], opened, looks, strict=True)
        return [_write(one, slide, look, folder, geotiff=geotiff) for one, slide, look in slides]


def _look(classifier: Classifier, entry: Entry, image: Sample) -> list[_Look]:
    """Find where the model looks in each slide of a sample."""
    config, target = classifier.model.config, classifier.model.target
    assert isinstance(config, PatchConfig)  # noqa: S101  seen in `heatmaps`
    prediction = classifier.estimate(entry, image)
    density, pitch = attention_map(prediction.outputs, image.shapes[0])
    places = [(corner, _cells(slide, pitch)) for slide, corner in image.places()]
    # As multiples of the uniform attention, numbers mean the same on samples of any size.
    heat = (density * sum(rows * columns for _, (rows, columns) in places)).float().numpy()
    answers = prediction.answers[0].tolist()
    answer = in_short(target, answers)
    words = f"{answer} ({max(answers):.0%})" if isinstance(target, Classes) else answer
    patches, regions = drawn_patches(prediction, config), drawn_regions(prediction, config)
    about = {"sample": entry.slide_id, "words": words, **answered(target, prediction, answer)}
    looks = []
    for corner, (rows, columns) in places:
        top, left = (corner / pitch).round().long().tolist()
        own = heat[top : top + rows, left : left + columns]
        box = (*corner.tolist(), rows * pitch, columns * pitch)
        looks.append(_Look(about, answer, words, own, pitch, _inside(patches, box), _inside(regions, box)))
    return looks


def _cells(slide: Image, pitch: float) -> tuple[int, int]:
    """Rows and columns of a map over a slide."""
    height, width = slide.shapes[0]
    return math.ceil(height / pitch), math.ceil(width / pitch)


def _inside(patches: Sequence[Patch], box: tuple[float, float, float, float]) -> list[Patch]:
    """Patches that touch a box (y, x, height, width), in pixels from its first one."""
    y, x, height, width = box
    moved = [replace(patch, y_l0=patch.y_l0 - y, x_l0=patch.x_l0 - x) for patch in patches]
    return [p for p in moved if -p.side_l0 < p.y_l0 < height and -p.side_l0 < p.x_l0 < width]


def _write(entry: Entry, image: SlideImage, look: _Look, folder: Path, *, geotiff: bool) -> Heatmap:
    """Write the heatmap of a slide into its own folder."""
    slide, heat, pitch = image.slide, look.heat, look.pitch * image.scale  # in pixels of the slide from here on
    place = make_folder(folder / file_name(entry.slide_id))
    patches, regions = ([each.scaled(image.scale) for each in some] for some in (look.patches, look.regions))
    write_pyramid(
        place / MAP,
        heat[None],
        name=f"attention of {entry.slide_id}",
        mpp=slide.mpp,
        downsample=pitch,
        channels=("attention, times uniform",),
        georeference=slide.georeference and slide.georeference.scaled(pitch),
        overwrite=True,
    )
    title = f"{entry.slide_id}: {look.words}"
    picture = draw_picture(slide, heat, pitch, patches, title, fill=image.fill, channels=image.numbers)
    write_atomic(place / PICTURE, picture)
    for name in (GEOTIFF, PIXEL_OBJECTS, REGIONS):
        (place / name).unlink(missing_ok=True)  # of another model, if they are not written now
    if geotiff:
        write_atomic(place / GEOTIFF, attention_geotiff(slide, heat, pitch))
    about = {"slide_id": entry.slide_id, **look.about}
    write_look(place, slide, heat, pitch, patches, regions, about, fill=image.fill, channels=image.numbers)
    remark = _write_objects(place, to_geojson(patches), slide)
    if regions:
        write_atomic(place / REGIONS, json.dumps(to_geojson(regions, "opened region", _REGION)) + "\n")
    return Heatmap(entry.slide_id, place, look.answer, float(heat.max()), remark=remark)


def _write_objects(folder: Path, collection: dict[str, Any], slide: Slide) -> str:
    """Write patches, of a scene in WGS 84 and in pixels; return why not in WGS 84, where it should have been."""
    placed, remark = None, ""
    if slide.georeference is not None and slide.georeference.crs is not None:
        try:
            placed = in_wgs84(collection, slide)
        except PipelineError as error:
            remark = f"{OBJECTS} is in pixels: {error}"
    if placed:
        write_atomic(folder / PIXEL_OBJECTS, json.dumps(collection) + "\n")
    write_atomic(folder / OBJECTS, json.dumps(placed or collection) + "\n")
    return remark


def drawn_patches(prediction: Prediction, model: PatchConfig) -> list[Patch]:
    """List the distinct patches of all draws for the first image, the heaviest first, as the encoder saw them."""
    return _drawn(prediction, -1, model.patch_downsample, model.patch_size)


def drawn_regions(prediction: Prediction, model: PatchConfig) -> list[Patch]:
    """List the distinct regions that a nested model opened, coarse ones first; other models open none."""
    levels = model.levels[1:] if isinstance(model, ModelConfig) else ()
    return [
        region
        for number, level in enumerate(levels)
        for region in _drawn(prediction, number, level.downsample, level.size or 1)
    ]


def _drawn(prediction: Prediction, phase: int, downsample: float, size: int) -> list[Patch]:
    """List the distinct boxes of so many pixels that a phase drew for the first image, the heaviest first."""
    places: dict[tuple[float, float], list[tuple[int, float, float]]] = {}
    for number, output in enumerate(prediction.outputs):
        drawn_then = output.phases[phase]
        corners = (box_starts(drawn_then.centers_l0[0], downsample, size) * downsample).tolist()
        attention = drawn_then.attention[0].tolist()
        for (y, x), z, a in zip(corners, drawn_then.z[0].tolist(), attention, strict=True):
            if z * a > 0:
                places.setdefault((y, x), []).append((number, z * a, a))
    patches = [
        Patch(
            y,
            x,
            size * downsample,
            weight=sum(weight for _, weight, _ in drawn) / len(prediction.outputs),
            attention=max(attention for _, _, attention in drawn),
            draws=len({number for number, _, _ in drawn}),
        )
        for (y, x), drawn in places.items()
    ]
    return sorted(patches, key=lambda patch: -patch.weight)


def to_geojson(
    patches: Sequence[Patch], kind: str = "sampled patch", colour: tuple[int, int, int] = _PATCH
) -> dict[str, Any]:
    """Make a GeoJSON collection of patches that QuPath imports: polygons of x, y in level-0 pixels, of one class."""
    features = []
    for patch in patches:
        left, top, right, bottom = patch.x_l0, patch.y_l0, patch.x_l0 + patch.side_l0, patch.y_l0 + patch.side_l0
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"drawn {patch.draws} times",
                    "classification": {"name": kind, "color": list(colour)},
                    "measurements": {"weight": patch.weight, "attention": patch.attention, "draws": patch.draws},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def draw_picture(
    slide: Slide,
    heat: NDArray[np.float32],
    pitch: float,
    patches: Sequence[Patch],
    title: str,
    *,
    fill: float = 0,
    channels: Sequence[int] | None = None,
) -> bytes:
    """Draw the slide under its attention, with colour bar, scale bar and the heaviest patches, as a PNG.

    Parameters
    ----------
    slide
        An open slide.
    heat
        The attention as multiples of the uniform one, (H, W).
    pitch
        How many level-0 pixels a pixel of `heat` has on a side.
    patches
        The patches, the heaviest first.
    title
        The title of the picture.
    fill
        The value of pixels off the slide, as the model saw them (`SlideImage.fill`).
    channels
        Numbers of the channels to show (`SlideImage.numbers`); None means all, of which the first three are shown.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    height, width = slide.shape_yx
    figure = Figure(figsize=(9, 9 * min(max(height / width, 0.4), 2) + 1.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[6, 1])[:, 0]
    axes = top.subplots()
    shown = slice(None) if channels is None else list(channels)
    view, reach = thumbnail(slide, _PICTURE_PIXELS, shown)
    axes.imshow(view, extent=(0, reach[1], reach[0], 0), interpolation="nearest")
    # Colour begins at the uniform attention, so that the slide itself shows where attention is less than chance.
    peak = max(float(heat.max()), 1.1)
    scale = LogNorm(1, peak)
    alpha = np.clip(0.25 + 0.6 * np.ma.filled(scale(np.maximum(heat, 1)), 0), 0, 1) * (heat > 1)
    # The map's last row and column reach past the slide where the pitch does not divide it.
    extent = (0, heat.shape[1] * pitch, heat.shape[0] * pitch, 0)
    drawn = axes.imshow(heat, extent=extent, norm=scale, cmap="inferno", alpha=alpha, interpolation="nearest")
    axes.scatter(
        [patch.x_l0 + patch.side_l0 / 2 for patch in patches],
        [patch.y_l0 + patch.side_l0 / 2 for patch in patches],
        s=60,
        facecolors="none",
        edgecolors="cyan",
        linewidths=0.8,
    )
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(f"{title}; attention 1 to {peak:.3g}", parse_math=False)  # a slide's id may hold dollar signs
    top.colorbar(drawn, ax=axes, label="attention, times uniform", shrink=0.8)
    _scale_bar(axes, slide)
    for place, patch in zip(bottom.subplots(1, _SHOWN_PATCHES), [*patches, *[None] * _SHOWN_PATCHES], strict=False):
        place.axis("off")
        if patch is not None:
            place.imshow(to_rgb(read_patch(slide, patch, fill)[shown], slide.nodata))
            place.set_title(f"{patch.weight:.3f}", fontsize=8)
    bottom.suptitle("heaviest patches, with their share of the slide's feature", fontsize=9)
    return to_png(figure)


def _scale_bar(axes: Any, slide: Slide) -> None:
    """Draw a bar of a round length of about a fifth of the slide's width."""
    height, width = slide.shape_yx
    length, label = bar_of(slide)
    x, y = 0.03 * width, 0.96 * height
    for colour, line in (("black", 5), ("white", 3)):
        axes.plot([x, x + length], [y, y], color=colour, linewidth=line, solid_capstyle="butt")
    box = {"facecolor": "black", "alpha": 0.6, "pad": 2, "edgecolor": "none"}
    axes.text(x, y - 0.015 * height, label, color="white", fontsize=9, bbox=box)
