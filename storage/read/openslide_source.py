"""Slides that OpenSlide reads where they lie; see ``storage.images.openslide_image``.

Shape letters: N boxes, C channels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.read.halved import HalvedSource, fill_apart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.images.openslide_image import OpenSlideImage
    from storage.read.source import Counters


class OpenSlideSource(HalvedSource):
    """A slide that OpenSlide reads; see ``Source``. Its reads are counted, but their bytes are unknown."""

    def __init__(self, image: OpenSlideImage, counters: Counters) -> None:
        super().__init__(image, image.sizes_yx, [0] * len(image.sizes_yx))
        self._image, self._counters = image, counters
        self.name, self.identity = Path(image.location).stem, image.identity

    def _fill_stored(self, number: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        read = partial(self._image.read_level, number)
        asked = fill_apart(boxes, out, self._image.sizes_yx[number], read)
        self._counters.add(requests=asked, chunks=asked)

    def close(self) -> None:
        """Close the file."""
        self._image.close()
