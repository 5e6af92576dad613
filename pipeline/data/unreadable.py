"""Leave slides that turn out to be unreadable out of the steps of a training, and report them at its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from cluster import Context
from nested_ats import Image
from nested_ats.images import HasArea
from pipeline.errors import DataError
from pipeline.net import Net


class SlideError(Exception):
    """A slide cannot be read; `Unreadable` knows why."""

    def __init__(self, slide_id: str) -> None:
        super().__init__(slide_id)
        self.slide_id = slide_id


class Unreadable:
    """The slides that could not be read, and why; it is thread safe.

    Parameters
    ----------
    fail_fast
        Whether the first such slide ends the training.

    Attributes
    ----------
    reasons
        Why each slide could not be read, by slide id; after `gather` they are those of all workers.
    """

    def __init__(self, *, fail_fast: bool = False) -> None:
        self.reasons: dict[str, str] = {}
        self._fail_fast = fail_fast

    def error(self, slide_id: str, net: Net) -> SlideError:
        """Note what was caught of a slide, and say so the first time.

        Raises
        ------
        DataError
            `fail_fast` is set.
        """
        if self._fail_fast:
            raise DataError(f"slide {slide_id}: {net.error}") from net.cause
        if slide_id not in self.reasons:
            print(f"slide {slide_id} is left out: {net.error}", file=sys.stderr, flush=True)
        self.reasons[slide_id] = net.error
        return SlideError(slide_id)

    def gather(self, context: Context) -> None:
        """Let every worker know the reasons of all."""
        own = json.dumps(self.reasons).encode() if self.reasons else b""
        lengths = torch.zeros(context.world_size, dtype=torch.int64, device=context.device)
        lengths[context.rank] = len(own)
        context.all_reduce(lengths)
        if not lengths.any():
            return
        ends = lengths.cumsum(0).tolist()
        text = torch.zeros(ends[-1], dtype=torch.uint8)
        text[ends[context.rank] - len(own) : ends[context.rank]] = torch.tensor(list(own), dtype=torch.uint8)
        text = text.to(context.device)
        context.all_reduce(text)
        for part in torch.split(text.cpu(), lengths.tolist()):
            self.reasons |= json.loads(bytes(part.tolist()) or b"{}")


class WatchedImage:
    """An image of a slide whose failures are noted, and raised as `SlideError`."""

    def __init__(self, image: Image, slide_id: str, unreadable: Unreadable) -> None:
        self._image, self._slide_id, self._unreadable = image, slide_id, unreadable

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every level."""
        return self._image.shapes

    @property
    def downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of every level."""
        return self._image.downsamples

    @property
    def identity(self) -> str | None:
        """The identity of the image, if it has one."""
        identity: str | None = getattr(self._image, "identity", None)
        return identity

    @property
    def mask(self) -> HasArea | None:
        """The mask of the image, if it has one."""
        mask: HasArea | None = getattr(self._image, "mask", None)
        return mask

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes as (N, C, h, w) of the image's own type; see `nested_ats.Image.read`."""
        with Net() as net:
            return self._image.read(level, boxes)
        raise self._unreadable.error(self._slide_id, net)
