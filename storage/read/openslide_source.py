"""Slides that OpenSlide reads where they lie; see ``storage.images.openslide_image``.

Shape letters: N boxes, C channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.read.halved import HalvedSource, inside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.images.openslide_image import OpenSlideImage
    from storage.read.source import Counters


class OpenSlideSource(HalvedSource):
    """A slide that OpenSlide reads; see ``Source``. What is read of the file is not told, but how often."""

    def __init__(self, image: OpenSlideImage, counters: Counters) -> None:
        super().__init__(image, image.sizes_yx, [0] * len(image.sizes_yx))
        self._image, self._counters = image, counters
        self.name, self.identity = Path(image.location).stem, image.identity

    def _fill_stored(self, number: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        for box, own in zip(boxes, out, strict=True):
            y0, x0, y1, x1 = inside(box, self._image.sizes_yx[number])
            if y0 < y1 and x0 < x1:
                y, x = box[:2].tolist()
                own[:, y0 - y : y1 - y, x0 - x : x1 - x] = self._image.read_level(number, y0, x0, y1 - y0, x1 - x0)
                self._counters.add(requests=1, chunks=1)

    def close(self) -> None:
        """Let go of the file."""
        self._image.close()
