"""``init``: a commented configuration to begin with, made for the slides of a manifest.

The templates are the YAML files in ``templates/``, in which ``$name`` stands for what is worked out here: scale,
levels and patches for the size of the slides, an encoder whose weights are on this machine, channels, nodata, and as
many epochs as make a few hundred steps.

The cells of the finest map are as large as a patch, so that patches come again and their features are computed once.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import NamedTuple

from nested_ats.config import LevelConfig, levels_for
from nested_ats.networks.hub import cached
from nested_ats.networks.presets import PRESETS
from pipeline.data.given import FeatureImage
from pipeline.data.manifest import Entry, is_features
from pipeline.data.slides import open_slide
from pipeline.errors import DataError, UsageError
from pipeline.net import Net
from pipeline.progress import each_slide
from pipeline.stats import measure
from storage import processors
from storage.format.levels import MIN_LEVEL_SIZE

KINDS = ("histology", "scenes", "megapixel", "features")
_MOBILENET = "mobilenet_v2-b0353104.pth"
_STEPS, _BATCH = 400, 4  # of a training on top of a network that stays as it is
_FEWEST, _MOST = 10, 100  # epochs
_COARSE = 4096  # pixels, the longer side of the coarsest view at most
_SMALLEST = MIN_LEVEL_SIZE // 2  # pixels: every level that `convert` makes has a longer side above it


@dataclass(frozen=True)
class Slides:
    """What the slides of a manifest have in common."""

    count: int  # of those that could be opened
    training: int  # of which are trained on, as far as the manifest tells
    shape_yx: tuple[int, int]  # of the largest, in its own pixels
    mpp: float | None  # micrometres per pixel of the coarsest, where all tell it
    channels: int  # of most
    gaps: bool  # whether some tell where they have no data
    failures: tuple[tuple[str, str], ...]


class _About(NamedTuple):
    """What one slide is like."""

    shape_yx: tuple[int, int]
    mpp: float | None
    channels: int
    gaps: bool


def write_preset(
    kind: str, entries: Sequence[Entry], encoder: str | None, where: str, channels: Sequence[int | str] = ()
) -> tuple[str, Slides | None]:
    """Make the text of a configuration.

    Parameters
    ----------
    kind
        One of `KINDS`.
    entries
        The slides that it is made for; none for a configuration that is made for no slides in particular.
    encoder
        The name of a published encoder of histology, or None for the best one that is on this machine.
    where
        Names the slides in the text.
    channels
        Of scenes: which the model sees, by name or number; their mean and spread are measured. Empty means all.

    Returns
    -------
    The text, and what the slides have in common.

    Raises
    ------
    UsageError
        There is no such kind or encoder, or `channels` are given for other slides than scenes.
    DataError
        No slide can be opened.
    """
    if kind not in KINDS:
        raise UsageError(f"{kind}: no such preset; choose one of {', '.join(KINDS)}")
    if encoder and encoder not in PRESETS:
        raise UsageError(f"--encoder {encoder}: no such preset; choose one of {', '.join(PRESETS)}")
    if kind == "features" and (images := [entry.path for entry in entries if not is_features(entry.path)]):
        raise UsageError(
            f"{images[0]}: an image; init features is for .h5 files of features, which the manifest names"
        )
    if channels and (kind != "scenes" or not entries):
        raise UsageError("--channels: for scenes, of which their values are measured; give init scenes a --manifest")
    slides = look_at(entries) if entries else None
    if slides and channels:
        slides = replace(slides, channels=len(channels))
    values = {"made_for": _made_for(slides, where, "tiles" if kind == "features" else "pixels")}
    if kind == "features":
        values |= _course(slides)
    else:
        values |= _megapixel(slides) if kind == "megapixel" else _pretrained(kind, slides, encoder)
    if kind == "scenes":
        values |= _values(entries, channels)
    template = files("pipeline").joinpath("templates", f"{kind}.yaml").read_text()
    return Template(template).substitute(values), slides


def look_at(entries: Sequence[Entry]) -> Slides:
    """Open slides and see what they have in common; those that cannot be opened are named (DataError: none can)."""

    def look(entry: Entry) -> tuple[Entry, _About | None, str]:
        if is_features(entry.path):
            with Net() as net:
                image = FeatureImage(entry)
                return entry, _About(image.shapes[0], None, len(image.numbers), gaps=False), ""
            return entry, None, net.error
        with Net() as net, open_slide(entry.path) as slide:
            return (
                entry,
                _About(
                    slide.shape_yx,
                    entry.mpp or slide.mpp,
                    len(slide.data_channels),
                    slide.nodata is not None or slide.alpha is not None,
                ),
                "",
            )
        return entry, None, net.error

    found = list(each_slide("open", entries, look, threads=processors()))
    opened = [(entry, about) for entry, about, _ in found if about]
    failures = tuple((entry.slide_id, error) for entry, about, error in found if not about)
    if not opened:
        raise DataError(f"no slide can be opened; the first: {failures[0][1]}")
    mpps = [about.mpp for _, about in opened if about.mpp]
    return Slides(
        count=len(opened),
        training=sum(entry.split in ("", "train") for entry, _ in opened),
        shape_yx=max((about.shape_yx for _, about in opened), key=math.prod),
        mpp=max(mpps) if len(mpps) == len(opened) else None,
        channels=Counter(about.channels for _, about in opened).most_common(1)[0][0],
        gaps=any(about.gaps for _, about in opened),
        failures=failures,
    )


def _made_for(slides: Slides | None, where: str, unit: str) -> str:
    if slides is None:
        return "# Made for no slides in particular; give init a manifest for levels and a scale that fit yours."
    height, width = slides.shape_yx
    mpp = f", {slides.mpp:g} micrometres a pixel or less" if slides.mpp else ""
    largest = f"up to {height} x {width} {unit}, {slides.channels} channels{mpp}"
    return f"# Made for {slides.count} slides of {where}: {largest}."


def _pretrained(kind: str, slides: Slides | None, encoder: str | None) -> dict[str, str]:
    colours = slides is None or slides.channels == 3
    name = encoder or (_best_encoder() if kind == "histology" else "")
    side, mpp, line = 64, 0.5, _mobilenet()
    if name:
        side, mpp, line = PRESETS[name].pixels, PRESETS[name].mpp[0], name
    trained = "none # the encoder stays as it is: some dozens of labels are too few to train one"
    if not colours:
        line, trained = "resnet # ImageNet's networks take three channels", "all"
    scale = 1.0
    if slides and slides.mpp and kind == "histology":
        if slides.mpp > 1.1 * mpp:  # no slide may be coarser than the model
            mpp = slides.mpp
        scale = slides.mpp / mpp
    told = slides is not None and slides.mpp is not None
    longer = max(slides.shape_yx) * scale if slides else 4096.0
    if kind == "histology":
        prior = "tissue" if colours else "none"
    else:
        prior = "valid" if slides is None or slides.gaps else "none"
    return {
        "levels": _levels(side, longer, 16 if kind == "histology" else 8),
        "side": str(side),
        "mpp": f"mpp: {mpp:g}" if told else f"# mpp: {mpp:g}",
        "encoder": line,
        "trainable": trained,
        "standardise": str(colours).lower(),
        "prior": prior,
        **_course(slides),
    }


def _values(entries: Sequence[Entry], channels: Sequence[int | str]) -> dict[str, str]:
    """Which channels the model sees, and their mean and spread over the training scenes."""
    if not channels:
        means = "# mean: [...] # and std, as `nested-ats stats` prints them, where values fill little of their type"
        return {"values": means, "chosen": "# channels: [B04, B03, B02] # by name or number: what the model sees"}
    _, means, stds = (line.strip() for line in measure(entries, channels=tuple(channels)).lines)
    return {
        "values": f"{means} # of the training scenes\n  {stds}",
        "chosen": f"channels: [{', '.join(map(str, channels))}]",
    }


def _course(slides: Slides | None) -> dict[str, str]:
    """How long a training takes, of a few parameters."""
    training = max(1, round((slides.training if slides else 50) * 0.8))
    epochs = min(_MOST, max(_FEWEST, round(_STEPS * _BATCH / training)))
    return {"epochs": str(epochs), "steps": str(epochs * math.ceil(training / _BATCH))}


def _levels(side: int, longer: float, downsample: int) -> str:
    """Levels of attention above patches that are encoded by a network that stays as it is, as lines of YAML.

    Parameters
    ----------
    side
        Of a patch, in pixels at downsample 1.
    longer
        Side of the largest image, in the same pixels.
    downsample
        Of the last level but one, or less where images are too small for it; the last level is four times finer.
    """
    while downsample > 4 and longer / downsample <= _SMALLEST:
        downsample //= 2
    cell = side // downsample * downsample  # of the last two maps, in pixels at downsample 1
    unit = 4 * cell  # what the last level but one draws
    fine = downsample // 4
    levels = [
        LevelConfig(downsample=downsample, stride=cell // downsample, group=4, samples=16),
        LevelConfig(downsample=fine, size=unit // fine, stride=cell // fine, samples=32),
    ]
    while longer / downsample > _COARSE:
        # Cells of a coarser map are what the next level draws.
        levels[0] = replace(levels[0], size=4 * unit // downsample)
        downsample *= 4
        levels.insert(0, LevelConfig(downsample=downsample, stride=unit // downsample, group=4, samples=16))
        unit *= 4
    return _lines(levels)


def _lines(levels: Sequence[LevelConfig]) -> str:
    shown = []
    for level in levels:
        size = f"size: {level.size}, " if level.size else ""
        group = f"group: {level.group}, " if level.group > 1 else ""
        rest = f"samples: {level.samples}, channels: {list(level.channels)}"
        shown.append(f"    - {{ downsample: {level.downsample:g}, {size}stride: {level.stride}, {group}{rest} }}")
    return "\n".join(shown)


def _megapixel(slides: Slides | None) -> dict[str, str]:
    return {"levels": _lines(levels_for(slides.shape_yx if slides else (2048, 2048)))}


def encoders_here() -> list[str]:
    """Name the published encoders whose weights are in the hub's cache."""
    if not find_spec("huggingface_hub"):
        return []
    return [name for name, preset in PRESETS.items() if preset.library and cached(preset.repository)]


def _best_encoder() -> str:
    """Name the first of the published encoders whose weights are here; empty if there is none."""
    return next(iter(encoders_here()), "")


def _mobilenet() -> str:
    """MobileNetV2 as YAML, with its weights from where they usually lie, or from where they are to be brought."""
    places = (Path.cwd() / _MOBILENET, Path.home() / ".cache" / "torch" / "hub" / "checkpoints" / _MOBILENET)
    found = next((str(place) for place in places if place.exists()), _MOBILENET)
    return f"{{ name: mobilenet_v2, weights: {json.dumps(found)} }} # or uni, ...: see `nested-ats info uni`"
