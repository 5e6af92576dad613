"""What a model drew: patches and regions, their share and contribution, and polygons of them for QuPath."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nested_ats import Prediction
from nested_ats.cells import box_starts
from nested_ats.config import ModelConfig, PatchConfig

PATCH_COLOUR, REGION_COLOUR = (230, 60, 30), (20, 120, 220)  # in QuPath


@dataclass(frozen=True)
class Patch:
    """A place where patches were drawn, once or in several draws."""

    y_l0: float  # the upper edge
    x_l0: float  # the left edge
    side_l0: float
    weight: float  # the patch's share of the slide's feature: z times attention, averaged over the draws
    attention: float  # the attention of its leaf, or of the strongest where several leaves lie there
    draws: int  # how many draws drew it
    contribution: float | None = None  # what it adds to the score (`nested_ats.contribution`); regions have none

    def moved(self, y_l0: float, x_l0: float) -> Patch:
        """The same place seen from another first pixel."""
        return replace(self, y_l0=self.y_l0 - y_l0, x_l0=self.x_l0 - x_l0)

    def scaled(self, scale: float) -> Patch:
        """The same place in pixels that are `scale` times smaller."""
        place = {name: getattr(self, name) * scale for name in ("y_l0", "x_l0", "side_l0")}
        return replace(self, **place)


def measurements(patch: Patch) -> dict[str, float]:
    """The numbers of a patch by name."""
    numbers = {name: getattr(patch, name) for name in ("weight", "attention", "draws", "contribution")}
    return {name: value for name, value in numbers.items() if value is not None}


def drawn_patches(
    prediction: Prediction, model: PatchConfig, evidence: Sequence[Tensor] | None = None
) -> list[Patch]:
    """List the distinct patches of all draws for the first image, the heaviest first, as the encoder saw them.

    Parameters
    ----------
    prediction
        What was answered.
    model
        The configuration of the model.
    evidence
        What each unit of the last phase says, (n,) for each draw (`nested_ats.contribution.evidence`); None where
        that was not asked.
    """
    return _drawn(prediction, -1, model.patch_downsample, model.patch_size, evidence)


def drawn_regions(prediction: Prediction, model: PatchConfig) -> list[Patch]:
    """List the distinct regions that a nested model opened, coarse ones first; other models open none."""
    levels = model.levels[1:] if isinstance(model, ModelConfig) else ()
    return [
        region
        for number, level in enumerate(levels)
        for region in _drawn(prediction, number, level.downsample, level.size or 1)
    ]


def _drawn(
    prediction: Prediction, phase: int, downsample: float, size: int, evidence: Sequence[Tensor] | None = None
) -> list[Patch]:
    """List the distinct boxes of so many pixels that a phase drew for the first image, the heaviest first."""
    places: dict[tuple[float, float], list[tuple[int, float, float, float]]] = {}
    for number, output in enumerate(prediction.outputs):
        drawn_then = output.phases[phase]
        corners = (box_starts(drawn_then.centers_l0[0], downsample, size) * downsample).tolist()
        attention, weights = drawn_then.attention[0].tolist(), drawn_then.z[0].tolist()
        said = evidence[number].tolist() if evidence else [math.nan] * len(weights)
        for (y, x), z, a, each in zip(corners, weights, attention, said, strict=True):
            if z * a > 0:
                places.setdefault((y, x), []).append((number, z * a, a, z * a * each))
    draws = len(prediction.outputs)
    patches = [
        Patch(
            y,
            x,
            size * downsample,
            weight=sum(weight for _, weight, _, _ in drawn) / draws,
            attention=max(attention for _, _, attention, _ in drawn),
            draws=len({number for number, _, _, _ in drawn}),
            contribution=sum(added for *_, added in drawn) / draws if evidence else None,
        )
        for (y, x), drawn in places.items()
    ]
    return sorted(patches, key=lambda patch: -patch.weight)


def to_geojson(
    patches: Sequence[Patch], kind: str = "sampled patch", colour: tuple[int, int, int] = PATCH_COLOUR
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
                    "measurements": measurements(patch),
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}
