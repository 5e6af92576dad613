"""Cases of several slides as samples: which slides they have, and all of them as one image.

With ``data.unit: case`` the cells of all slides of a case are one population: attention spans them, and patches are
drawn where they matter, whichever the slide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from nested_ats.config import EncoderConfig, PatchConfig
from nested_ats.mosaic import Mosaic
from pipeline.data.given import FeatureImage
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage
from pipeline.errors import UsageError
from storage import ReadStatistics

_NAMED = 10  # problems, in a message


def group_cases(entries: Sequence[Entry], told_by: Sequence[str] = ("label",)) -> list[Entry]:
    """Make one entry of all slides of a case, in the order in which cases come; a slide without a case is its own.

    Parameters
    ----------
    entries
        Slides.
    told_by
        The columns of the label, in which the slides of a case must agree.

    Raises
    ------
    UsageError
        The slides of a case have several labels, or are in several splits; or a case is called like a slide that is
        a case of its own.
    """
    cases: dict[str, list[Entry]] = {}
    for entry in entries:
        cases.setdefault(entry.case_id or entry.slide_id, []).append(entry)
    problems = []
    for name, slides in cases.items():
        if len({slide.case_id for slide in slides}) > 1:
            problems.append(f"case {name} is called like a slide without a case")
        columns = {"split": {slide.split for slide in slides}}
        columns |= {column: {_cell(slide, column) for slide in slides} for column in told_by}
        problems += [
            f"slides of case {name} have several values in column {column}: {', '.join(sorted(found))}"
            for column, found in columns.items()
            if len(found) > 1
        ]
    if problems:
        shown = "; ".join(problems[:_NAMED]) + (f"; and {len(problems) - _NAMED} more" * (len(problems) > _NAMED))
        raise UsageError(f"data.unit: case: {shown}; mend the manifest, or set data.unit to slide")
    return [_case(name, slides) for name, slides in cases.items()]


class CaseImage(Mosaic):
    """The open slides of a case as one image; the parameters are those of `nested_ats.mosaic.Mosaic`.

    Attributes
    ----------
    slides
        The slides, each as the model looks at it.
    """

    def __init__(
        self, slides: Sequence[SlideImage | FeatureImage], config: EncoderConfig, *, background: float = 0.0
    ) -> None:
        assert isinstance(config, PatchConfig)  # noqa: S101  a configuration of cases is checked for it
        super().__init__(slides, config, background=background)
        self.slides = list(slides)

    @property
    def identity(self) -> str | None:
        """Names the pixels of all slides and their places; None where a slide has no identity."""
        names = [slide.identity for slide in self.slides]
        return None if None in names else f"{'+'.join(map(str, names))}/{self.corners_l0.tolist()}"

    @property
    def memory_bytes(self) -> int:
        """Bytes of pixels and masks that are held while it is open."""
        return sum(slide.memory_bytes for slide in self.slides)

    @property
    def statistics(self) -> ReadStatistics:
        """Counts of what was read of all slides since opening."""
        return sum((slide.statistics for slide in self.slides), ReadStatistics())

    def close(self) -> None:
        """Close all slides."""
        for slide in self.slides:
            slide.close()

    def places(self) -> list[tuple[SlideImage | FeatureImage, Tensor]]:
        """Return each slide with its first pixel in the image, (2,) y and x of its finest level."""
        return list(zip(self.slides, self.corners_l0, strict=True))


def _case(name: str, slides: Sequence[Entry]) -> Entry:
    first = slides[0]
    if len(slides) == 1:
        return replace(first, slide_id=name)
    extra: Mapping[str, str] = {
        column: cell for column, cell in first.extra.items() if all(s.extra.get(column) == cell for s in slides)
    }
    return replace(first, slide_id=name, extra=extra, slides=tuple(slides))


def _cell(entry: Entry, column: str) -> str:
    return entry.label if column == "label" else entry.extra.get(column, "")
