"""Samples as a model sees them: a slide, or all slides of a case (`data.unit`)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import ExitStack
from functools import partial
from typing import Unpack

from nested_ats.config import EncoderConfig
from nested_ats.networks.builtin import GIVEN
from nested_ats.networks.encoders import read_choice
from pipeline.data.cases import CaseImage
from pipeline.data.given import FeatureImage
from pipeline.data.manifest import Entry, is_features
from pipeline.data.slides import Opening, SlideImage, check_slide, open_image
from pipeline.errors import DataError

_OPEN_SLIDES = 128  # each holds a few file descriptors
_HELD_BYTES = 2 * 2**30  # PNG, JPEG and BMP images are held decoded, and take no more than this

Sample = SlideImage | FeatureImage | CaseImage


def open_sample(entry: Entry, config: EncoderConfig, **options: Unpack[Opening]) -> Sample:
    """Open a slide, or all slides of a case; parameters and errors are those of `open_image`.

    Raises
    ------
    DataError
        A slide of a case lacks a level that the model reads, or has other channels than the first.
    """
    if not entry.slides:
        return _open_one(entry, config, **options)
    with ExitStack() as stack:
        slides = []
        for slide in entry.slides:
            slides.append(_open_one(slide, config, **options))
            stack.callback(slides[-1].close)
            check_slide(slides[-1], config, len(slides[0].numbers))
        image = CaseImage(slides, config, background=options.get("background", 0.0))
        stack.pop_all()
    return image


def _open_one(entry: Entry, config: EncoderConfig, **options: Unpack[Opening]) -> SlideImage | FeatureImage:
    """Open a slide, or the features that stand for it, as the model's encoder asks for."""
    given = config.encoder_name == GIVEN
    if not is_features(entry.path):
        if given:
            raise DataError(f"{entry.path}: an image, where model.encoder given takes .h5 files of features")
        return open_image(entry, config, **options)
    if not given:
        raise DataError(f"{entry.path}: a file of features, where the model looks at pixels; see model.encoder given")
    image, wanted = FeatureImage(entry), read_choice(config.encoder).options.get("of")
    if wanted and image.slide.made_by not in ("", wanted):
        raise DataError(f"{entry.path}: features of {image.slide.made_by}, where the model's are of {wanted}")
    return image


def check_sample(sample: Sample, config: EncoderConfig, channels: int) -> None:
    """See that all slides of a sample have what a model reads; see `check_slide`."""
    for slide in sample.slides:
        check_slide(slide, config, channels)


class SampleCache:
    """Keeps samples open and closes the least recently used first; it is thread safe.

    Parameters
    ----------
    config, options
        As `open_sample` takes them.
    """

    def __init__(self, config: EncoderConfig, **options: Unpack[Opening]) -> None:
        self._open = partial(open_sample, config=config, **options)
        self._samples: OrderedDict[Entry, Sample] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, entry: Entry) -> Sample:
        """Open the sample of an entry, or return it open; the errors are those of `open_sample`."""
        with self._lock:
            image = self._samples.pop(entry, None)
        # This opens without the lock, as it may wait for a store. Two threads may open one sample; it does no harm.
        image = image or self._open(entry)
        with self._lock:
            self._samples[entry] = image
            while self._count() > _OPEN_SLIDES or (len(self._samples) > 1 and self._held_bytes() > _HELD_BYTES):
                # It is not closed here, as another thread may read it; its descriptors go with the last reference.
                self._samples.popitem(last=False)
            return image

    def _count(self) -> int:
        """How many slides are open, of more than one sample."""
        return sum(len(sample.slides) for sample in self._samples.values()) if len(self._samples) > 1 else 1

    def _held_bytes(self) -> int:
        return sum(image.memory_bytes for image in self._samples.values())
