"""A trained model that classifies one slide at a time and makes its row of the table of predictions."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nested_ats import Image, ImageModel, ImpossibleWeightsError, Prediction, load_model
from nested_ats import predict as estimate
from pipeline.allocator import keep_freed_memory
from pipeline.data.duplicates import identity_of
from pipeline.data.features import use_features
from pipeline.data.manifest import Entry
from pipeline.data.samples import Sample, check_sample, open_sample
from pipeline.data.slides import draw_key
from pipeline.errors import DataError, UsageError
from pipeline.net import Net
from pipeline.results.predictions import PIXELS, SIGNS, answer_cells, in_short
from pipeline.results.settings import Settings, with_samples
from pipeline.results.verdict import Observer
from pipeline.runs import autocast, choose_device

_ENCODED_AT_ONCE = 256  # patches that an exact evaluation encodes together
_READERS = 8  # threads that read a slide, whose draws wait for their reads together


class Classifier:
    """A model that is loaded once and classifies one slide at a time.

    Parameters
    ----------
    settings
        Which model classifies, and how.

    Raises
    ------
    nested_ats.ModelFileError
        The model cannot be loaded.
    UsageError
        A GPU is required, and PyTorch sees none here.
    """

    def __init__(self, settings: Settings) -> None:
        keep_freed_memory()
        if settings.device == "cuda" and choose_device(settings.device) == "cpu":
            raise UsageError(
                f"--device cuda: PyTorch sees no GPU on {platform.node()}; install its CUDA build, or choose auto"
            )
        model, _ = load_model(Path(settings.model), expect=ImageModel, trust_encoder=settings.trust_encoder)
        model.config = with_samples(model.config, settings.samples)  # the weights do not depend on it
        model.head.temperature = settings.temperature or 1.0
        self.settings = settings
        self.model = model.to(choose_device(settings.device))
        use_features(self.model, settings.features)
        self.observer = Observer(self.model)
        self._readers = ThreadPoolExecutor(_READERS)

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[Sample]:
        """Open a slide as the model looks at it, and check that it has what the model reads.

        Raises
        ------
        storage.StorageError, DataError
            It cannot be opened, or lacks what the model reads.
        """
        config, settings = self.model.config, self.settings
        with closing(open_sample(entry, config, **settings.opening)) as image:
            check_sample(image, config, self.model.in_channels)
            yield image

    @contextmanager
    def computing(self) -> Iterator[ThreadPoolExecutor]:
        """Compute in the precision of the settings; yields the threads that read."""
        with autocast(choose_device(self.settings.device), self.settings.precision):
            yield self._readers

    def estimate(self, entry: Entry, image: Image) -> Prediction:
        """Classify an image; equal slides and settings draw equal patches.

        Raises
        ------
        DataError
            Attention or answers are not finite.
        """
        settings = self.settings
        keys = [draw_key(settings.seed, "predict", entry.slide_id, i) for i in range(settings.draws)]
        with suppress(ImpossibleWeightsError), self.computing() as readers:
            prediction = estimate(
                self.model,
                [image],
                torch.tensor([keys]),
                readers=readers,
                target_error=settings.target_error,
                exact=_ENCODED_AT_ONCE if settings.exact else 0,
            )
            if prediction.answers.isfinite().all():
                return prediction
        raise DataError(f"{entry.path}: what the model computes is not finite; has the slide pixels that are not?")

    def __call__(self, entry: Entry) -> dict[str, Any]:
        """Classify a slide and return its row of the table, without the slide's identity; it may have failed."""
        with Net() as net:
            return self._row(entry)
        return failed(net.error)

    def _row(self, entry: Entry) -> dict[str, Any]:
        began = time.monotonic()
        with self.opened(entry) as image:
            prediction = self.estimate(entry, image)
            read = image.statistics
            identities = [found for slide in image.slides if (found := identity_of(slide.slide))]
        return {
            "prediction": in_short(self.model.target, prediction.answers[0].tolist(), self.settings.thresholds),
            **answer_cells(self.model.target, prediction),
            "draws": int(prediction.draws[0]),
            **self._signs(prediction),
            "requests": read.requests,
            "bytes_read": read.bytes_read,
            "seconds": round(time.monotonic() - began, 4),
            PIXELS: identities,
            "status": "ok",
            "error": "",
        }

    def _signs(self, prediction: Prediction) -> dict[str, float | None]:
        """Values that reveal an attention that has learned nothing (`verdict`), over the draws of one slide."""
        background, patches = self.observer.take().tolist()
        drawn = patches and not self.settings.exact  # an exact evaluation also encodes patches that were not drawn
        uniform = torch.cat([self.observer.uniform_entropy(output) for output in prediction.outputs])
        entropy = torch.cat([output.entropy for output in prediction.outputs]).mean()
        share = background / patches if drawn else None
        return dict(zip(SIGNS, (float(entropy), float(uniform.mean()), share), strict=True))


def failed(error: str | None) -> dict[str, Any]:
    """Row of a slide that failed."""
    return {"status": "failed", "error": error}
